"""A diffusion model as the rest of the program sees it: prompts -> conditioning, latents -> eps, pictures <-> latents.

The network that predicts is called `unet`, as it is in sd-scripts, whether it is one or a transformer.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from library.diffusion.noise_schedule import NoiseSchedule, PredictionType, output_to_eps
from library.errors import UserError
from library.models.vae import Autoencoder, LatentSpace, VaeFingerprint, decode_latents, encode_images, move, place_vae
from library.models.vae_slices import in_slices
from library.types import Conditioning

logger = logging.getLogger(__name__)

MOST_GRAPHS = 64  # of torch.compile, two for a picture size; beyond, torch calls the network as it is

TimeIds = tuple[int, int, int, int, int, int]
"""What SDXL is given of a picture: (original height, original width, crop top, crop left, height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is known about a model without its weights.

    Attributes:
        family: a name in `registry.FAMILIES`.
        prediction_type: what the network puts out; `DiffusionModel.predict_eps` hides it.
        latent_space: what the VAE makes.
        resolution: the native size in pixels.
        base_model_version, architecture, implementation: ss_base_model_version, modelspec.architecture and modelspec.implementation of
            a LoRA for this model, as sd-scripts writes them.
        name: the checkpoint's file or folder name.
        scheduler: the class of the scheduler that a diffusers folder brings; "" of a single file.
    """

    family: str
    prediction_type: PredictionType
    latent_space: LatentSpace
    resolution: int
    base_model_version: str
    architecture: str
    implementation: str
    name: str
    scheduler: str = ""

    @property
    def latent_channels(self) -> int:
        return self.latent_space.channels

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent."""
        return self.latent_space.downsampling


class DiffusionModel(ABC):
    """A latent diffusion model. Subclasses say how prompts are encoded and how the network is called: `unet_model`, `flow_model`.

    Attributes:
        spec, schedule: what the model is; what its timesteps mean.
        unet, vae: diffusers modules.
        text_encoders, tokenizers: lists, in the order in which the network expects them; empty after `free_text_encoders`.
        clip_skip: as sd-scripts means it: the clip_skip-th hidden state from the end; None is the family's own. Set by `set_clip_skip`.
        embedded_guidance: the guidance scale of a U-Net that takes it as an input (`embeds_guidance`); 1 is none.
        prompt_chunks: prompts are encoded as at least this many chunks of 75 tokens; raised by `expect_prompts`.
        embeddings: words of textual inversion, in lower case: the places of their tokens behind the tokenizer's.
        num_unet_evaluations: rows that the network has predicted so far; one with gradient counts 3, for its backward pass is about two.
        told_size: whether the network is told the picture's size and crop.
        trains_text: whether a LoRA can be put on its text encoders.
        size_step: sides of pictures are multiples of it, in pixels; see `check_size`.
    """

    told_size = False
    trains_text = False
    size_step = 8

    def __init__(
        self,
        *,
        spec: ModelSpec,
        schedule: NoiseSchedule,
        unet: Any,
        vae: Autoencoder,
        text_encoders: Sequence[Any],
        tokenizers: Sequence[Any],
    ) -> None:
        self.spec = spec
        self.schedule = schedule
        self.unet = unet
        self.vae = vae
        self.text_encoders = list(text_encoders)
        self.tokenizers = list(tokenizers)
        self.clip_skip: int | None = None
        self.embedded_guidance = 8.0  # of the published latent consistency models
        self.prompt_chunks = 1
        self.embeddings: dict[str, range] = {}
        self.num_unet_evaluations = 0

    @abstractmethod
    def encode_prompts(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, time_ids: Sequence[TimeIds] | None = None
    ) -> Conditioning:
        """Prompts -> conditioning of as many rows, on the model's device and in the text encoders' dtype; `size`: see `time_ids`."""

    @abstractmethod
    def expect_prompts(self, prompts: Sequence[str]) -> None:
        """Make ready for these prompts; what other programs would read in them and this one takes for text is named in a warning."""

    @abstractmethod
    def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> Any:
        """What the network reads of a text encoder's output."""

    @abstractmethod
    def _output(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """What the network puts out [B, C, h, w], as `spec.prediction_type` has it; arguments as of `predict_eps`."""

    def set_clip_skip(self, clip_skip: int) -> None:
        """1 is the text encoder's last hidden state, 2 the last but one, ...

        Raises:
            UserError: the text encoder has fewer layers, or the family has no choice.
        """
        raise UserError(f"clip_skip {clip_skip} was given, but {self.spec.name} has no CLIP; leave it out.")

    @abstractmethod
    def set_attention(self, name: str) -> None:
        """How the network computes attention: "sdpa" (PyTorch's own, the default) or "xformers", with sdpa where that cannot be had.

        Raises:
            UserError: another name.
        """

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError for (height, width) in pixels that the network cannot draw."""
        if any(side % self.size_step for side in size):
            raise UserError(
                f"{self.spec.name} draws pictures whose sides are multiples of {self.size_step} pixels; {size[1]} x {size[0]} is none."
            )

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network was distilled together with guidance and takes the scale as an input (`embedded_guidance`): then guidance by
        two branches comes on top, where nothing expects it."""
        return False

    def time_ids(
        self,
        count: int,
        size: tuple[int, int] | None = None,
        own: Sequence[TimeIds] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor | None:
        """`Conditioning.time_ids` [count, 6], or None for a family without size conditioning.

        Args:
            size: (height, width) in pixels of the pictures to be made, whole ones; None is the native size.
            own: each picture's row, in place of that.
        """
        return None

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device  # the model's own property looks at every module, and is asked for ten times a step

    @property
    def dtype(self) -> torch.dtype:
        kept = getattr(self.unet, "_keep_in_fp32_modules", None) or ()
        of_floats = (weight.dtype for name, weight in self.unet.named_parameters() if not any(part in name for part in kept))
        return next(dtype for dtype in of_floats if dtype.is_floating_point)

    def predict_eps(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """The noise that the network sees in the latents, whatever its prediction type.

        Args:
            latents: variance-preserving, [B, C, h, w] float32; only what the network reads is rounded to its dtype.
            timesteps: [B], integers or floats in 0..T-1, each sample its own.
            cond: B rows.

        Returns:
            eps [B, C, h, w] float32, with gradient wherever the caller allows it. Autocast is the caller's.
        """
        assert len(cond) == latents.shape[0] == timesteps.shape[0], (len(cond), latents.shape, timesteps.shape)
        timesteps = timesteps.to(latents.device)
        output = self._output(latents, timesteps, cond).float()
        self.num_unet_evaluations += len(latents) * (3 if output.requires_grad else 1)
        return output_to_eps(latents, output, self.schedule.abar(timesteps), self.spec.prediction_type)

    def compile(self, **settings: Any) -> None:
        """The network is compiled when it is called, with these settings of torch.compile. Two graphs, with gradient and without, serve all
        numbers of rows of a picture size: torch 2.13 cannot compile a training call of latents whose size is a variable."""
        from torch._dynamo import config, mark_static

        # else a tensor that a module holds, as the LoRA's multiplier of each row, has the shape that it was first seen with
        config.force_nn_module_property_static_shapes = False
        config.recompile_limit = MOST_GRAPHS
        self.unet.compile(dynamic=True, **settings)
        compiled = self.unet._compiled_call_impl

        def with_fixed_sizes(*args: Any, **kwargs: Any) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    mark_static(leaf, list(range(1, leaf.ndim)))
            return compiled(*args, **kwargs)

        self.unet._compiled_call_impl = with_fixed_sizes

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """The network is called as it is within the block: pictures that are measured come in many numbers of rows, and `torch.compile`
        would compile it for each."""
        compiled, self.unet._compiled_call_impl = self.unet._compiled_call_impl, None
        try:
            yield
        finally:
            self.unet._compiled_call_impl = compiled

    def encode_images(self, pixels: Tensor) -> Tensor:
        """See `library.models.vae.encode_images`."""
        with self.vae_at_work():
            return self._without_overflow(encode_images, pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `library.models.vae.decode_latents`."""
        with self.vae_at_work():
            return self._without_overflow(decode_latents, latents)

    def _without_overflow(self, compute: Callable[[Autoencoder, Tensor], Tensor], given: Tensor) -> Tensor:
        """What the VAE makes, in float32 from now on if half precision is too narrow for it, which would be black pictures."""
        made = compute(self.vae, given)
        if self.vae.dtype == torch.float32 or bool(made.isfinite().all()) or not given.isfinite().all():
            return made
        logger.warning("the VAE overflows in %s, so it works in float32 from now on", str(self.vae.dtype).removeprefix("torch."))
        self.vae.register_to_config(force_upcast=True)
        place_vae(self.vae, dtype=torch.float32)
        return compute(self.vae, given)

    @contextmanager
    def vae_at_work(self) -> Iterator[None]:
        """The VAE is on the model's device within the block, and afterwards where it was; what has no gradient is computed in slices."""
        with self._fetched(self.vae), in_slices(self.vae):
            yield

    @contextmanager
    def _fetched(self, module: Any) -> Iterator[None]:
        """A module of ours is on the model's device within the block, and afterwards where it was."""
        home = module.device
        move(module, self.device)
        try:
            yield
        finally:
            move(module, home)

    def rest_vae(self) -> None:
        """Move the VAE to the CPU, from where it is fetched for its work. No gradient can be taken through it from then on."""
        move(self.vae, "cpu")

    def rest_text_encoders(self) -> None:
        """The same of the text encoders."""
        for text_encoder in self.text_encoders:
            move(text_encoder, "cpu")

    def vae_fingerprint(self) -> VaeFingerprint:
        return VaeFingerprint.of(self.vae)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DiffusionModel:
        """Move every part, in place; a VAE that is not safe in half precision stays in float32."""
        for module in (self.unet, *self.text_encoders):
            move(module, device, dtype)
        place_vae(self.vae, device, dtype)
        return self

    def freeze(self) -> DiffusionModel:
        """No parameter asks for a gradient, every part is in eval mode."""
        for module in (self.unet, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        return self

    def free_text_encoders(self) -> None:
        """Drop the text encoders and tokenizers; prompts must have been encoded before."""
        self.text_encoders.clear()
        self.tokenizers.clear()

    def enable_gradient_checkpointing(self) -> None:
        """Of the network and the VAE: recompute activations in the backward pass."""
        for part in (self.unet, self.vae):
            if part._supports_gradient_checkpointing:  # Qwen's and Wan's VAEs do not
                part.enable_gradient_checkpointing()
