"""Models that a transformer draws by flow matching, from the hidden states of a language model: what Z-Image and Anima have in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise_schedule import flow_scale, per_sample
from library.errors import UserError
from library.models.base import DiffusionModel, TimeIds
from library.models.family import Component, Family
from library.types import Conditioning

logger = logging.getLogger(__name__)

PREFIXES = ("model.diffusion_model.", "net.", "")
MOST_TOKENS = 512  # of a prompt, in diffusers' pipelines

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FlowFamily(Family):
    """A family of flow-matching transformers.

    Attributes:
        tokenizers: sub-folders of a diffusers model.
        mark: a tensor of its single files, without a prefix, that no other family has.
        text_prefix: what its text encoder's tensors begin with in a file that holds everything.
    """

    denoiser: str = "transformer"
    tokenizers: tuple[str, ...] = ("tokenizer",)
    mark: str
    text_prefix: str

    def is_folder(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == self.denoiser_class and config.get("in_channels") is not None

    def text_of_folder(self, path: Path, component: Component, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
        import transformers

        return [component(transformers.Qwen3Model, path / "text_encoder", dtype)], [read_tokenizer(path / name) for name in self.tokenizers]

    def prefix_in(self, tensors: StateDict) -> str | None:
        """What the names of its transformer begin with in a single file, or None if it is not there."""
        return next((prefix for prefix in PREFIXES if prefix + self.mark in tensors), None)

    @abstractmethod
    def denoiser_of_file(self, tensors: StateDict) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The config and the tensors, under diffusers' names, of the transformer with these original names and no prefix."""

    def other_parts_of_file(self, tensors: StateDict) -> list[tuple[Any, dict[str, Any], dict[str, Tensor]]]:
        """What else stands beside the text encoder in `text_encoders`: class, config and tensors of each."""
        return []


def read_tokenizer(folder: Path) -> Any:
    """A tokenizer of transformers. Raises UserError if the folder holds none."""
    import transformers

    try:  # transformers 5 makes an empty tokenizer of a folder without files
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True) if folder.is_dir() else ()
        size = len(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:200]}); download the folder.") from error
    if size < 2:
        raise UserError(f"There is no tokenizer in {folder}; give the folder with its tokenizer.json, or vocab.json and merges.txt.")
    return tokenizer


class FlowModel(DiffusionModel):
    """A family subclasses it and says what it makes of a prompt, and how its transformer is called.

    A prompt is text: brackets weigh nothing, there are no words of textual inversion, and what is beyond `MOST_TOKENS` tokens is cut off.
    """

    size_step = 16  # patches of 2 x 2 latents

    def encode_prompts(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, time_ids: Sequence[TimeIds] | None = None
    ) -> Conditioning:
        assert self.text_encoders, "the text encoders were freed"
        return self._encode(list(prompts))

    def expect_prompts(self, prompts: Sequence[str]) -> None:
        assert self.tokenizers, "the text encoders were freed"
        for prompt in prompts:
            if len(self.tokenizers[0](prompt).input_ids) > MOST_TOKENS:
                logger.warning("what is beyond %d tokens is cut off, in %r", MOST_TOKENS, f"{prompt[:100]}...")

    def _tokens(self, prompts: list[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
        """Ids and mask, both [B, T], as long as the longest prompt; a row has one token at least."""
        found = tokenizer(prompts, padding="longest", max_length=MOST_TOKENS, truncation=True, padding_side="right", return_tensors="pt")
        ids, mask = found.input_ids.long(), found.attention_mask.long()
        if ids.shape[1] == 0:  # nothing but empty prompts
            ids, mask = ids.new_zeros(len(prompts), 1), mask.new_zeros(len(prompts), 1)
        return ids, mask

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Prompts -> conditioning of as many rows, as long as the longest."""

    @abstractmethod
    def _velocity(self, latents: Tensor, share: Tensor, cond: Conditioning) -> Tensor:
        """eps - x0 [B, C, h, w] that the transformer sees in flow-matching latents [B, C, h, w], in its dtype, at s [B]."""

    def _output(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        scale = per_sample(flow_scale(self.schedule.abar(timesteps)), latents)
        return self._velocity((latents * scale).to(self.dtype), (timesteps + 1) / len(self.schedule), cond)

    def set_attention(self, name: str) -> None:
        if name not in ("sdpa", "xformers"):
            raise UserError(f"There is no attention {name!r}; use sdpa or xformers.")
        if name == "xformers":
            logger.warning("xformers is for models with a U-Net; sdpa is used instead.")
