"""Whether a score depends on the bucket: one content at several sizes, and on several canvases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from benchmarks.photo_crops import SIZES, colourfulness
from library.models.vae import encode_images
from library.scorer_data.pictures import to_pixels
from library.scorer_training.criteria.metrics import spearman
from library.scorers.base import BackboneScorer

SQUARES = (96, 128, 160, 192, 256)  # pixels; training saw areas of 128 x 128


@torch.no_grad()
def same_content(paths: Sequence[Path], vae: AutoencoderKL, colours: BackboneScorer) -> dict[str, Any]:
    """One content at several sizes, and on several canvases: how far colourfulness moves from its value at 128 x 128."""
    middles = [middle(path) for path in paths]

    def squares(side: int) -> list[Image.Image]:
        return [picture.resize((side, side), Image.Resampling.LANCZOS) for picture in middles]

    def scored(pictures: Sequence[Image.Image]) -> Tensor:
        chunks = to_pixels(pictures).split(16)
        return torch.cat([colours(encode_images(vae, chunk), torch.zeros(len(chunk))) for chunk in chunks])

    def judged(pictures: Sequence[Image.Image]) -> Tensor:
        return colourfulness(to_pixels(pictures) / 2 + 0.5)

    sizes = {f"{side}x{side}": squares(side) for side in SQUARES}
    canvases = {f"{width}x{height}": [mirrored_around(picture, (width, height)) for picture in squares(96)] for width, height in SIZES}
    result: dict[str, Any] = {"pictures": len(paths)}
    for name, sets in (("sizes", sizes), ("canvases", canvases)):
        for who, ask in (("scorer", scored), ("the function itself", judged)):
            result[f"{name}, {who}"] = against({size: ask(pictures) for size, pictures in sets.items()}, "128x128", colours.spec.std)
    return result


def against(columns: Mapping[str, Tensor], base: str, std: float) -> dict[str, dict[str, float]]:
    """Each column against the base: mean |difference| and mean difference in standard deviations of the score, and their SRCC."""
    result = {}
    for name, column in columns.items():
        if name != base:
            off = (column - columns[base]) / std
            moved = {"mean |difference|": off.abs().mean().item(), "mean difference": off.mean().item()}
            result[name] = {**moved, "srcc": spearman(column, columns[base])}
    return result


def middle(path: Path) -> Image.Image:
    """The square in the middle of a photograph."""
    picture = Image.open(path).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def mirrored_around(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in the middle of a canvas (width, height), continued by its mirror image."""
    across, down = size[0] - picture.width, size[1] - picture.height
    margins = ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), margins, mode="symmetric"))
