"""From pictures of any size to what a network takes, with a gradient to every pixel."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError

RESIZES = ("square", "pad", "tiles")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pictures in 0..1 are made ready. Nothing is cropped away: what a network does not see, it cannot improve.

    Attributes:
        size: side of the square that the network takes; 0 for one that takes any size, which then sees the picture as it is.
        resize: "square" squeezes the picture into it; "pad" keeps its proportions and fills up with `mean`, evenly on both sides;
            "tiles" cuts it into squares that overlap just so that they cover it, and the network's outputs are averaged.
        mean, std: of the three channels in 0..1, subtracted and divided by.
        multiply: with this last, 255 for a network that takes bytes.
        bgr: whether the network takes blue first.
    """

    size: int = 0
    resize: str = "square"
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    multiply: float = 1.0
    bgr: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, V, 3, h, w], V views of each picture."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        views = torch.stack([(view - mean) / std for view in self._views(pixels)], dim=1) * self.multiply
        return views.flip(2) if self.bgr else views

    def _views(self, pixels: Tensor) -> list[Tensor]:
        height, width = pixels.shape[-2:]
        if self.size == 0:
            return [pixels]
        if self.resize == "square":
            return [resized(pixels, self.size, self.size)]
        if self.resize == "pad":
            scale = self.size / max(height, width)
            inner = resized(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
            top, left = (self.size - inner.shape[-2]) // 2, (self.size - inner.shape[-1]) // 2
            canvas = pixels.new_tensor(self.mean).view(3, 1, 1).repeat(len(pixels), 1, self.size, self.size)
            canvas[..., top : top + inner.shape[-2], left : left + inner.shape[-1]] = inner
            return [canvas]
        scale = self.size / min(height, width)
        whole = resized(pixels, max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        return [
            whole[..., top : top + self.size, left : left + self.size]
            for top in even_starts(whole.shape[-2], self.size)
            for left in even_starts(whole.shape[-1], self.size)
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Preprocessing":
        return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as PIL resizes; unchanged where the size is right."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)


def even_starts(length: int, window: int) -> list[int]:
    """Where the fewest windows that cover a length begin, evenly spread; one window where it is as long."""
    count = max(1, math.ceil(length / window))
    return [round(index * (length - window) / max(1, count - 1)) for index in range(count)]


def take_preprocessing(options: dict[str, str], default: Preprocessing) -> dict[str, Any]:
    """The user's changes to a network's own preprocessing, taken out of its options: resize, size, mean, std, multiply, bgr.

    Raises:
        UserError: a value is not what it must be.
    """
    values = default.to_dict()
    if (resize := options.pop("resize", values["resize"])) not in RESIZES:
        raise UserError(f"image model: resize is {resize!r}; it can be {', '.join(RESIZES)}")
    values["resize"] = resize
    for key in ("size", "multiply"):
        if key in options:
            [values[key]] = _numbers(key, options.pop(key), 1)
    values["size"] = int(values["size"])
    for key in ("mean", "std"):
        if key in options:
            values[key] = _numbers(key, options.pop(key), 3)
    if "bgr" in options:
        if (answer := options.pop("bgr")) not in ("true", "false"):
            raise UserError(f"image model: bgr is {answer!r}; it can be true or false")
        values["bgr"] = answer == "true"
    if min(values["std"]) <= 0 or values["size"] < 0:
        raise UserError("image model: std must be above 0, and size not below 0")
    return values


def _numbers(key: str, text: str, count: int) -> list[float]:
    """Numbers with commas between; one stands for all."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, count) or not all(map(math.isfinite, numbers)):
        raise UserError(f"image model: {key} is {text!r}; it must be a number" + (f" or {count} with commas between" if count > 1 else ""))
    return numbers * count if len(numbers) == 1 else numbers
