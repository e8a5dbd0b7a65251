"""Models with a U-Net and CLIP text encoders: Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel, TimeIds
from library.models.family import Component, Family
from library.models.prompt_syntax import apply_weights, read_as_text, tokenize
from library.types import Conditioning

logger = logging.getLogger(__name__)


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
class UNetFamily(Family):
    """A family of models with a U-Net.

    Attributes:
        linear_projection: use_linear_projection of its U-Net; tells SD2 from SD1 in a diffusers folder.
        has_turbo: whether Stability published a Turbo checkpoint of it, distilled at 512 pixels.
        heads_per_level: whether every level has this many attention heads (SD1: 8), or None when heads are 64 channels wide.
        text_encoders: its text encoders, in the order in which the U-Net expects them.
    """

    linear_projection: bool
    has_turbo: bool
    heads_per_level: int | None
    text_encoders: tuple[TextEncoderSlot, ...]

    def is_folder(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        found = {name: value[1] for name, value in index.items() if isinstance(value, list | tuple) and value[1] is not None}
        encoders = {name: part for name, part in found.items() if name.startswith("text_encoder")}
        own = {slot.folder: slot.class_name for slot in self.text_encoders}
        return (encoders, found.get("vae"), config.get("use_linear_projection", False)) == (own, "AutoencoderKL", self.linear_projection)

    def text_of_folder(self, path: Path, component: Component, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
        import transformers

        text_encoders, tokenizers = [], []
        for slot in self.text_encoders:
            text_encoders.append(component(getattr(transformers, slot.class_name), path / slot.folder, dtype))
            tokenizers.append(_tokenizer(path / slot.tokenizer_folder, text_encoders[-1].config.vocab_size))
        return text_encoders, tokenizers


def _tokenizer(folder: Path, vocab_size: int) -> Any:
    import transformers

    # transformers 5 makes an empty tokenizer of a folder without files, so what came out is checked
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True) if folder.is_dir() else ()
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens and the text encoder {vocab_size}; download the folder again."
        )
    return tokenizer


def check_unet(model: DiffusionModel, what: str) -> None:
    """Raises UserError if the model has a transformer in the place of a U-Net."""
    if not isinstance(model, UNetModel):
        raise UserError(f"{what} needs a model with a U-Net and CLIP, and {model.spec.name} has a transformer; give Stable Diffusion's.")


class UNetModel(DiffusionModel):
    """A family subclasses it and says how prompts are encoded and what else the U-Net is given."""

    trains_text = True

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

    @abstractmethod
    def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the U-Net reads of a text encoder's output for [B, 77] tokens: [B, 77, D], and the pooled embedding [B, P] if it has one."""

    @abstractmethod
    def _added_cond(self, cond: Conditioning) -> dict[str, Tensor] | None:
        """What the U-Net takes as added_cond_kwargs."""

    def set_clip_skip(self, clip_skip: int) -> None:
        layers = self.text_encoders[0].config.num_hidden_layers
        if not 1 <= clip_skip <= layers:
            raise UserError(f"clip_skip must be from 1 to {layers}, the number of the text encoder's layers, not {clip_skip}.")
        self.clip_skip = clip_skip

    def _output(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return self.unet(
            latents.to(self.dtype),
            timesteps,
            cond.text.to(self.dtype),
            timestep_cond=self._guidance_embedding(len(latents)),
            added_cond_kwargs=self._added_cond(cond),
            return_dict=False,
        )[0]

    @property
    def embeds_guidance(self) -> bool:
        return self.unet.config["time_cond_proj_dim"] is not None

    def _guidance_embedding(self, rows: int) -> Tensor | None:
        """[rows, D] of `embedded_guidance`, or None; arXiv 2310.04378, section 4.2, scaled as in diffusers' pipelines."""
        if not self.embeds_guidance:
            return None
        from diffusers.models.embeddings import get_timestep_embedding

        scales = torch.full((rows,), self.embedded_guidance - 1, device=self.device)  # the paper's w is 0 without guidance
        return get_timestep_embedding(1000 * scales, self.unet.config["time_cond_proj_dim"]).to(self.dtype)

    def set_attention(self, name: str) -> None:
        if name not in ("sdpa", "xformers"):
            raise UserError(f"There is no attention {name!r}; use sdpa or xformers.")
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.unet.set_attn_processor(AttnProcessor2_0())  # diffusers' "default" is one of its own, which holds tokens x tokens numbers
        if name == "xformers":
            try:
                self.unet.enable_xformers_memory_efficient_attention()
            except (ModuleNotFoundError, ValueError) as error:  # not installed (pip install xformers); no GPU
                logger.warning("xformers cannot be used (%s); sdpa is used instead.", str(error).splitlines()[0])

    def _tokenize(self, prompts: Sequence[str], tokenizer: Any, text_encoder: Any) -> tuple[Tensor, Tensor]:
        """Token ids and their weights, both [N, B, 77], on the CPU."""
        length = text_encoder.config.max_position_embeddings
        return tokenize(prompts, tokenizer, length, min_chunks=self.prompt_chunks, embeddings=self.embeddings)
