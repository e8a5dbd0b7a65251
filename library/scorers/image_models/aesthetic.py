"""Aesthetic predictors: a linear chain on the normalised embedding of a picture.

LAION's v1 (one layer) and v2 (five layers, no activations between them) read CLIP; aesthetic-predictor-v2.5 reads SigLIP.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded, take_required
from library.scorers.image_models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, take_preprocessing
from library.scorers.image_models.weight_files import (
    config_from_values,
    config_values,
    folder_preprocessing,
    load_transformers,
    read_state_dict,
)

DEEP = (1024, 128, 64, 16, 1)


class LinearChain(nn.Sequential):
    """Linear layers of these widths, one after the other, with nothing between them (dropout, in training, was all there was)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(*[nn.Linear(given, wanted) for given, wanted in pairwise(widths)])


def chain_weights(tensors: Mapping[str, Tensor], path: str, widths: Sequence[int]) -> dict[str, Tensor]:
    """A head's tensors under the names of a LinearChain; layers are known by the numbers in their names, whatever stands around them.

    Public files have `weight` (v1), `layers.N.weight` with N in 0, 2, 4, 6, 7 (v2) and `scoring_head.N.weight` in 0, 2, 4, 6, 8 (v2.5).
    """
    layers = sorted((_numbers(name), name) for name in tensors if name.endswith("weight"))
    found = [tuple(tensors[name].shape) for _, name in layers]
    wanted = [(after, before) for before, after in pairwise(widths)]
    if found != wanted:
        raise UserError(f"image model: the layers of {path} are {found}, but this head has {wanted}; is it for another embedding?")
    result = {}
    for index, (_, name) in enumerate(layers):
        result[f"{index}.weight"] = tensors[name]
        result[f"{index}.bias"] = tensors[name.removesuffix("weight") + "bias"]
    return result


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


class AestheticModel(ImageModel):
    """A tower of a vision-language model and a chain on its normalised embedding.

    Args:
        tower: configuration of the tower.
        widths: of the chain, from the embedding to 1.
    """

    hidden_widths: tuple[int, ...] = DEEP
    tower_option = "clip"
    tower_class = "CLIPVisionModelWithProjection"
    default_preprocessing = Preprocessing(size=224, mean=CLIP_MEAN, std=CLIP_STD)

    def __init__(self, *, tower: Mapping[str, Any], widths: Sequence[int], preprocessing: Mapping[str, Any]) -> None:
        super().__init__(preprocessing)
        self.tower = getattr(transformers, self.tower_class)(config_from_values(tower))
        self.head = LinearChain(widths)

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        folder = take_required(options, cls.tower_option, "FOLDER, the model whose embedding the head reads")
        tower = load_transformers(getattr(transformers, cls.tower_class), folder)
        config: Any = tower.config
        default = folder_preprocessing(folder, cls.default_preprocessing)
        widths = [config.projection_dim if cls.tower_option == "clip" else config.hidden_size, *cls.hidden_widths]
        weights = {f"tower.{name}": tensor for name, tensor in tower.state_dict().items()}
        weights |= {f"head.{name}": tensor for name, tensor in chain_weights(read_state_dict(argument), argument, widths).items()}
        preprocessing = take_preprocessing(options, Preprocessing(size=config.image_size, mean=default.mean, std=default.std))
        return Loaded({"tower": config_values(config), "widths": widths, "preprocessing": preprocessing}, weights)

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        return self.head(F.normalize(self.embed(views), dim=-1))

    def embed(self, views: Tensor) -> Tensor:
        """[N, widths[0]]"""
        return self.tower(pixel_values=views).image_embeds


@IMAGE_MODELS.register("laion_v1")
class LaionV1(AestheticModel):
    """LAION-AI/aesthetic-predictor: one linear layer on CLIP. About 1 to 10."""

    hidden_widths = (1,)
    example = "laion_v1:sa_0_4_vit_l_14_linear.pth?clip=FOLDER"


@IMAGE_MODELS.register("laion_v2")
class LaionV2(AestheticModel):
    """christophschuhmann/improved-aesthetic-predictor: 768-1024-128-64-16-1 on CLIP ViT-L/14. About 1 to 10."""

    example = "laion_v2:sac+logos+ava1-l14-linearMSE.pth?clip=FOLDER"


@IMAGE_MODELS.register("aesthetic_v2_5")
class AestheticV25(AestheticModel):
    """discus0434/aesthetic-predictor-v2-5: the same chain on SigLIP so400m. 1 to 10."""

    tower_option = "siglip"
    tower_class = "SiglipVisionModel"
    default_preprocessing = Preprocessing(size=384)
    example = "aesthetic_v2_5:aesthetic_predictor_v2_5.pth?siglip=FOLDER"

    def embed(self, views: Tensor) -> Tensor:
        return self.tower(pixel_values=views).pooler_output
