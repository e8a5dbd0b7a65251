"""A diffusion model as the rest of the program sees it: prompts -> conditioning, latents -> eps, pictures <-> latents."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.diffusion.noise_schedule import NoiseSchedule, PredictionType, v_to_eps
from library.errors import UserError
from library.models.prompt_syntax import apply_weights, read_as_text, tokenize
from library.models.vae import LatentSpace, VaeFingerprint, decode_latents, encode_images, move, place_vae
from library.models.vae_slices import in_slices
from library.types import Conditioning

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TimeIds = tuple[int, int, int, int, int, int]
"""What SDXL is given of a picture: (original height, original width, crop top, crop left, height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is known about a model without its weights.

    Attributes:
        family: a name in `registry.FAMILIES`.
        prediction_type: what the U-Net puts out; `DiffusionModel.predict_eps` hides it.
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


@dataclass(frozen=True, kw_only=True)
class TextEncoderSlot:
    """Where a family keeps one of its text encoders.

    Attributes:
        folder, tokenizer_folder: sub-folders of a diffusers model.
        class_name: the class in transformers.
        prefix: what its tensors' names begin with in a single file.
        open_clip: whether the single file has OpenCLIP's names (else Hugging Face's).
        pad_token: of the tokenizer.
    """

    folder: str
    tokenizer_folder: str
    class_name: str
    prefix: str
    open_clip: bool
    pad_token: str

    @staticmethod
    def of_clip(prefix: str) -> TextEncoderSlot:
        """OpenAI's CLIP, a model's first text encoder."""
        return TextEncoderSlot(
            folder="text_encoder",
            tokenizer_folder="tokenizer",
            class_name="CLIPTextModel",
            prefix=prefix,
            open_clip=False,
            pad_token="<|endoftext|>",
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that loading needs to know about a family; a file in families/ makes one and registers it.

    Attributes:
        name, title: for options, for messages.
        model_class: the DiffusionModel subclass.
        config_file: the published configs (JSON) by component: unet, vae, text_encoder, (text_encoder_2,) scheduler.
        pipeline_class: _class_name in a diffusers folder's model_index.json.
        linear_projection: use_linear_projection of its U-Net; tells SD2 from SD1 in a diffusers folder.
        has_turbo: whether Stability published a Turbo checkpoint of it, distilled at 512 pixels.
        heads_per_level: whether every level has this many attention heads (SD1: 8), or None when heads are 64 channels wide.
        text_encoders: its text encoders, in the order in which the U-Net expects them.
        versions: (ss_base_model_version, modelspec.architecture) of its LoRAs by prediction type.
        implementation: modelspec.implementation of its LoRAs.
    """

    name: str
    title: str
    model_class: type[DiffusionModel]
    config_file: Path
    pipeline_class: str
    linear_projection: bool
    has_turbo: bool
    heads_per_level: int | None
    text_encoders: tuple[TextEncoderSlot, ...]
    versions: Mapping[PredictionType, tuple[str, str]]
    implementation: str

    def spec(
        self, *, prediction_type: PredictionType, unet: UNet2DConditionModel, vae: AutoencoderKL, name: str, scheduler: str = ""
    ) -> ModelSpec:
        version, architecture = self.versions[prediction_type]
        latent_space = LatentSpace.of(vae)
        return ModelSpec(
            family=self.name,
            prediction_type=prediction_type,
            latent_space=latent_space,
            resolution=unet.config["sample_size"] * latent_space.downsampling,
            base_model_version=version,
            architecture=architecture,
            implementation=self.implementation,
            name=name,
            scheduler=scheduler,
        )


class DiffusionModel(ABC):
    """A latent diffusion model with a U-Net. A family subclasses it and says how prompts are encoded and what else the U-Net is given.

    Attributes:
        spec, schedule: what the model is; what its timesteps mean.
        unet, vae: diffusers modules.
        text_encoders, tokenizers: lists, in the order in which the U-Net expects them; empty after `free_text_encoders`.
        clip_skip: as sd-scripts means it: the clip_skip-th hidden state from the end; None is the family's own. Set by `set_clip_skip`.
        embedded_guidance: the guidance scale of a U-Net that takes it as an input (`embeds_guidance`); 1 is none.
        prompt_chunks: prompts are encoded as at least this many chunks of 75 tokens; raised by `expect_prompts`.
        embeddings: words of textual inversion, in lower case: the places of their tokens behind the tokenizer's.
        num_unet_evaluations: rows that the U-Net has predicted so far; one with gradient counts 3, for its backward pass is about two.
        told_size: whether the U-Net is told the picture's size and crop.
    """

    told_size = False

    def __init__(
        self,
        *,
        spec: ModelSpec,
        schedule: NoiseSchedule,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoders: Sequence[PreTrainedModel],
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

    def encode_prompts(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, time_ids: Sequence[TimeIds] | None = None
    ) -> Conditioning:
        """Prompts -> conditioning of as many rows, on the model's device and in the text encoders' dtype.

        All rows are as long as the longest prompt needs, and at least `prompt_chunks` chunks of 77 tokens; the pooled embedding is
        that of the first chunk.

        Args:
            prompts: of any length, with A1111's weights (`library.models.prompt_syntax`).
            size, time_ids: see `time_ids`.
        """
        assert self.text_encoders, "the text encoders were freed"
        count, texts, pooled = len(prompts), [], None
        for text_encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            ids, weights = self._tokenize(prompts, tokenizer, text_encoder)  # [N, B, 77]
            with self._fetched(text_encoder):
                # chunk after chunk: a LoRA's multipliers, one a prompt, are repeated for each
                hidden, pooled = self._hidden_states(text_encoder, ids.flatten(0, 1).to(text_encoder.device))
            hidden = apply_weights(hidden, weights.flatten(0, 1))
            texts.append(hidden.unflatten(0, (-1, count)).transpose(0, 1).flatten(1, 2))  # [B, N * 77, D]
        text = torch.cat(texts, dim=-1)
        return Conditioning(text, None if pooled is None else pooled[:count], self.time_ids(count, size, time_ids, text.device))

    def expect_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `prompt_chunks` to what these prompts need, so that their conditionings can be joined with each other's.

        What other programs would read in them and this one takes for text is named in a warning.
        """
        assert self.tokenizers, "the text encoders were freed"
        for name, prompt in read_as_text(prompts, self.embeddings).items():
            logger.warning("%s is read as text, in %r", name, prompt if len(prompt) < 100 else f"{prompt[:100]}...")
        if prompts:
            self.prompt_chunks = len(self._tokenize(prompts, self.tokenizers[0], self.text_encoders[0])[0])

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

    @abstractmethod
    def _hidden_states(self, text_encoder: Any, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the U-Net reads of a text encoder's output for [B, 77] tokens: [B, 77, D], and the pooled embedding [B, P] if it has one."""

    @abstractmethod
    def _added_cond(self, cond: Conditioning) -> dict[str, Tensor] | None:
        """What the U-Net takes as added_cond_kwargs."""

    def set_clip_skip(self, clip_skip: int) -> None:
        """1 is the text encoder's last hidden state, 2 the last but one, ...

        Raises:
            UserError: the text encoder has fewer layers, or the family has no choice.
        """
        layers = self.text_encoders[0].config.num_hidden_layers
        if not 1 <= clip_skip <= layers:
            raise UserError(f"clip_skip must be from 1 to {layers}, the number of the text encoder's layers, not {clip_skip}.")
        self.clip_skip = clip_skip

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def predict_eps(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """The noise that the U-Net sees in the latents, whatever its prediction type.

        Args:
            latents: variance-preserving, [B, C, h, w] float32; only what the U-Net reads is rounded to its dtype.
            timesteps: [B], integers or floats in 0..T-1, each sample its own.
            cond: B rows.

        Returns:
            eps [B, C, h, w] float32, with gradient wherever the caller allows it. Autocast is the caller's.
        """
        assert len(cond) == latents.shape[0] == timesteps.shape[0], (len(cond), latents.shape, timesteps.shape)
        timesteps = timesteps.to(latents.device)
        output = self.unet(
            latents.to(self.dtype),
            timesteps,
            cond.text.to(self.dtype),
            timestep_cond=self._guidance_embedding(len(latents)),
            added_cond_kwargs=self._added_cond(cond),
            return_dict=False,
        )[0].float()
        self.num_unet_evaluations += len(latents) * (3 if output.requires_grad else 1)
        if self.spec.prediction_type == "v_prediction":
            return v_to_eps(latents, output, self.schedule.abar(timesteps))
        return output

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """The U-Net is called as it is within the block: pictures that are measured come in many numbers of rows, and `torch.compile` would
        compile it for each."""
        compiled, self.unet._compiled_call_impl = self.unet._compiled_call_impl, None
        try:
            yield
        finally:
            self.unet._compiled_call_impl = compiled

    @property
    def embeds_guidance(self) -> bool:
        """Whether the U-Net was distilled together with guidance and takes the scale as an input (`embedded_guidance`): then guidance by
        two branches comes on top, where nothing expects it."""
        return self.unet.config["time_cond_proj_dim"] is not None

    def _guidance_embedding(self, rows: int) -> Tensor | None:
        """[rows, D] of `embedded_guidance`, or None; arXiv 2310.04378, section 4.2, scaled as in diffusers' pipelines."""
        if not self.embeds_guidance:
            return None
        from diffusers.models.embeddings import get_timestep_embedding

        scales = torch.full((rows,), self.embedded_guidance - 1, device=self.device)  # the paper's w is 0 without guidance
        return get_timestep_embedding(1000 * scales, self.unet.config["time_cond_proj_dim"]).to(self.dtype)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """See `library.models.vae.encode_images`."""
        with self.vae_at_work():
            return self._without_overflow(encode_images, pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `library.models.vae.decode_latents`."""
        with self.vae_at_work():
            return self._without_overflow(decode_latents, latents)

    def _without_overflow(self, compute: Callable[[AutoencoderKL, Tensor], Tensor], given: Tensor) -> Tensor:
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
        """Of the U-Net and the VAE: recompute activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def set_attention(self, name: str) -> None:
        """How the U-Net computes attention: "sdpa" (PyTorch's own, the default) or "xformers", with sdpa where that cannot be had.

        Raises:
            UserError: another name.
        """
        if name not in ("sdpa", "xformers"):
            raise UserError(f"There is no attention {name!r}; use sdpa or xformers.")
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.unet.set_attn_processor(AttnProcessor2_0())  # diffusers' "default" is one of its own, which holds tokens x tokens numbers
        if name == "xformers":
            try:
                self.unet.enable_xformers_memory_efficient_attention()
            except (ModuleNotFoundError, ValueError) as error:  # not installed (pip install xformers); no GPU
                logger.warning("xformers cannot be used (%s); sdpa is used instead.", str(error).splitlines()[0])

    def _tokenize(self, prompts: Sequence[str], tokenizer: Any, text_encoder: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Token ids and their weights, both [N, B, 77], on the CPU."""
        length = text_encoder.config.max_position_embeddings
        return tokenize(prompts, tokenizer, length, min_chunks=self.prompt_chunks, embeddings=self.embeddings)
