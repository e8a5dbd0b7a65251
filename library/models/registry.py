"""The model families there are: each is a file in families/, with its configs beside it."""

from library.models.family import Family
from library.settings.registry import Registry

FAMILIES: Registry[Family] = Registry("model_family", "library.models.families")
