"""CONTRIBUTING.md's recipes: each file that it shows is written, found by its registry without another word, and trained with."""

import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import library.models.config
import train_latent_scorer
from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.config import ModelConfig
from library.models.registry import FAMILIES
from library.objectives.base import TERMS
from library.objectives.estimator import ESTIMATORS
from library.objectives.reward_shapes import SHAPES
from library.rollouts.base import ROLLOUTS
from library.rollouts.sample import SamplingConfig, sample
from library.scorer_data.readers.base import READERS
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.criteria.base import CRITERIA
from library.scorers.base import SCORER_KINDS, Scorer
from library.scorers.image_models.base import IMAGE_MODELS
from library.scorers.io import load_scorer, save_scorer
from library.settings.options import build_config, resolve
from library.settings.registry import Registry
from library.settings.shared import OptimizerConfig
from library.training.optimizers import OPTIMIZERS, SCHEDULES, create_optimizer
from library.training.tracking import read_metrics
from library.types import PromptSpec
from networks.lora_metadata import Card, write_cards
from tests.helpers.tiny_leco_run import run
from tests.helpers.tiny_models import save_folder, save_single_file, tiny_model, tiny_vae
from tools.make_pixel_scorer import PixelScorerConfig, make_scorer
from train_leco_score import leco_score_config

CONTRIBUTING = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
REGISTRIES: dict[str, Registry] = {
    "TERMS": TERMS,
    "ESTIMATORS": ESTIMATORS,
    "ROLLOUTS": ROLLOUTS,
    "SHAPES": SHAPES,
    "SCORER_KINDS": SCORER_KINDS,
    "CRITERIA": CRITERIA,
    "READERS": READERS,
    "IMAGE_MODELS": IMAGE_MODELS,
    "SOLVERS": SOLVERS,
    "FAMILIES": FAMILIES,
    "OPTIMIZERS": OPTIMIZERS,
    "SCHEDULES": SCHEDULES,
}
BLOCKS = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
RECIPES = {re.findall(r"(\w+)\.register\(", block)[0]: block for block in BLOCKS}

Declare = Callable[..., None]


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Declare]:
    """Write the one file of a recipe, beside `others`, where its registry finds it: into its package's path, or imported by hand where
    there is no package. All is forgotten after the test."""
    before = set(sys.modules)
    for registry in REGISTRIES.values():
        list(registry)  # what is there already is found before
        for table in ("_entries", "_modules"):
            monkeypatch.setattr(registry, table, dict(getattr(registry, table)))

    def declare(name: str, others: dict[str, str] | None = None) -> None:
        registry, recipe = REGISTRIES[name], RECIPES[name]
        known, [part] = registry.names, re.findall(rf'^@?{name}\.register\((?:"(\w+)"|TWIN\.name)\)', recipe, re.MULTILINE)
        folder = tmp_path / "recipes"
        folder.mkdir()
        for file, text in {f"{part or 'twin'}.py": recipe, **(others or {})}.items():
            (folder / file).write_text(text, encoding="utf-8")
        if registry._package is None:
            monkeypatch.syspath_prepend(folder)
            importlib.import_module(part)
        else:
            package = importlib.import_module(registry._package)
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
            monkeypatch.setattr(registry, "_complete", registry._named_after_modules)  # as before the first look-up
        assert len(registry) == len(known) + 1

    yield declare
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_every_recipe_is_run() -> None:
    assert len(RECIPES) == len(BLOCKS)
    assert set(RECIPES) == set(re.findall(r'\bdeclare\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))


def trained(workplace: Path, tmp_path: Path, **settings: Any) -> list[dict[str, float | None]]:
    """The numbers of two steps of train_leco_score.py."""
    run(workplace, tmp_path / "out", **settings)
    records = read_metrics(tmp_path / "out" / "tiny.metrics.jsonl")
    assert len(records) == 2
    return records


def trained_scorer(folder: Path, **changes: object) -> Scorer:
    """Two steps of train_latent_scorer.py on sixteen pictures whose names end in their score, and the scorer as its file has it."""
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
    return load_scorer(train_latent_scorer.train(build_config(LatentScorerConfig, settings)))


def test_an_estimator(declare: Declare, workplace: Path, tmp_path: Path) -> None:
    declare("ESTIMATORS")
    first, _ = trained(workplace, tmp_path, score_estimator="dimmed", dimmed_by=0.0)
    assert first["gain_per_step"] == 0  # all pictures are grey


def test_a_term(declare: Declare, workplace: Path, tmp_path: Path) -> None:
    assert "shrink" in resolve(leco_score_config(), {"objective": ["score", "shrink"]})[1]["objective"]
    declare("TERMS")
    first, _ = trained(workplace, tmp_path, objective=["score", "shrink"], objective_weights=["shrink=3"], shrink_power=1.0)
    score, shrink, loss = (first[name] or 0.0 for name in ("score/loss", "shrink/loss", "loss"))
    assert shrink > 0 and loss == pytest.approx(score + 3 * shrink, rel=1e-5)


def test_a_rollout(declare: Declare, workplace: Path, tmp_path: Path) -> None:
    declare("ROLLOUTS")
    records = trained(workplace, tmp_path, rollout="per_sample", max_denoising_steps=6)
    assert (records[1]["unet_evaluations"] or 0) > 2 * 2 * 5  # two batches of two cost more than the belt's five each


def test_a_reward_shape(declare: Declare, workplace: Path, tmp_path: Path) -> None:
    declare("SHAPES")
    first, _ = trained(workplace, tmp_path, reward_loss="gentle", preserve_weight=0.0)
    assert first["pushed"] == 1


def test_a_kind_of_scorer(declare: Declare, tmp_path: Path) -> None:
    declare("SCORER_KINDS")
    scorer = trained_scorer(tmp_path, scorer_kind="mean_latent", scorer_size="base", scorer_args=("width=8",))
    assert scorer.spec.kind == "mean_latent" and scorer.spec.architecture == {"in_channels": 4, "width": 8}


def test_a_criterion(declare: Declare, tmp_path: Path) -> None:
    declare("CRITERIA")
    assert trained_scorer(tmp_path, criterion="absolute").spec.head().criterion == "absolute"


def test_a_source_of_rated_pictures(declare: Declare, tmp_path: Path) -> None:
    declare("READERS")
    scorer = trained_scorer(tmp_path, data_reader="named_scores", train_data_file=tmp_path / "pictures", validation_split=0.4)
    assert sum(scorer.spec.training["tasks"]["score"]["pictures"].values()) == 16


def test_a_ready_made_image_scorer(declare: Declare, workplace: Path, tmp_path: Path) -> None:
    declare("IMAGE_MODELS")
    file = tmp_path / "red.safetensors"
    save_scorer(file, make_scorer(tiny_vae(), PixelScorerConfig(image_model="redness:2.5"), 64))
    assert (trained(workplace, tmp_path, scorer=[str(file)], score_estimator="x0")[0]["grad_norm"] or 0) > 0


@torch.no_grad()
def test_a_sampler(declare: Declare, workplace: Path, tmp_path: Path) -> None:
    declare("SOLVERS")
    sampling = SamplingConfig(num_steps=1, guidance_scale=1.0, size=(64, 64), sampler="leap")
    model, prompts = tiny_model(), [PromptSpec(prompt="a cat")]
    leapt, known = (sample(model, None, prompts, [0], sampling=replace(sampling, sampler=name)) for name in ("leap", "euler"))
    torch.testing.assert_close(leapt, known)  # a step that ends clean is one to x0
    with torch.enable_grad():
        trained(workplace, tmp_path, sampler="leap", max_denoising_steps=1)


def test_an_optimizer_and_a_schedule(declare: Declare, workplace: Path, tmp_path: Path) -> None:
    declare("OPTIMIZERS")
    schedule = {"lr_scheduler": "exponential", "lr_scheduler_args": ["gamma=0.5"]}
    first, second = trained(workplace, tmp_path, optimizer_type="averaged", learning_rate=0.5, **schedule)
    assert (first["lr"], second["lr"]) == (0.5, 0.25)
    optimizer = create_optimizer(OptimizerConfig(optimizer_type="averaged"), [torch.nn.Parameter(torch.ones(1))])
    assert optimizer.param_groups[0]["t0"] == 1


@pytest.fixture
def twin(declare: Declare) -> None:
    declare("FAMILIES", {"twin.json": FAMILIES["sd1"].config_file.read_text(encoding="utf-8")})


def tiny_twin(full: bool = False) -> DiffusionModel:
    """Stable Diffusion's weights as a model of the new family, which is what the helpers write files of."""
    model = tiny_model(full=full)
    model.spec = FAMILIES["twin"].spec(prediction_type=model.spec.prediction_type, unet=model.unet, vae=model.vae, name="tiny_twin")
    return model


@torch.no_grad()
@pytest.mark.parametrize("write", [save_folder, lambda model, path: save_single_file(model, path.with_suffix(".safetensors"))])
def test_files_of_a_model_family(write: Callable[[DiffusionModel, Path], Path], tmp_path: Path, twin: None) -> None:
    original = tiny_twin(full=True)
    (tmp_path / "models").mkdir()
    path = write(original, tmp_path / "models" / "twin")
    model = ModelConfig(pretrained_model_name_or_path=str(path)).load()
    assert model.spec.family == "twin"
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    eps, expected = (each.predict_eps(latents, timesteps, each.encode_prompts(["a cat"])) for each in (model, original))
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-5)  # weights may lie in memory in another order: other kernels
    with pytest.raises(UserError, match=r"is a Twin Diffusion model \(twin\), but family 'sd1' was given"):
        ModelConfig(pretrained_model_name_or_path=str(path), model_family="sd1").load()


def test_a_slider_of_a_model_family(twin: None, workplace: Path, tmp_path: Path) -> None:
    model = save_folder(tiny_twin(), tmp_path / "model")
    trained(workplace, tmp_path, pretrained_model_name_or_path=str(model))
    card, _ = write_cards(tmp_path / "out" / "tiny.safetensors", tiny_twin().spec, Card())
    assert json.loads(card.read_text(encoding="utf-8"))["sd version"] == "SD1"


def test_a_new_family_is_a_choice_of_model_family(twin: None) -> None:
    module = runpy.run_path(str(library.models.config.__file__))  # as a script that starts now would have it
    choices = module["ModelConfig"].__dataclass_fields__["model_family"].metadata["choices"]
    assert set(choices) == {"auto", *FAMILIES} and "twin" in choices
