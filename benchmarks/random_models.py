"""Models of the published sizes with random weights: they compute at the speed and in the memory of the real ones, without a checkpoint."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from library.diffusion.noise_schedule import NoiseSchedule
from library.models.base import DiffusionModel
from library.models.clip_tokenizer import build_clip_tokenizer
from library.models.registry import FAMILIES
from library.models.single_file import bundled_config
from library.scorers.base import SCORER_KINDS, Scorer, ScorerSpec, build_scorer

PROMPTS = [f"a photo of a {thing}" for thing in ("house", "face", "dog", "street", "forest", "car", "cup", "boat")]
TEXT_ENCODERS: dict[str, type[PreTrainedModel]] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


def random_model(
    family_name: str, *, tiny: bool = False, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiffusionModel:
    """A frozen model of a family in `FAMILIES`, drawn from torch's global generator; `tiny` is the one of the tests."""
    if tiny:
        from tests.helpers.tiny_models import tiny_model  # the tests need not be there for the rest

        return tiny_model(family_name).to(device, dtype)
    family, config = FAMILIES[family_name], bundled_config(family_name)
    schedule = NoiseSchedule.from_config(config["scheduler"])
    with torch.device(device):  # SDXL's 3.5 billion numbers are drawn in a blink on a GPU, and in a minute on a CPU
        unet: Any = UNet2DConditionModel.from_config(config["unet"])
        vae: Any = AutoencoderKL.from_config(config["vae"])
        text_encoders = [TEXT_ENCODERS[slot.class_name](CLIPTextConfig(**config[slot.folder])) for slot in family.text_encoders]
    model = family.model_class(
        spec=family.spec(prediction_type=schedule.prediction_type, unet=unet, vae=vae, name=f"random_{family_name}"),
        schedule=schedule,
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=[build_clip_tokenizer(slot.pad_token) for slot in family.text_encoders],
    )
    return model.freeze().to(device, dtype)


def untrained_scorer(model: DiffusionModel, size: str) -> Scorer:
    """A latent ResNet of the model's VAE, on its device: an opinion without sense, at the cost of a trained one."""
    architecture = SCORER_KINDS["latent_resnet"].preset(size) | {"in_channels": model.spec.latent_channels}
    scorer = build_scorer(ScorerSpec(kind="latent_resnet", architecture=architecture, vae=model.vae_fingerprint()))
    return scorer.requires_grad_(False).eval().to(model.device)
