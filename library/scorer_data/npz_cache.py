"""The latents that sd-scripts caches beside pictures: read, so that they need not be encoded again.

The layout, as sd-scripts' library/strategy_sd.py and strategy_base.py write it: NAME_{W:04d}x{H:04d}_sd.npz or _sdxl.npz beside the
picture NAME.*, with its stored size; NAME.npz in older versions. In it: latents [C, h, w] float32, unscaled, one draw from the
posterior; latents_flipped, if pictures were mirrored; original_size (width, height); crop_ltrb. Nothing in it says which VAE made it.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.scorer_data.pictures import EXIF_ORIENTATION, open_picture
from library.scorer_data.pixel_augmentation import FLIPPED, PLAIN
from library.scorer_data.records import FilePicture, FileState, Picture

logger = logging.getLogger(__name__)

SDXL_SCALING_FACTOR = 0.13025
# Relative RMS between latents of one picture. On seven photographs and the VAE of examples/shapes the posterior's spread makes 0.04 and
# resampling by area, as sd-scripts does, in place of Lanczos another 0.04 at most; two unrelated VAEs are about sqrt(2) apart.
TOLERANCE = 0.3
MOST_BYTES = 1 << 26  # of an array; compressed, it may be of any size
_KEYS = {PLAIN: "latents", FLIPPED: "latents_flipped"}


class NpzCache:
    """sd-scripts' caches beside a run's pictures, trusted after the first that was compared with what the run's own VAE makes.

    Attributes:
        trusted: whether they are of the run's VAE; None until one was compared.
    """

    def __init__(self, scaling_factor: float) -> None:
        self.scaling_factor = scaling_factor
        self.trusted: bool | None = None

    def find(self, picture: Picture, state: FileState, bucket: tuple[int, int], variants: tuple[str, ...]) -> dict[str, Tensor]:
        """Scaled latents [C, h, w] by variant, as far as there is a cache that is newer than the picture and made for this bucket."""
        if self.trusted is False or not isinstance(picture, FilePicture):
            return {}
        try:
            size = _stored_size(picture)
            if size is None:
                return {}
            for path in self._paths(picture.path, size):
                if path.is_file() and path.stat().st_mtime_ns >= state.mtime_ns:
                    found = self._read(path, size, bucket, variants)
                    if found:
                        return found
        except Exception as error:  # whatever a foreign file makes of its reader
            logger.debug("the cache of %s cannot be read: %s", picture.key, error)
        return {}

    def compare(self, cached: Tensor, own: Tensor, picture: Picture) -> None:
        """Decide by one picture's latents [C, h, w] whether the caches are of the run's VAE."""
        error = (cached - own).norm() / own.norm().clamp_min(1e-12) if cached.shape == own.shape else math.inf
        self.trusted = bool(error <= TOLERANCE)
        if self.trusted:
            logger.info("latents that sd-scripts cached beside the pictures are used (relative RMS %.3f on %s)", error, picture.key)
        else:
            logger.warning("latents cached by sd-scripts are not used: that of %s is another VAE's (relative RMS %.2f)", picture.key, error)

    def _paths(self, picture: Path, size: tuple[int, int]) -> tuple[Path, Path]:
        kind = "sdxl" if math.isclose(self.scaling_factor, SDXL_SCALING_FACTOR, rel_tol=1e-3) else "sd"
        return picture.with_name(f"{picture.stem}_{size[0]:04d}x{size[1]:04d}_{kind}.npz"), picture.with_suffix(".npz")

    def _read(self, path: Path, size: tuple[int, int], bucket: tuple[int, int], variants: tuple[str, ...]) -> dict[str, Tensor]:
        with np.load(path) as file:
            if max(part.file_size for part in file.zip.infolist()) > MOST_BYTES:
                return {}
            if tuple(file["original_size"].tolist()) != size:
                return {}
            found = {variant: file[_KEYS[variant]] for variant in variants if _KEYS.get(variant) in file.files}
        shape = (bucket[1] // 8, bucket[0] // 8)
        if any(latents.ndim != 3 or latents.shape[1:] != shape or not np.isfinite(latents).all() for latents in found.values()):
            return {}
        return {variant: torch.from_numpy(latents).float() * self.scaling_factor for variant, latents in found.items()}


def _stored_size(picture: FilePicture) -> tuple[int, int] | None:
    """Width and height, or None where sd-scripts shows a picture otherwise than we do: turned by its EXIF, or transparent."""
    with picture.open() as stream, open_picture(stream) as file:
        if file.getexif().get(EXIF_ORIENTATION, 1) != 1 or file.has_transparency_data:
            return None
        return file.size
