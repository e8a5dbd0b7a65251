"""Aspect-ratio buckets: which size a picture is brought to, so that it is never squashed and hardly cropped.

Of pictures of up to 1 : 4 the default buckets (512, steps of 64) cut off 14.1 % at most and 5.6 % on average over the logarithm of the
ratio; steps of 32, or a resolution of 1024, halve both. Longer pictures lose what is beyond 1 : 4, and are left out where that is more
than `max_crop`. The options have the names and the meaning that they have in sd-scripts, which has no max_crop.
"""

import logging
import math
from dataclasses import dataclass

from library.errors import UserError
from library.settings.options import option
from library.types import SIDES, is_side

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """How pictures are sized. All in pixels."""

    resolution: str = option("512", help='Size, "512" or "width,height"; with buckets, the area that every size keeps below.')
    enable_bucket: bool = option(True, help="Give other aspect ratios sizes of their own; when off, crop to the resolution.")
    min_bucket_reso: int | None = option(
        None, help="Shortest side of a bucket; not set: half of the resolution.", expert=True, only_with="enable_bucket"
    )
    max_bucket_reso: int | None = option(
        None, help="Longest side of a bucket; not set: twice the resolution.", expert=True, only_with="enable_bucket"
    )
    bucket_reso_steps: int = option(
        64, help="Sides of buckets are multiples of this, which is a multiple of 8.", expert=True, only_with="enable_bucket"
    )
    bucket_no_upscale: bool = option(
        False, help="Leave smaller pictures at their own size, whatever min and max.", expert=True, only_with="enable_bucket"
    )
    max_crop: float = option(0.35, help="Leave out pictures of which their bucket would cut off more than this share.", expert=True)

    def __post_init__(self) -> None:
        for name, value in (("resolution", self.width), ("resolution", self.height), ("bucket_reso_steps", self.bucket_reso_steps)):
            if not is_side(value):
                raise UserError(f"{name} is {value}, but sides are {SIDES}")
        if not 0 <= self.max_crop <= 1:
            raise UserError(f"max_crop is {self.max_crop}, but it must be between 0 and 1")
        unused = ("min_bucket_reso", "max_bucket_reso") if self.bucket_no_upscale else ()
        if not self.enable_bucket:
            unused = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale", "max_crop")
        for name in unused:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                reason = "bucket_no_upscale is on" if self.enable_bucket else "enable_bucket is off"
                logger.warning("%s does nothing: %s", name, reason)
        if self.enable_bucket and not self.bucket_no_upscale:
            if self.shortest > min(self.width, self.height):
                raise UserError(f"min_bucket_reso is {self.min_bucket_reso}, but it must be at most the resolution ({self.resolution})")
            if self.longest < max(self.width, self.height):
                raise UserError(f"max_bucket_reso is {self.max_bucket_reso}, but it must be at least the resolution ({self.resolution})")

    @property
    def shortest(self) -> int:
        """Side of a bucket."""
        return min(self.width, self.height) // 2 if self.min_bucket_reso is None else self.min_bucket_reso

    @property
    def longest(self) -> int:
        """Side of a bucket."""
        return 2 * max(self.width, self.height) if self.max_bucket_reso is None else self.max_bucket_reso

    @property
    def width(self) -> int:
        return parse_resolution(self.resolution)[0]

    @property
    def height(self) -> int:
        return parse_resolution(self.resolution)[1]


def parse_resolution(text: str) -> tuple[int, int]:
    """ "512" or "512,768" to (width, height), as in sd-scripts. Raises UserError."""
    parts = [part.strip() for part in str(text).split(",")]
    if len(parts) not in (1, 2) or not all(part.isdecimal() for part in parts):
        raise UserError(f"resolution is {text!r}, but it must be a size like 512, or a width and a height like 512,768")
    return int(parts[0]), int(parts[-1])


def bucket_sizes(config: BucketConfig) -> list[tuple[int, int]]:
    """Every (width, height) of at most the resolution's area, with each side the longest that the other allows."""
    area, step = config.width * config.height, config.bucket_reso_steps
    sizes = {(config.width, config.height)}
    first = math.ceil(config.shortest / step) * step
    for side in range(first, config.longest + 1, step):
        other = min(area // side, config.longest) // step * step
        if other >= config.shortest:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def choose_bucket(width: int, height: int, config: BucketConfig) -> tuple[int, int]:
    """The size (width, height) that a picture of `width` x `height` is brought to by `library.scorer_data.pictures.cover`."""
    if not config.enable_bucket:
        return config.width, config.height
    if config.bucket_no_upscale:
        shrink = min(1.0, math.sqrt(config.width * config.height / (width * height)))
        step = config.bucket_reso_steps
        return max(int(width * shrink) // step, 1) * step, max(int(height * shrink) // step, 1) * step
    ratio = width / height
    return min(bucket_sizes(config), key=lambda size: (abs(math.log(size[0] / size[1] / ratio)), -size[0] * size[1]))


def crop_share(width: int, height: int, size: tuple[int, int]) -> float:
    """How much of a picture of `width` x `height` is cut off when it just covers `size`: 0 to below 1."""
    ratio = (width / height) / (size[0] / size[1])
    return 1 - min(ratio, 1 / ratio)


def check_crop(name: str, picture: tuple[int, int], bucket: tuple[int, int], config: BucketConfig) -> None:
    """Raises UserError for a picture (width, height) of which its bucket would cut off more than `max_crop`."""
    cut = crop_share(*picture, bucket)
    if config.enable_bucket and cut > config.max_crop:
        width, height = picture
        raise UserError(
            f"picture {name} is {width}x{height}, of which its bucket of {bucket[0]}x{bucket[1]} would cut off {cut:.0%}: "
            f"max_crop is {config.max_crop:g}"
        )
