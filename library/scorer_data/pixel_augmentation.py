"""Variants of a picture that are encoded beside it: mirrored, and cut to a random part.

They are made of pixels, since a mirrored latent is not the latent of the mirrored picture. A variant's name says all that made it, so
that it is found again for the same settings only, and a change of settings costs the new variants and no more. Left out are rotation,
JPEG and brightness: they change what a quality score rates.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from library.scorer_data.pictures import cover
from library.settings.options import check_at_least, option

PLAIN = ""
FLIPPED = "flip"
MIN_AREA = 0.8  # of a picture, that a random cut keeps


@dataclass(frozen=True, kw_only=True)
class PixelAugmentation:
    """Variants of each picture to encode and train on."""

    flip_aug: bool = option(False, help="Train on mirrored pictures too; only if mirroring does not change the score.")
    crop_variants: int = option(
        0, help="Random cuts of each picture to train on too; only if the score is not about composition.", expert=True
    )

    def __post_init__(self) -> None:
        check_at_least(self, 0, "crop_variants")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variants, the picture as it is first. Where pictures are mirrored, so is every second crop."""
        crops = (f"crop:{number}@{MIN_AREA:g}" for number in range(1, self.crop_variants + 1))
        if not self.flip_aug:
            return PLAIN, *crops
        return PLAIN, FLIPPED, *(f"{crop}+{FLIPPED}" if number % 2 else crop for number, crop in enumerate(crops))


def render(picture: Image.Image, size: tuple[int, int], variant: str, seed: str) -> Image.Image:
    """A variant of a picture, brought to a bucket's size (width, height).

    Args:
        variant: one of `PixelAugmentation.names`.
        seed: a crop is drawn anew for each (seed, variant), and always alike for the same.
    """
    parts = variant.split("+") if variant else []
    for part in parts:
        if part.startswith("crop:"):
            picture = picture.crop(_crop_box(picture.size, float(part.partition("@")[2]), f"{seed}\0{part}"))
        else:
            assert part == FLIPPED, f"there is no variant {variant!r}"
    picture = cover(picture, size)
    return ImageOps.mirror(picture) if FLIPPED in parts else picture


def _crop_box(size: tuple[int, int], min_area: float, seed: str) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of the picture with its proportions and at least this share of its area."""
    digest = hashlib.blake2b(seed.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    area, x, y = np.random.default_rng(int.from_bytes(digest, "big")).random(3)
    scale = (min_area + (1 - min_area) * area) ** 0.5
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = round((size[0] - width) * x), round((size[1] - height) * y)
    return left, top, left + width, top + height
