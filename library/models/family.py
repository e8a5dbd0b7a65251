"""What loading needs to know about a family of models."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.diffusion.noise_schedule import PredictionType
from library.models.base import DiffusionModel, ModelSpec
from library.models.vae import Autoencoder, LatentSpace

NATIVE_SIZE = 1024  # pixels, of a model that does not say its own
Component = Callable[[Any, Path, torch.dtype], Any]
"""Loads one part: a class of diffusers or transformers, the folder, the dtype of its weights."""


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """All that loading needs to know about a family; a file in families/ makes one and registers it.

    Attributes:
        name, title: for options, for messages.
        model_class: the DiffusionModel subclass.
        config_file: the published configs (JSON) by component: `denoiser`, vae, the text encoders, scheduler.
        pipeline_class: _class_name in a diffusers folder's model_index.json.
        denoiser, denoiser_class: the folder of the network that predicts, and its class in diffusers.
        versions: (ss_base_model_version, modelspec.architecture) of its LoRAs by prediction type.
        implementation: modelspec.implementation of its LoRAs.
    """

    name: str
    title: str
    model_class: type[DiffusionModel]
    config_file: Path
    pipeline_class: str
    denoiser: str = "unet"
    denoiser_class: str = "UNet2DConditionModel"
    versions: Mapping[PredictionType, tuple[str, str]]
    implementation: str

    @property
    def config(self) -> dict[str, Any]:
        """The published configs by component."""
        return json.loads(self.config_file.read_text(encoding="utf-8"))

    @abstractmethod
    def is_folder(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Whether a diffusers folder with this model_index.json and this config of its denoiser is of this family."""

    @abstractmethod
    def text_of_folder(self, path: Path, component: Component, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
        """The text encoders of a diffusers folder, in the order in which the denoiser expects them, and their tokenizers."""

    def spec(self, *, prediction_type: PredictionType, unet: Any, vae: Autoencoder, name: str, scheduler: str = "") -> ModelSpec:
        version, architecture = self.versions[prediction_type]
        latent_space = LatentSpace.of(vae)
        sizes = (unet.config.get("sample_size"), latent_space.downsampling), (vae.config.get("sample_size"), 1)
        return ModelSpec(
            family=self.name,
            prediction_type=prediction_type,
            latent_space=latent_space,
            resolution=next((side * factor for side, factor in sizes if type(side) is int and side > 0), NATIVE_SIZE),
            base_model_version=version,
            architecture=architecture,
            implementation=self.implementation,
            name=name,
            scheduler=scheduler,
        )
