"""Pictures from a model, with or without a slider: whole trajectories, no gradient, a multiplier per sample.

The noise of a sample is drawn on the CPU from its seed alone, so a seed means the same picture in every batch, on every
device and at every multiplier.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.diffusion.noise_schedule import TimestepSpacing
from library.diffusion.solvers import SOLVERS, guided_eps, rescale_guided_eps
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.vae import Autoencoder, decode_latents
from library.rollouts.prompt_encoder import PromptEncoder, Size, network_at, size_of
from library.training.runtime import upload
from library.types import Conditioning, History, PromptSpec, Sparse
from networks.lora import LoRANetwork

SAMPLED_LATENTS = 8 * 64 * 64  # latent positions in one call of the sampler: 8 pictures of 512 x 512; more at once is no faster
MOST_SAMPLED = 64  # pictures, however small
SAMPLED_BYTES = 2**15  # of activations for a position and a byte of the dtype, with guidance; counted: SD1 29,000, SDXL 17,000
DECODED_PIXELS = 512 * 512


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How pictures are sampled. A prompt that brings its own size, steps or guidance scale has those (`of`).

    Attributes:
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance; a batch in which all are 1 runs no unconditional branch.
        size: (height, width) in pixels.
        sampler: a name in `solvers.SOLVERS`.
        spacing: of the timesteps; None is the model's own.
        guidance_rescale: phi of `solvers.rescale_guidance`, 0..1.
        stride: of the num_steps timesteps, every such one is taken.
        guidance_every: of the steps taken, every such one evaluates the unconditional branch; the others keep its distance from the
            conditional one.
        batch_size: pictures in one call of the sampler, or trajectories on the belt; None is `pictures_at_once`.
    """

    num_steps: int
    guidance_scale: float
    size: Size
    sampler: str = "ddim"
    spacing: TimestepSpacing | None = None
    guidance_rescale: float = 0.0
    stride: int = 1
    guidance_every: int = 1
    batch_size: int | None = None

    @property
    def num_calls(self) -> int:
        """Steps that are taken."""
        return -(-self.num_steps // self.stride)

    @property
    def num_evaluations(self) -> int:
        """Rows through the U-Net for a picture."""
        return self.num_calls + (0 if self.guidance_scale == 1 else -(-self.num_calls // self.guidance_every))

    def of(self, prompt: PromptSpec) -> "SamplingConfig":
        """As this prompt is sampled."""
        return replace(
            self,
            num_steps=prompt.num_steps or self.num_steps,
            guidance_scale=self.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale,
            size=size_of(prompt, self.size),
        )

    def pictures_at_once(self, model: DiffusionModel, size: Size) -> int:
        """Pictures of (height, width) in one call of the sampler: `batch_size`, or if that is not set, as many as are faster together and,
        on a GPU, fit into the memory that is free now."""
        if self.batch_size is not None:
            return self.batch_size
        positions = size[0] * size[1] // model.spec.vae_scale_factor**2
        fit = SAMPLED_LATENTS // positions
        if model.device.type == "cuda":
            kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # by torch, for tensors to come
            free = torch.cuda.mem_get_info(model.device)[0] + kept
            fit = min(fit, free // (positions * model.dtype.itemsize * SAMPLED_BYTES))
        return max(1, min(MOST_SAMPLED, fit))


def variations(sampling: SamplingConfig, words: Sequence[str]) -> dict[str, SamplingConfig]:
    """Of words such as guidance_scale=3,8 or sampler=euler_a: each value in the place of this sampling's own, by its name.

    Raises:
        UserError: other settings than guidance_scale, num_steps and sampler, or values that they do not take.
    """
    found = {}
    for word in words:
        name, _, values = word.partition("=")
        for value in values.split(","):
            try:
                changed = {"guidance_scale": float, "num_steps": int, "sampler": str}[name](value)
            except (KeyError, ValueError):
                changed = 0
            if not (changed in SOLVERS if isinstance(changed, str) else changed >= 1):
                raise UserError(
                    f"{word!r} is no way of sampling; give guidance_scale, num_steps or sampler and its values, for example "
                    f"guidance_scale=3,8; samplers are {', '.join(SOLVERS)}"
                )
            found[f"{name} {value}"] = replace(sampling, **{name: changed})
    return found


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal noise [B, *shape] on the CPU, row i from seeds[i] alone, and the generators to draw on from."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return _draw(generators, shape), generators


def model_autocast(model: DiffusionModel) -> AbstractContextManager:
    """Autocast to a half-precision model's type; nothing for any other model."""
    if model.dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(model.device.type, dtype=model.dtype)
    return nullcontext()


@torch.no_grad()
def sample(
    model: DiffusionModel,
    network: LoRANetwork | None,
    prompts: Sequence[PromptSpec],
    seeds: Sequence[int],
    multipliers: Tensor | Sequence[float] | float = 1.0,
    *,
    sampling: SamplingConfig,
    encoder: PromptEncoder | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Denoise N samples from pure noise to clean latents.

    Args:
        network: applied to both branches of the guidance; None samples the plain model. Its multiplier is put back after.
        prompts, seeds: N of each. All prompts of one call have one size and number of steps.
        multipliers: of the network, one a sample [N] or one for all.
        encoder: where the texts' encodings are kept; None encodes them here.
        progress: called with the number of samples that went one step further, N * num_calls in all.

    Returns:
        Scaled clean latents [N, C, h, w], float32, on the model's device.

    Raises:
        UserError: there is no such solver or spacing, or too many steps for it; guidance for a model that takes it as an input.
    """
    count = len(prompts)
    assert len(seeds) == count, "one seed a prompt"
    (size, num_steps), *others = {(own.size, own.num_steps) for own in map(sampling.of, prompts)}
    assert not others, "one size and number of steps a call"
    sampling = replace(sampling, size=size, num_steps=num_steps)
    strengths = torch.as_tensor(multipliers, dtype=torch.float32).flatten().expand(count)
    encoder = encoder or PromptEncoder(model, network)
    batches = []
    at_once = sampling.pictures_at_once(model, size)
    for start in range(0, count, at_once):
        rows = slice(start, start + at_once)
        with network_at(network, strengths[rows].to(model.device)), model_autocast(model), model.uncompiled():
            batches.append(_sample_batch(model, prompts[rows], seeds[rows], strengths[rows].tolist(), sampling, encoder, progress))
    return torch.cat(batches)


@torch.no_grad()
def decode(model: DiffusionModel, latents: Tensor, tiny: Autoencoder | None = None) -> Tensor:
    """Pixels [N, 3, H, W] of latents [N, C, h, w], float32 on the CPU: 0..1, not clamped, so that clipping can be measured.

    No more than `DECODED_PIXELS` in a call: the decoder's activations are a run's peak of memory.
    `tiny` decodes in place of the model's VAE, whose latents it reads.
    """
    pixels = latents.shape[2] * latents.shape[3] * model.spec.vae_scale_factor**2
    batches = latents.split(max(1, DECODED_PIXELS // pixels))
    if tiny is not None:
        decoded = [decode_latents(tiny, batch.to(tiny.device)).cpu() for batch in batches]
    else:
        with model.vae_at_work():
            decoded = [model.decode_latents(batch.to(model.device)).cpu() for batch in batches]
    return torch.cat(decoded) / 2 + 0.5


def guidance_scales(model: DiffusionModel, prompts: Sequence[PromptSpec], default: float) -> Tensor:
    """The scale of classifier-free guidance of each prompt [B], on the model's device; `default` for those that do not bring their own.

    Raises:
        UserError: the model's U-Net takes the scale as an input, so that guidance by two branches would come on top.
    """
    scales = [default if prompt.guidance_scale is None else prompt.guidance_scale for prompt in prompts]
    if model.embeds_guidance and any(scale != 1 for scale in scales):
        raise UserError(
            f"{model.spec.name} takes its guidance scale as an input, the same for every prompt, so guidance of "
            f"{max(scales, key=lambda scale: abs(scale - 1)):g} would come on top; set it to 1 and take it out of the prompts."
        )
    return upload(torch.tensor(scales, dtype=torch.float32), model.device)


def predict_branches(
    model: DiffusionModel, latents: Tensor, timesteps: Tensor, cond: Conditioning, uncond: Conditioning | None
) -> tuple[Tensor, Tensor | None]:
    """The conditional prediction [B, C, h, w] and the unconditional one, or None without `uncond`; one U-Net call."""
    if uncond is None:
        return model.predict_eps(latents, timesteps, cond), None
    both = model.predict_eps(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), Conditioning.cat([uncond, cond]))
    uncond_eps, cond_eps = both.chunk(2)
    return cond_eps, uncond_eps


def guide(
    model: DiffusionModel, latents: Tensor, timesteps: Tensor, cond_eps: Tensor, uncond_eps: Tensor | None, scales: Tensor, rescale: float
) -> Tensor:
    """The prediction along which a sampler goes [B, C, h, w], from that of each branch; `cond_eps` itself where there is no other.

    Args:
        latents: [B, C, h, w]. timesteps: [B].
        scales: of guidance [B].
        rescale: phi of `solvers.rescale_guidance`.
    """
    if uncond_eps is None:
        return cond_eps
    eps = guided_eps(uncond_eps, cond_eps, scales)
    if rescale == 0:
        return eps
    abar, prediction_type = model.schedule.abar(timesteps), model.spec.prediction_type
    return rescale_guided_eps(eps, cond_eps, rescale, latents=latents, abar=abar, prediction_type=prediction_type)


def _sample_batch(
    model: DiffusionModel,
    prompts: Sequence[PromptSpec],
    seeds: Sequence[int],
    strengths: Sequence[float],
    sampling: SamplingConfig,
    encoder: PromptEncoder,
    progress: Callable[[int], object] | None,
) -> Tensor:
    count, device, size, solver = len(prompts), model.device, sampling.size, SOLVERS[sampling.sampler]
    model.check_size(size)
    shape = (model.spec.latent_channels, size[0] // model.spec.vae_scale_factor, size[1] // model.spec.vae_scale_factor)
    scales = guidance_scales(model, prompts, sampling.guidance_scale)
    cond = encoder.cond(prompts, size, strengths)
    uncond = encoder.uncond(prompts, size, strengths) if bool((scales != 1).any()) else None
    noise, generators = initial_noise(seeds, shape)
    latents = noise.to(device)
    schedule = solver.schedule(model.schedule)
    timesteps = schedule.inference_timesteps(sampling.num_steps, sampling.spacing, shape[1:]).to(device)
    timesteps = torch.cat([timesteps[:-1][:: sampling.stride], timesteps[-1:]])
    history: History | None = None
    seldom = Sparse(distances=torch.zeros_like(latents))  # the unconditional branch
    for call, (now, after) in enumerate(zip(timesteps[:-1], timesteps[1:], strict=True)):
        now, after = now.expand(count), after.expand(count)
        cond_eps, uncond_eps = predict_branches(model, latents, now, cond, uncond if call % sampling.guidance_every == 0 else None)
        if uncond is not None:
            uncond_eps = seldom.complete(cond_eps, uncond_eps)
        eps = guide(model, latents, now, cond_eps, uncond_eps, scales, sampling.guidance_rescale)
        noise = _draw(generators, shape).to(device) if solver.needs_noise else None
        abar = schedule.abar(now)
        moved = solver.step(latents, eps, abar, schedule.abar(after), noise, history)
        latents, history = moved, solver.remember(latents, eps, abar)
        if progress is not None:
            progress(count)
    return latents


def _draw(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
