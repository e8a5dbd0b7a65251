"""What holds a slider to the model it came from."""

from torch import Tensor


def eps_drift(eps: Tensor, frozen_eps: Tensor) -> Tensor:
    """Mean squared distance from the frozen model's prediction [B]; the KL term of DRaFT+ (NeMo-Aligner). eps, frozen_eps [B, C, h, w]."""
    return (eps - frozen_eps).square().mean((1, 2, 3))
