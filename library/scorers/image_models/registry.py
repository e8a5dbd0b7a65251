"""The families of image models. To add one: write an `ImageModel` and add its row."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from library.errors import UserError
from library.scorers.image_models.aesthetic import AestheticV25, LaionV1, LaionV2
from library.scorers.image_models.base import ImageModel, Loaded, Specification
from library.scorers.image_models.classifier import Classifier, TimmModel
from library.scorers.image_models.metric_packages import ImscoreModel, PyiqaMetric
from library.scorers.image_models.network_files import Onnx, TorchScript
from library.scorers.image_models.text_image import HPSv2, PickScore
from library.scorers.image_models.trainable import TransformersBackbone
from library.scorers.image_models.user_python import UserPython

IMAGE_MODELS: Mapping[str, type[ImageModel]] = MappingProxyType(
    {
        "laion_v1": LaionV1,
        "laion_v2": LaionV2,
        "aesthetic_v2_5": AestheticV25,
        "classifier": Classifier,
        "timm": TimmModel,
        "pickscore": PickScore,
        "hpsv2": HPSv2,
        "pyiqa": PyiqaMetric,
        "imscore": ImscoreModel,
        "torchscript": TorchScript,
        "onnx": Onnx,
        "python": UserPython,
        "backbone": TransformersBackbone,
    }
)


def read_image_model(text: str) -> Loaded:
    """What the user's files hold, for `family:argument?options`. The architecture has the family in it.

    Raises:
        UserError: no such family, a file that is missing or another than it should be, or an option that the family does not have.
    """
    given = Specification.parse(text)
    if given.family not in IMAGE_MODELS:
        raise UserError(f"there is no family of image models {given.family!r}; it can be {', '.join(IMAGE_MODELS)}")
    family = IMAGE_MODELS[given.family]
    options = dict(given.options)
    loaded = family.read(given.argument, options)
    if options:
        raise UserError(f"image model {text!r} has no option {', '.join(options)}; it is written like {family.example}")
    return Loaded({"family": given.family, **loaded.architecture}, loaded.weights)


def build_image_model(architecture: Mapping[str, Any]) -> ImageModel:
    """The image model of an architecture, with random weights."""
    values = dict(architecture)
    return IMAGE_MODELS[values.pop("family")](**values)
