"""PickScore and HPSv2: how well CLIP finds that picture and prompt go together, after training on people's choices."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from library.models.clip_tokenizer import build_clip_tokenizer
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded
from library.scorers.image_models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, take_preprocessing
from library.scorers.image_models.weight_files import config_from_values, config_values, folder_preprocessing, load_transformers


class TextImageModel(ImageModel):
    """A CLIP model; the score is the cosine between the embeddings of picture and prompt, times its logit scale if `scaled`.

    Args:
        config: of the CLIP model.
    """

    uses_prompt = True
    scaled: bool

    def __init__(self, *, config: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> None:
        super().__init__(preprocessing)
        self.clip = transformers.CLIPModel(config_from_values(config))  # pyright: ignore[reportArgumentType]
        self.tokenizer = build_clip_tokenizer("<|endoftext|>")  # what pads is behind the end, where a causal text model does not look

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        clip = load_transformers(transformers.CLIPModel, argument)
        config: Any = clip.config
        default = folder_preprocessing(argument, Preprocessing(mean=CLIP_MEAN, std=CLIP_STD))
        preprocessing = Preprocessing(size=config.vision_config.image_size, mean=default.mean, std=default.std)
        architecture = {"config": config_values(config), "preprocessing": take_preprocessing(options, preprocessing)}
        return Loaded(architecture, {f"clip.{name}": tensor for name, tensor in clip.state_dict().items()})

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        assert prompts is not None, "this image model reads the prompt"
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=views).pooler_output)
        cosines = F.cosine_similarity(image, self._embed_text(prompts, views.device).to(image.dtype))
        return self.clip.logit_scale.exp() * cosines if self.scaled else cosines

    @torch.no_grad()
    def _embed_text(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """[N, D]"""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").to(device)
        return self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)


@IMAGE_MODELS.register("pickscore")
class PickScore(TextImageModel):
    """PickScore (arXiv 2305.01569): about 17 to 24."""

    scaled = True
    example = "pickscore:FOLDER"


@IMAGE_MODELS.register("hpsv2")
class HPSv2(TextImageModel):
    """Human Preference Score v2 (arXiv 2306.09341), of a checkpoint in transformers' layout: about 0.2 to 0.4."""

    scaled = False
    example = "hpsv2:FOLDER"
