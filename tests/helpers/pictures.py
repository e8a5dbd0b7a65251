"""Picture files of random colours, and judges of pictures."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def save_picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def redness(pixels: Tensor) -> Tensor:
    """A judge."""
    return pixels[:, 0].mean((1, 2))


def is_dark(pixels: Tensor) -> Tensor:
    """A judge that answers yes or no."""
    return (pixels.mean((1, 2, 3)) < 0.5).float()
