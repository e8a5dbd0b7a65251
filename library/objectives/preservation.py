"""What holds a slider to the model it came from, sample by sample."""

from torch import Tensor

from library.diffusion.noise_schedule import per_sample


def eps_drift(eps: Tensor, frozen_eps: Tensor) -> Tensor:
    """Mean squared distance from the frozen model's prediction [B]; the KL term of DRaFT+ (NeMo-Aligner). eps, frozen_eps [B, C, h, w]."""
    return (eps - frozen_eps).square().mean((1, 2, 3))


def statistics_drift(x0: Tensor, frozen_x0: Tensor, abar: Tensor) -> Tensor:
    """How far each channel's mean and log standard deviation over the picture moved [B]: what saturation, contrast and vignette hacks move.

    Mean over channels of (change of the mean)^2 + (change of the log std)^2, times abar: at high noise x0 is a guess, whose
    change per unit of eps grows as 1 / sqrt(abar).

    Args:
        x0, frozen_x0: clean latents foreseen with and without the LoRA [B, C, h, w].
        abar: where they were foreseen [B].
    """
    means = (x0.mean((2, 3)) - frozen_x0.mean((2, 3))).square()
    deviations = (_log_std(x0) - _log_std(frozen_x0)).square()
    return ((means + deviations) * per_sample(abar, means)).mean(1)


def asymmetry(eps: Tensor, mirrored_eps: Tensor, frozen_eps: Tensor) -> Tensor:
    """|(eps_{+m} + eps_{-m}) / 2 - eps_0|^2 [B]: 0 for an odd slider, whose two signs are opposites around the frozen model."""
    return eps_drift((eps + mirrored_eps) / 2, frozen_eps)


def _log_std(x0: Tensor) -> Tensor:  # [B, C]
    return (x0.var((2, 3)) + 1e-6).log() / 2
