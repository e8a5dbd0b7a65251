"""Pictures as RGB pixels, whatever they are."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from library.errors import UserError
from library.scorer_data.records import Picture

EXIF_ORIENTATION = 0x0112
MOST_PIXELS = 1 << 26  # 8192 x 8192, 200 MB as RGB: a file of 20 kB can claim more than any training shows of it
LEAST_SIDE = 2  # pixels: 1 x 1 stands for a picture that was not there when it was downloaded
DRAFT = (4096, 4096)  # a JPEG beyond MOST_PIXELS is decoded at an 8th, a quarter or half of its size, but not below this
# By content, whatever a file is called; JPEG opens MPO, too. Pillow runs Ghostscript on what it takes for EPS, and has decoders that
# hardly anybody has tried.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "QOI", "ICO")
_UNGUARDED = nullcontext()
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_picture(stream: IO[bytes]) -> Image.Image:
    """A picture of which nothing but its header is read. Raises UnidentifiedImageError for what is none of FORMATS."""
    return Image.open(stream, formats=FORMATS)


def read_picture(picture: Picture, opening: AbstractContextManager[Any] = _UNGUARDED) -> Image.Image:
    """Read a picture as 8-bit RGB.

    Turned as its EXIF says, transparency laid over white, 16-bit and float greys reduced to 8 bits, CMYK converted, and of an animation
    the first frame. Colour profiles are not applied.

    Args:
        opening: entered while its bytes are fetched, such as a lock.

    Raises:
        UserError: if it is not a whole picture, has more than MOST_PIXELS (a JPEG is reduced first), or a side below LEAST_SIDE.
    """
    try:
        with opening:
            stream = picture.open()
        with stream, open_picture(stream) as file:
            if file.width * file.height > MOST_PIXELS:
                file.draft("RGB", DRAFT)
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"it has {file.width} x {file.height} pixels; make it no larger than {MOST_PIXELS >> 20} million")
            if min(file.size) < LEAST_SIDE:
                raise ValueError(f"it has {file.width} x {file.height} pixels; give pictures of at least {LEAST_SIDE} a side")
            file.load()
            return _to_rgb(_turned(file))
    except UnidentifiedImageError as error:
        raise UserError(
            f"picture {picture.key} cannot be read: it is empty or of no format that is read here ({', '.join(FORMATS[:7])})"
        ) from error
    except Exception as error:  # decoders raise what they like on bytes that are not what they say
        reason = getattr(error, "strerror", None) or str(error).replace("\n", " ") or type(error).__name__
        raise UserError(f"picture {picture.key} cannot be read: {reason}") from error


def _turned(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF says that it is seen; as it is stored if its EXIF is broken."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(picture).astype(np.float64)  # [H, W]
        largest = 65535 if picture.mode != "I" or values.max() > 255 else 255
        picture = _grey(values / largest)
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture).astype(np.float64))
        picture = _grey(values / next(largest for largest in (1, 255, 65535, np.inf) if values.max() <= largest))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    """Values [H, W] in 0..1 as an 8-bit picture."""
    return Image.fromarray(np.round(values.clip(0, 1) * 255).astype(np.uint8))


def cover(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize until `size` (width, height) is just covered, keeping proportions, and cut the rest off both sides alike."""
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to pixels [B, 3, H, W] in -1..1."""
    array = np.stack([np.asarray(picture) for picture in pictures])  # [B, H, W, 3]
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0
