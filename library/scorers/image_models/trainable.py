"""Image backbones of transformers to train on: their pooled features."""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor

from library.errors import UserError
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded
from library.scorers.image_models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, take_preprocessing
from library.scorers.image_models.weight_files import config_from_values, config_values, folder_preprocessing, load_transformers


def _convnext(widths: Sequence[int], depths: Sequence[int]) -> dict[str, Any]:
    return {"model_type": "convnextv2", "hidden_sizes": list(widths), "depths": list(depths), "num_stages": len(widths)}


def _resnet(widths: Sequence[int], depths: Sequence[int], layer_type: str) -> dict[str, Any]:
    return {"model_type": "resnet", "embedding_size": 64, "hidden_sizes": list(widths), "depths": list(depths), "layer_type": layer_type}


# Sizes of their publications (arXiv 2301.00808, 1512.03385), and two below; they take pictures of any size.
CONFIGURATIONS: Mapping[str, dict[str, Any]] = {
    "tiny": _convnext([32, 64, 128], [1, 1, 2]),  # 0.4 M parameters
    "small": _convnext([40, 80, 160, 320], [2, 2, 6, 2]),  # 3.4 M
    "base": _convnext([80, 160, 320, 640], [2, 2, 8, 2]),  # 15 M
    "convnextv2-atto": _convnext([40, 80, 160, 320], [2, 2, 6, 2]),
    "convnextv2-nano": _convnext([80, 160, 320, 640], [2, 2, 8, 2]),
    "convnextv2-tiny": _convnext([96, 192, 384, 768], [3, 3, 9, 3]),  # 28 M
    "resnet-18": _resnet([64, 128, 256, 512], [2, 2, 2, 2], "basic"),  # 11 M
    "resnet-50": _resnet([256, 512, 1024, 2048], [3, 4, 6, 3], "bottleneck"),  # 24 M
}


@IMAGE_MODELS.register("backbone")
class TransformersBackbone(ImageModel):
    """Any image model of transformers that has pooled features, or tokens to average.

    Args:
        config: its configuration.
        pooler: whether its own pooling, where it has some, is used; a classifier's folder comes without.
    """

    example = "backbone:FOLDER"

    def __init__(self, *, config: Mapping[str, Any], preprocessing: Mapping[str, Any], pooler: bool = True) -> None:
        super().__init__(preprocessing)
        built = config_from_values(config)
        self.network = transformers.AutoModel.from_config(built)
        if not pooler:
            self.network.pooler = None
        self.feature_width = feature_width(built)

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        network = load_transformers(transformers.AutoModel, argument, without="pooler")
        size = getattr(network.config, "image_size", 224)
        preprocessing = take_preprocessing(
            options, folder_preprocessing(argument, Preprocessing(size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD))
        )
        feature_width(network.config)
        weights = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        pooler = getattr(network, "pooler", True) is not None
        return Loaded({"config": config_values(network.config), "preprocessing": preprocessing, "pooler": pooler}, weights)

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        outputs = self.network(pixel_values=views)
        pooled = getattr(outputs, "pooler_output", None)
        return outputs.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


def feature_width(config: Any) -> int:
    """Of the pooled features. Raises UserError for a model that is not of one picture."""
    width = config.hidden_sizes[-1] if getattr(config, "hidden_sizes", None) else getattr(config, "hidden_size", None)
    if width is None:
        raise UserError(f"image model: a {config.model_type} has no features of a picture; give one such as convnextv2 or vit")
    return width
