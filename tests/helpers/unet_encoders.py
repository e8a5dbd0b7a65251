"""Scorers that read with the first half of a tiny U-Net."""

import functools
import json
from typing import Any

import torch

from library.models.base import DiffusionModel
from library.scorers.base import BackboneScorer, ModelSource, ScorerSpec, build_scorer
from library.scorers.kinds.unet_encoder import UNetEncoder
from tests.helpers.tiny_models import tiny_model


@functools.cache
def shared_model(kind: str) -> DiffusionModel:
    """For tests that change nothing in it."""
    return tiny_model(kind)


def source_of(model: DiffusionModel) -> ModelSource:
    return ModelSource(model=lambda: model, vae=model.vae)


def make_scorer(
    kind: str = "sd1", size: str = "base", seed: int = 0, model: DiffusionModel | None = None, **options: Any
) -> BackboneScorer:
    """A scorer as a run makes it; its readout is random by `seed`."""
    model = model or shared_model(kind)
    architecture = json.loads(json.dumps(UNetEncoder.architecture_for(size, source_of(model), **options)))
    spec = ScorerSpec(
        kind="unet_encoder", architecture=architecture, vae=model.vae_fingerprint(), uses_prompt=architecture.get("use_prompt", False)
    )
    torch.manual_seed(seed)
    scorer = build_scorer(spec)
    scorer.backbone.initialise(source_of(model))
    return scorer.eval()
