"""CONTRIBUTING's recipes for a model family, a sampler and an optimizer: what they say to write is enough."""

import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import library.models.config
from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.models import families
from library.models.base import DiffusionModel
from library.models.config import ModelConfig
from library.models.registry import FAMILIES
from library.rollouts.sample import SamplingConfig, sample
from library.settings.shared import OptimizerConfig
from library.training.optimizers import OPTIMIZERS, SCHEDULES, create_optimizer, create_scheduler
from library.types import PromptSpec
from networks.lora_metadata import Card, write_cards
from tests.helpers.tiny_models import save_folder, save_single_file, tiny_model

FAMILY = """
from dataclasses import replace
from pathlib import Path

from library.models.families.stable_diffusion import SD1
from library.models.registry import FAMILIES

TWIN = replace(
    SD1,
    name="twin",
    title="Twin Diffusion",
    pipeline_class="TwinPipeline",
    text_encoders=(replace(SD1.text_encoders[0], prefix="twin_stage_model."),),
    config_file=Path(__file__).with_name("twin.json"),
)
FAMILIES.register(TWIN.name)(TWIN)
"""
SAMPLER = """
from library.diffusion.noise_schedule import eps_to_x0
from library.diffusion.solvers import SOLVERS, Solver

SOLVERS.register("leap")(Solver("leap", lambda latents, eps, abar, next_abar: eps_to_x0(latents, eps, abar)))
"""
OPTIMIZER = """
from library.training.optimizers import OPTIMIZERS, SCHEDULES, OptimizerRow

OPTIMIZERS.register("Averaged")(OptimizerRow(path="torch.optim.ASGD", package="torch", defaults={"t0": 1}))
SCHEDULES.register("exponential")("torch.optim.lr_scheduler.ExponentialLR")
"""


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    known = set(sys.modules)
    for registry in (FAMILIES, SOLVERS, OPTIMIZERS, SCHEDULES):
        assert registry.names  # all parts are imported before the tables are copied
        for table in ("_entries", "_modules"):
            monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    yield
    for name in set(sys.modules) - known:
        if name.rpartition(".")[2] == "recipe":
            del sys.modules[name]


def import_recipe(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "recipe.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    importlib.import_module("recipe")


@pytest.fixture
def twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> None:
    """The family's file and its configs, in a folder that counts as one of families/; nothing imports or names the file."""
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "recipe.py").write_text(FAMILY, encoding="utf-8")
    (folder / "twin.json").write_text(FAMILIES["sd1"].config_file.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    monkeypatch.setattr(FAMILIES, "_complete", False)  # as before the first look-up


def twin_of(model: DiffusionModel) -> DiffusionModel:
    """The same weights as a model of the new family, which is what the helpers write files of."""
    model.spec = FAMILIES["twin"].spec(prediction_type=model.spec.prediction_type, unet=model.unet, vae=model.vae, name="tiny_twin")
    return model


@torch.no_grad()
@pytest.mark.parametrize("write", [save_folder, lambda model, path: save_single_file(model, path.with_suffix(".safetensors"))])
def test_a_model_family_is_a_file_and_its_configs(write: Callable[[DiffusionModel, Path], Path], tmp_path: Path, twin: None) -> None:
    original = twin_of(tiny_model(full=True))
    (tmp_path / "models").mkdir()
    path = write(original, tmp_path / "models" / "twin")
    model = ModelConfig(pretrained_model_name_or_path=str(path)).load()
    assert model.spec.family == "twin"
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    eps, expected = (each.predict_eps(latents, timesteps, each.encode_prompts(["a cat"])) for each in (model, original))
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-5)  # weights may lie in memory in another order: other kernels
    with pytest.raises(UserError, match=r"is a Twin Diffusion model \(twin\), but family 'sd1' was given"):
        ModelConfig(pretrained_model_name_or_path=str(path), model_family="sd1").load()
    (tmp_path / "slider.safetensors").touch()
    card, _ = write_cards(tmp_path / "slider.safetensors", model.spec, Card())
    assert json.loads(card.read_text(encoding="utf-8"))["sd version"] == "SD1"


def test_a_new_family_is_a_choice_of_model_family(twin: None) -> None:
    module = runpy.run_path(str(library.models.config.__file__))  # as a script that starts now would have it
    choices = module["ModelConfig"].__dataclass_fields__["model_family"].metadata["choices"]
    assert set(choices) == {"auto", *FAMILIES} and "twin" in choices


@torch.no_grad()
def test_a_sampler_is_a_declaration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> None:
    import_recipe(tmp_path, SAMPLER, monkeypatch)
    sampling = SamplingConfig(num_steps=1, guidance_scale=1.0, size=(64, 64), sampler="leap")
    model, prompts = tiny_model(), [PromptSpec(prompt="a cat")]
    leapt, known = (sample(model, None, prompts, [0], sampling=replace(sampling, sampler=name)) for name in ("leap", "euler"))
    torch.testing.assert_close(leapt, known)  # a step that ends clean is one to x0


def test_an_optimizer_and_a_schedule_are_a_declaration_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> None:
    import_recipe(tmp_path, OPTIMIZER, monkeypatch)
    config = OptimizerConfig(optimizer_type="averaged", lr_scheduler="exponential", lr_scheduler_args=("gamma=0.5",), learning_rate=0.5)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = create_optimizer(config, [parameter])
    scheduler = create_scheduler(config, optimizer, 2)
    parameter.grad = torch.ones(1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["t0"] == 1 and parameter.item() < 1
    assert scheduler.get_last_lr() == [0.25]
