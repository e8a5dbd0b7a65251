"""Picture files as RGB pixels, whatever they are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from library.errors import UserError

_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_picture(path: Path) -> Image.Image:
    """Read a picture as 8-bit RGB.

    Turned as its EXIF says, transparency laid over white, 16-bit greys reduced to 8, CMYK converted, and of an animation the first frame.

    Raises:
        UserError: if the file is not a whole picture.
    """
    try:
        with Image.open(path) as file:
            file.load()
            picture = ImageOps.exif_transpose(file)
            if picture.mode in _SIXTEEN_BIT_MODES:
                values = np.asarray(picture).astype(np.float64)  # [H, W]
                largest = 65535 if picture.mode != "I" or values.max() > 255 else 255
                picture = Image.fromarray(np.round(values.clip(0, largest) * (255 / largest)).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {path} cannot be read: {error}") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height as seen, without decoding the picture. Raises UserError if it is none."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(_EXIF_ORIENTATION, 1) >= 5
            return (file.height, file.width) if turned else file.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {path} cannot be read: {error}") from error


def cover(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize until `size` (width, height) is just covered, keeping proportions, and cut the rest off both sides alike."""
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to pixels [B, 3, H, W] in -1..1."""
    array = np.stack([np.asarray(picture) for picture in pictures])  # [B, H, W, 3]
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0
