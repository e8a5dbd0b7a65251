"""The recipes of CONTRIBUTING.md for scorers: the one file of each, written, imported and trained with."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_latent_scorer
from library.scorer_data.readers.base import READERS
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.criteria.base import CRITERIA
from library.scorers.base import SCORER_KINDS, Scorer
from library.scorers.image_models.base import IMAGE_MODELS
from library.scorers.io import load_scorer, save_scorer
from library.settings.options import build
from library.settings.registry import Registry
from tests.helpers.tiny_models import tiny_vae
from tools.make_pixel_scorer import PixelScorerConfig, make_scorer

KIND = '''
"""A kind of scorer that sees the mean of the latents."""

import torch
from torch import nn

from library.scorers.base import SCORER_KINDS, Backbone


@SCORER_KINDS.register("mean_latent")
class MeanLatent(Backbone):
    presets = {"base": {"width": 16}}

    def __init__(self, *, in_channels, width):
        super().__init__()
        self.feature_width = width
        self.layer = nn.Linear(in_channels + 1, width)

    def forward(self, latents, sigmas, cond=None, prompts=None):
        return self.layer(torch.cat([latents.mean((2, 3)), sigmas.atan()[:, None]], dim=1)).relu()
'''

CRITERION = '''
"""A criterion: the absolute error."""

from library.scorer_training.criteria.base import CRITERIA
from library.scorer_training.criteria.regression import ScoreRegression, standardised


@CRITERIA.register("absolute")
class AbsoluteError(ScoreRegression):
    def losses(self, outputs, targets, head):
        return (outputs[:, 0] - standardised(targets, head)).abs()
'''

READER = '''
"""A source of rated pictures: files whose names end in their score, such as cat_7.5.png."""

from library.scorer_data.readers.base import READERS, Reader
from library.scorer_data.records import FilePicture, RatedImage


@READERS.register("named_scores")
class NamedScores(Reader):
    targets = ("score",)

    @staticmethod
    def read(path, options):
        for file in sorted(path.glob("*_*.png")):
            yield RatedImage(picture=FilePicture(file.absolute()), name=file.name, where=str(file), score=float(file.stem.split("_")[-1]))
'''

IMAGE_MODEL = '''
"""A ready-made image scorer: how red a picture is."""

from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded
from library.scorers.image_models.preprocessing import Preprocessing


@IMAGE_MODELS.register("redness")
class Redness(ImageModel):
    example = "redness:2.5"

    def __init__(self, *, factor, preprocessing):
        super().__init__(preprocessing)
        self.factor = factor

    @classmethod
    def read(cls, argument, options):
        return Loaded({"factor": float(argument), "preprocessing": Preprocessing().to_dict()}, {})

    def predict(self, views, prompts):
        return self.factor * (views[:, 0] - views[:, 1:].mean(1)).mean((1, 2))
'''


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Registry, str], None]:
    """Write a recipe's file and import it; what it registers is forgotten after the test."""

    def write_and_import(registry: Registry, text: str) -> None:
        known = registry.names
        for table in ("_entries", "_modules"):
            monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
        path = tmp_path / f"recipe_{registry.kind}.py"
        path.write_text(text.lstrip(), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        assert len(registry) == len(known) + 1

    return write_and_import


def train(folder: Path, **changes: object) -> Scorer:
    """Two steps on sixteen pictures whose names end in their score, and the scorer as its file has it."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for score in range(16):
        Image.new("RGB", (32, 32), (16 * score, 60, 60)).save(pictures / f"red_{score}.png")
    rows = [f"red_{score}.png,{score},{'train' if score % 4 else 'val'}" for score in range(16)]
    (pictures / "ratings.csv").write_text("\n".join(["path,score,split", *rows]), encoding="utf-8")
    tiny_vae().save_pretrained(folder / "vae")
    settings = {
        "vae": folder / "vae",
        "train_data_file": pictures / "ratings.csv",
        "output_dir": folder / "out",
        "resolution": "32",
        "enable_bucket": False,
        "scorer_size": "tiny",
        "max_train_steps": 2,
        "train_batch_size": 4,
        **changes,
    }
    return load_scorer(train_latent_scorer.train(build(LatentScorerConfig, settings)))


def test_a_kind_of_scorer(declare: Callable[[Registry, str], None], tmp_path: Path) -> None:
    declare(SCORER_KINDS, KIND)
    scorer = train(tmp_path, scorer_kind="mean_latent", scorer_size="base", scorer_args=("width=8",))
    assert scorer.spec.kind == "mean_latent" and scorer.spec.architecture == {"in_channels": 4, "width": 8}


def test_a_criterion(declare: Callable[[Registry, str], None], tmp_path: Path) -> None:
    declare(CRITERIA, CRITERION)
    assert train(tmp_path, criterion="absolute").spec.head().criterion == "absolute"


def test_a_source_of_rated_pictures(declare: Callable[[Registry, str], None], tmp_path: Path) -> None:
    declare(READERS, READER)
    scorer = train(tmp_path, data_reader="named_scores", train_data_file=tmp_path / "pictures", validation_split=0.4)
    assert sum(scorer.spec.training["tasks"]["score"]["pictures"].values()) == 16


def test_a_ready_made_image_scorer(declare: Callable[[Registry, str], None], tmp_path: Path) -> None:
    declare(IMAGE_MODELS, IMAGE_MODEL)
    save_scorer(tmp_path / "red.safetensors", make_scorer(tiny_vae(), PixelScorerConfig(image_model="redness:2.5"), 64))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = load_scorer(tmp_path / "red.safetensors")(latents, torch.zeros(2))
    [gradient] = torch.autograd.grad(scores.sum(), latents)
    assert scores.shape == (2,) and gradient.any()
