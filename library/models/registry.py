"""The model families there are. To add one: a file beside this one, its bundled configs in configs/, and a row here."""

from library.models import sdxl, stable_diffusion
from library.models.base import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (stable_diffusion.SD1, stable_diffusion.SD2, sdxl.FAMILY)}
