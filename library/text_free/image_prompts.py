"""Train on pictures in place of prompts: their embeddings become conditioning, everything else stays as it is."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel
from library.rollouts.prompt_encoder import PromptEncoder, Size
from library.scorers.base import Scorer
from library.settings.options import option
from library.text_free.adapter import ImagePromptAdapter, check_adapter_fits, load_adapter, text_encoder_fingerprint
from library.text_free.clip_pair import ClipPair, find_pictures
from library.types import Conditioning, PromptSpec
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)
PREFIX = "image:"
MOST_PICTURES = 1000  # of image_prompts, evenly over the folder


@dataclass(frozen=True, kw_only=True)
class TextFreeConfig:
    """Pictures in place of training prompts; docs/text_free.md."""

    image_prompts: Path | None = option(
        None, help="Folder or table of pictures to train the score on in place of prompts_file, by which the slider is then only measured."
    )
    image_prompt_adapter: Path | None = option(
        None, help="Adapter that tools/train_image_prompt_adapter.py made for this model.", only_with="image_prompts"
    )
    clip_model: Path | None = option(None, help="Folder of the CLIP that the adapter was trained with.", only_with="image_prompts")

    def __post_init__(self) -> None:
        if self.image_prompts is not None and (self.image_prompt_adapter is None or self.clip_model is None):
            raise UserError(
                "image_prompts needs image_prompt_adapter and clip_model: the adapter that tools/train_image_prompt_adapter.py made, "
                "and the folder of the CLIP that it was made with"
            )


class ImagePromptEncoder(PromptEncoder):
    """Answers the texts that stand for pictures from their embeddings, and every other text as before.

    Only the embeddings are kept: an adapter's pass is nothing beside the U-Net's, and encodings of thousands of pictures are gigabytes.

    Args:
        points: of the adapter's input [P], by the texts that stand for them.
    """

    def __init__(
        self, model: DiffusionModel, network: LoRANetwork | None, adapter: ImagePromptAdapter, points: Mapping[str, Tensor]
    ) -> None:
        super().__init__(model, network)
        self._adapter = adapter.to(model.device)
        self._points = dict(points)

    def expect(self, prompts: Sequence[PromptSpec]) -> None:
        """See the base class; a picture's name is not read, however long it is."""
        super().expect([replace(prompt, prompt="") if prompt.prompt in self._points else prompt for prompt in prompts])

    @torch.no_grad()
    def encode(self, texts: Sequence[str], size: Size, multipliers: Sequence[float] | None = None) -> Conditioning:
        """See the base class; multipliers concern written texts only."""
        shown = [row for row, text in enumerate(texts) if text in self._points]
        if not shown:
            return super().encode(texts, size, multipliers)
        written = [row for row, text in enumerate(texts) if text not in self._points]
        parts = [self._of_pictures([texts[row] for row in shown], size)]
        if written:
            own = None if multipliers is None else [multipliers[row] for row in written]
            parts.append(super().encode([texts[row] for row in written], size, own))
        order = [*shown, *written]
        return Conditioning.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]

    def _expect(self, texts: Sequence[str]) -> None:
        super()._expect([text for text in texts if text not in self._points])

    def _of_pictures(self, names: Sequence[str], size: Size) -> Conditioning:
        device = self._model.device
        points = torch.stack([self._points[name] for name in names]).to(device)
        with torch.autocast(device.type, enabled=False):
            cond = self.lengthen(self._adapter(points).to(dtype=self._model.dtype))
        return replace(cond, time_ids=self._model.time_ids(len(names), size, device=device))


def encoder_and_prompts(
    config: TextFreeConfig,
    model: DiffusionModel,
    network: LoRANetwork,
    scorers: Sequence[Scorer],
    prompts: Sequence[PromptSpec],
) -> tuple[PromptEncoder, list[PromptSpec]]:
    """The run's encoder, and what its trajectories begin from: `prompts`, or pictures in their place.

    Call it while the text encoders are there, and with the network already built.

    Raises:
        UserError: no pictures, an adapter for another model or CLIP, or parts of the run that cannot do without texts.
    """
    if config.image_prompts is None:
        return PromptEncoder(model, network), list(prompts)
    _check_nothing_needs_text(network, scorers)
    assert config.image_prompt_adapter is not None and config.clip_model is not None
    adapter, clip = load_adapter(config.image_prompt_adapter), ClipPair.load(config.clip_model).to(model.device)
    check_adapter_fits(adapter, text_encoder_fingerprint(model), clip.fingerprint())
    found = dict(clip.embed_pictures(find_pictures(config.image_prompts, MOST_PICTURES)))
    if not found:
        raise UserError(f"none of the pictures in {config.image_prompts} can be read; give others")
    if not adapter.knows_pictures:
        raise UserError("this image_prompt_adapter was trained without pictures, so it does not know their mean; train it with --pictures")
    points = adapter.of_pictures(torch.stack(list(found.values())))
    named = {f"{PREFIX}{picture.key}": point for picture, point in zip(found, points, strict=True)}
    logger.info("trajectories begin from %d pictures of %s", len(found), config.image_prompts)
    return ImagePromptEncoder(model, network, adapter, named), [PromptSpec(prompt=name) for name in named]


def _check_nothing_needs_text(network: LoRANetwork, scorers: Sequence[Scorer]) -> None:
    if network.text_encoder_loras:
        raise UserError("image_prompts bypass the text encoders, so their LoRA would learn nothing; set network_train_unet_only")
    if not scorers:
        raise UserError("image_prompts are what a score is trained on, and scorer is not set; set it, or leave image_prompts out")
    for scorer in scorers:
        if scorer.spec.uses_prompt and scorer.spec.kind == "pixel":
            raise UserError(f"scorer {scorer.name} reads the prompt's text, and image_prompts have none; use one that does not")
