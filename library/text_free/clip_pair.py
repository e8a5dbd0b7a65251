"""CLIP's two towers: texts and pictures as points of one space."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.models.clip_tokenizer import build_clip_tokenizer
from library.models.vae import probe_picture
from library.scorer_data.pictures import read_picture, to_pixels
from library.scorer_data.readers.recognition import read_records
from library.scorer_data.records import FilePicture, Picture, RatedImage, Skipped, SkipReport
from library.scorers.image_models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from library.scorers.image_models.weight_files import folder_preprocessing, load_transformers
from library.text_free.adapter import PROBE_PROMPT, Fingerprint

if TYPE_CHECKING:
    from transformers import CLIPModel

logger = logging.getLogger(__name__)


class ClipPair(nn.Module):
    """A frozen CLIP model (arXiv 2103.00020): embeddings [B, P] of unit length, in which a picture lies near the texts that describe it.

    SD1's text encoder is the text tower of openai/clip-vit-large-patch14; any other CLIP does as well, for any diffusion model,
    because an adapter learns the way from its embeddings to the diffusion model's own encodings.
    """

    def __init__(self, clip: CLIPModel, tokenizer: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.preprocessing = clip, tokenizer, preprocessing
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path) -> ClipPair:
        """Read a CLIPModel's folder as transformers writes it; without tokenizer files, CLIP's own tokenizer is taken.

        Raises:
            UserError: the folder holds no whole CLIPModel.
        """
        from transformers import CLIPModel, CLIPTokenizer

        clip: Any = load_transformers(CLIPModel, str(folder))
        has_tokenizer = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else build_clip_tokenizer()
        colours = folder_preprocessing(str(folder), Preprocessing(mean=CLIP_MEAN, std=CLIP_STD))
        return cls(clip, tokenizer, Preprocessing(size=clip.config.vision_config.image_size, mean=colours.mean, std=colours.std))

    @property
    def dim(self) -> int:
        """P, the width of the space."""
        config: Any = self.clip.config
        return config.projection_dim

    @property
    def device(self) -> torch.device:
        return self.clip.device

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B, P]; what is beyond the text tower's length is cut off."""
        config: Any = self.clip.config
        length = config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # Padding is behind the end, where a causal text tower does not look from.
        pooled = self.clip.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in -1..1, any size -> unit vectors [B, P]. The whole picture is squeezed into CLIP's square."""
        views = self.preprocessing((pixels.to(self.device) / 2 + 0.5).clamp(0, 1))[:, 0]
        return F.normalize(self.clip.visual_projection(self.clip.vision_model(pixel_values=views).pooler_output), dim=-1)

    def embed_pictures(self, pictures: Iterable[Picture], batch_size: int = 16) -> Iterator[tuple[Picture, Tensor]]:
        """(picture, unit vector [P] on the CPU) of every picture that can be read; a warning counts the others."""
        skips = SkipReport()
        readable, size = self._readable(pictures, skips), self.preprocessing.size
        while batch := list(islice(readable, batch_size)):
            squares = [picture.resize((size, size), Image.Resampling.BICUBIC) for _, picture in batch]
            for (where, _), embedding in zip(batch, self.embed_pixels(to_pixels(squares)).cpu(), strict=True):
                yield where, embedding
        skips.log(logger)

    def fingerprint(self) -> Fingerprint:
        """Of both towers."""
        return Fingerprint.of(torch.cat([self.embed_texts([PROBE_PROMPT]), self.embed_pixels(probe_picture())]))

    @staticmethod
    def _readable(pictures: Iterable[Picture], skips: SkipReport) -> Iterator[tuple[Picture, Image.Image]]:
        for where in pictures:
            try:
                yield where, read_picture(where)
            except UserError as error:
                skips.add(Skipped(str(error), "pictures that cannot be read"))


def find_pictures(source: Path, limit: int) -> list[Picture]:
    """At most `limit` pictures of a folder (with its sub-folders) or of a table of rated pictures, evenly over it.

    Raises:
        UserError: there is no such folder or file, or no picture in it.
    """
    if source.is_dir():
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in Image.registered_extensions())
        pictures: list[Picture] = [FilePicture(str(file.absolute())) for file in files]
    elif source.is_file():
        pictures = [record.picture for record in read_records(source) if isinstance(record, RatedImage)]
    else:
        raise UserError(f"there are no pictures at {source}; give a folder of pictures, or a table of them such as ratings.csv")
    if not pictures:
        raise UserError(f"{source} holds no pictures; give a folder of pictures, or a table of them such as ratings.csv")
    count = min(limit, len(pictures))
    return [pictures[index * len(pictures) // count] for index in range(count)]
