"""From prompts to conditioning: each text is encoded once, and told the picture's size."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from library.models.base import DiffusionModel, TimeIds
from library.training.runtime import upload
from library.types import Conditioning, PromptSpec
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)

Size = tuple[int, int]

MOST_KEPT = 4096  # encodings: of SDXL 2.6 GB in float32, of SD1 1 GB


class PromptEncoder:
    """Conditioning of texts, each text encoded once and kept on the CPU.

    Once every text of a run has been through it, the text encoders can be freed. Of more texts than MOST_KEPT, none is encoded ahead: each
    is when it is needed, those used last are kept, and the text encoders have to stay (`encodes_late`). A network with text encoder modules
    changes the encoding with the multiplier and with every training step: then texts are encoded anew at every call, once per multiplier.

    Whatever it returns is as long as the longest text that it is to expect needs (`expect`), so that cond and uncond can be joined:
    shorter texts end in empty chunks.

    Attributes:
        encodes_late: whether there are too many texts to encode all of them ahead.
    """

    def __init__(self, model: DiffusionModel, network: LoRANetwork | None = None) -> None:
        self._model = model
        self._network = network if network is not None and len(network.text_encoder_loras) > 0 else None
        self._rows: OrderedDict[tuple[str, float], Conditioning] = OrderedDict()  # without time_ids; those used last are at the end
        self.encodes_late = False
        self._expected: set[str] = set()
        self._empty_chunk: Tensor | None = None  # [1, 77, D], once a text has more than one
        self._warned = False

    @property
    def is_fixed(self) -> bool:
        """Whether a text's encoding stays what it is: no LoRA of the text encoders is trained."""
        return self._network is None

    @torch.no_grad()
    def encode(self, texts: Sequence[str], size: Size, multipliers: Sequence[float] | None = None) -> Conditioning:
        """Conditioning of B texts for whole pictures of (height, width) pixels, on the model's device.

        Args:
            multipliers: of the network, one a text; None is 1 for all. Only a network with text encoder modules heeds them.
        """
        self._expect(texts)
        strengths = [1.0] * len(texts) if multipliers is None or self._network is None else [float(value) for value in multipliers]
        rows = self._rows if self._network is None else OrderedDict()  # training changes what such a network makes of a text
        keys = list(zip(texts, strengths, strict=True))
        missing = sorted((key for key in dict.fromkeys(keys) if key not in rows), key=lambda key: key[1])
        for strength, group in groupby(missing, key=lambda key: key[1]):
            new = list(group)
            with network_at(self._network, strength):
                encoded = replace(self._model.encode_prompts([text for text, _ in new], size), time_ids=None).to("cpu")
            rows.update((key, encoded[[row]]) for row, key in enumerate(new))  # copies, which can be dropped one by one
        for key in keys:
            rows.move_to_end(key)
        joined = Conditioning.cat([self.lengthen(rows[key]) for key in keys])
        while len(rows) > MOST_KEPT:
            rows.popitem(last=False)
        joined = replace(joined, time_ids=self._model.time_ids(len(texts), size, device="cpu"))
        return joined.map(lambda part: upload(part, self._model.device))

    def cond(self, prompts: Sequence[PromptSpec], size: Size, multipliers: Sequence[float] | None = None) -> Conditioning:
        """Conditioning of B prompts, each told the size and crop that it brings; the rest as in `encode`."""
        self.expect(prompts)
        return self._with_time_ids(self.encode([prompt.prompt for prompt in prompts], size, multipliers), prompts, size)

    def uncond(self, prompts: Sequence[PromptSpec], size: Size, multipliers: Sequence[float] | None = None) -> Conditioning:
        """The same of their negative prompts; as long as `cond`."""
        self.expect(prompts)
        return self._with_time_ids(self.encode([prompt.negative_prompt for prompt in prompts], size, multipliers), prompts, size)

    def trained_cond(self, prompts: Sequence[PromptSpec], size: Size, multipliers: Tensor) -> Conditioning:
        """`cond` of B prompts, with gradient to the LoRA of the text encoders, if there is one, at these multipliers [B]."""
        if self._network is None:
            return self.cond(prompts, size)
        self._network.set_multiplier(multipliers)
        time_ids = [time_ids_of(prompt, size) for prompt in prompts]
        return self._model.encode_prompts([prompt.prompt for prompt in prompts], size, time_ids)

    def frozen_cond(self, prompts: Sequence[PromptSpec], cond: Conditioning) -> Conditioning:
        """What the plain text encoders make of the prompts, with the time_ids of `cond`; that is `cond` itself unless they have a LoRA."""
        if self._network is None:
            return cond
        size = (1, 1)  # of time_ids, which are replaced
        return replace(self.encode([prompt.prompt for prompt in prompts], size, [0.0] * len(prompts)), time_ids=cond.time_ids)

    def encode_ahead(self, prompts: Sequence[PromptSpec], resolution: Size, batch_size: int = 32) -> None:
        """Encode every text so that the text encoders can be freed; or set `encodes_late`. `resolution`: as in `sample`."""
        texts = list(dict.fromkeys(text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)))
        new = sum((text, 1.0) not in self._rows for text in texts)
        if self._network is None and not self.encodes_late and len(self._rows) + new > MOST_KEPT:
            logger.info("%d texts of prompts are encoded when they are needed, and the text encoders stay in memory", len(self._rows) + new)
            self.encodes_late = True
        if self.encodes_late:
            return
        self.expect(prompts)
        if self._network is not None:  # its encodings change with every step, so there is nothing to do ahead
            return
        if new:
            logger.info("encoding %d texts of prompts", new)
        for start in range(0, len(texts), batch_size):
            self.encode(texts[start : start + batch_size], resolution)

    def expect(self, prompts: Sequence[PromptSpec]) -> None:
        """From now on every conditioning is as long as the longest text of these prompts needs."""
        self._expect([text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)])
        told = any(own.original_width or own.original_height or own.crop_top or own.crop_left for own in prompts)
        if told and not (self._warned or self._model.told_size):
            logger.warning("only SDXL is told the original size and crop of a picture; those of the prompts do nothing here")
            self._warned = True

    def lengthen(self, cond: Conditioning) -> Conditioning:
        """Append empty chunks up to the length of every conditioning of this model."""
        if self._empty_chunk is None:
            return cond
        lacking = self._model.prompt_chunks - cond.text.shape[1] // self._empty_chunk.shape[1]
        empty = self._empty_chunk.to(cond.text).expand(len(cond), -1, -1)
        return replace(cond, text=torch.cat([cond.text, *[empty] * lacking], dim=1)) if lacking > 0 else cond

    @torch.no_grad()
    def _expect(self, texts: Sequence[str]) -> None:
        new = set(texts) - self._expected
        if not new:
            return
        self._expected |= new
        self._model.expect_prompts(sorted(new))
        if self._network is None and self._empty_chunk is None and self._model.prompt_chunks > 1:
            # now, while the text encoders are there
            self._empty_chunk = self._model.encode_prompts([""]).text.chunk(self._model.prompt_chunks, dim=1)[0].to("cpu")

    def _with_time_ids(self, cond: Conditioning, prompts: Sequence[PromptSpec], size: Size) -> Conditioning:
        own = [time_ids_of(prompt, size) for prompt in prompts]
        time_ids = self._model.time_ids(len(prompts), size, own, "cpu")
        return replace(cond, time_ids=None if time_ids is None else upload(time_ids, cond.text.device))


def size_of(prompt: PromptSpec, resolution: Size) -> Size:
    """(height, width) in pixels of a prompt's picture; `resolution` stands in for what the prompt leaves open."""
    return prompt.height or resolution[0], prompt.width or resolution[1]


def time_ids_of(prompt: PromptSpec, resolution: Size) -> TimeIds:
    """What SDXL is told of a prompt's picture; without a word from the prompt, that it is whole."""
    height, width = size_of(prompt, resolution)
    return prompt.original_height or height, prompt.original_width or width, prompt.crop_top, prompt.crop_left, height, width


@contextmanager
def network_at(network: LoRANetwork | None, value: float | Tensor) -> Iterator[None]:
    """The network runs at `value` inside the block, and at what it had again afterwards."""
    if network is None:
        yield
        return
    before = network.multiplier
    network.set_multiplier(value)
    try:
        yield
    finally:
        network.set_multiplier(before)
