"""CONTRIBUTING's recipes for a loss term, an estimator, a rollout and a reward shape: the file alone, then two steps with it."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.objectives.base import TERMS
from library.objectives.estimator import ESTIMATORS
from library.objectives.reward_shapes import SHAPES
from library.rollouts.base import ROLLOUTS
from library.settings.options import resolve
from library.settings.registry import Registry
from library.training.tracking import read_metrics
from tests.helpers.tiny_leco_run import run
from train_leco_score import leco_score_config

TERM = '''
"""Weight decay as a term: it needs no pictures."""

from dataclasses import dataclass

import torch

from library.objectives.base import TERMS, Term
from library.settings.options import option
from library.types import LossOutput


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """Small weights."""

    shrink_power: float = option(2.0, help="Of the weights, in the loss of shrink.")


@TERMS.register("shrink")
class ShrinkTerm(Term):
    """Mean power of the LoRA's weights."""

    config_class = ShrinkConfig

    @classmethod
    def build(cls, context, settings):
        return cls(context.network, settings.shrink_power)

    def __init__(self, network, power):
        self.network, self.power = network, power

    def __call__(self):
        loss = torch.stack([weight.abs().pow(self.power).mean() for weight in self.network.parameters()]).mean()
        return LossOutput(loss, loss.detach()[None], ["the LoRA's weights"], {"size": loss.detach()})

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
'''

ESTIMATOR = '''
"""The predicted clean latents, between them and the noisy ones."""

from dataclasses import dataclass

from library.objectives.estimator import ESTIMATORS
from library.objectives.estimators.x0 import X0
from library.settings.options import option


@dataclass(frozen=True, kw_only=True)
class DimmedConfig:
    """How much of the picture is left."""

    dimmed_by: float = option(
        0.5, help="With score_estimator dimmed: what the scored latents are multiplied with.", only_with={"score_estimator": ("dimmed",)}
    )


@ESTIMATORS.register("dimmed")
class Dimmed(X0):
    """x0, scored as if it were paler."""

    config_class = DimmedConfig

    def views(self, predicted, noise):
        latents, sigmas, scales = super().views(predicted, noise)
        return self.settings.dimmed_by * latents, sigmas, self.settings.dimmed_by * scales
'''

ROLLOUT = '''
"""The loop of LECO (arXiv 2303.07345): trajectories from pure noise to a random step each, trained on once there."""

import torch

from library.rollouts.base import ROLLOUTS, Rollout


@ROLLOUTS.register("per_sample")
class PerSampleRollout(Rollout):
    """For every batch, trajectories from pure noise to a random step each, and then others."""

    def next_batch(self):
        pool = self.trajectories.next_pool()
        self.trajectories.start_all(pool)
        steps = torch.randint(pool.num_steps, (len(pool.steps),), generator=self.trajectories.generator)
        self.trajectories.move_to(pool, steps.tolist())
        return self.trajectories.batch_of(pool)

    def advance(self, eps):
        """Nothing moves: the trajectories are dropped."""
'''

SHAPE = '''
"""A push that is half as strong."""

import torch

from library.objectives.reward_shapes import SHAPES


@SHAPES.register("gentle")
def gentle(gain, margin):
    """-gain / 2."""
    return torch.full_like(margin, 0.5)
'''

Add = Callable[[Registry, str | None, str], None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a recipe's file where its registry finds it: into its package's path, or imported by hand for one that has no package."""
    before = set(sys.modules)

    def add(registry: Registry, package: str | None, text: str) -> None:
        list(registry)  # what is there already is found before
        for table in ("_entries", "_modules"):
            monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
        folder = tmp_path / "recipes"
        folder.mkdir()
        (folder / "the_recipe.py").write_text(text, encoding="utf-8")
        if package is None:
            monkeypatch.syspath_prepend(folder)
            importlib.import_module("the_recipe")
        else:
            room = importlib.import_module(package)
            monkeypatch.setattr(room, "__path__", [*room.__path__, str(folder)])
            monkeypatch.setattr(registry, "_complete", False)

    yield add
    for name in set(sys.modules) - before:
        if name.endswith("the_recipe"):
            del sys.modules[name]


def trained(workplace: Path, tmp_path: Path, **settings: Any) -> list[dict[str, float | None]]:
    """The numbers of two steps."""
    run(workplace, tmp_path / "out", **settings)
    records = read_metrics(tmp_path / "out" / "tiny.metrics.jsonl")
    assert len(records) == 2
    return records


def test_a_loss_term_is_one_file(add: Add, workplace: Path, tmp_path: Path) -> None:
    assert "shrink" in resolve(leco_score_config(), {"objective": ["score", "shrink"]})[1]["objective"]
    add(TERMS, "library.objectives.terms", TERM)
    first, _ = trained(workplace, tmp_path, objective=["score", "shrink"], objective_weights=["shrink=3"], shrink_power=1.0)
    score, shrink, loss = (first[name] or 0.0 for name in ("score/loss", "shrink/loss", "loss"))
    assert shrink > 0 and loss == pytest.approx(score + 3 * shrink, rel=1e-5)


def test_an_estimator_is_one_file(add: Add, workplace: Path, tmp_path: Path) -> None:
    add(ESTIMATORS, "library.objectives.estimators", ESTIMATOR)
    first, _ = trained(workplace, tmp_path, score_estimator="dimmed", dimmed_by=0.0)
    assert first["gain_per_step"] == 0  # all pictures are grey


def test_a_rollout_is_one_file(add: Add, workplace: Path, tmp_path: Path) -> None:
    add(ROLLOUTS, "library.rollouts", ROLLOUT)
    records = trained(workplace, tmp_path, rollout="per_sample", max_denoising_steps=6)
    assert (records[1]["unet_evaluations"] or 0) > 2 * 2 * 5  # two batches of two cost more than the belt's five each


def test_a_reward_shape_is_one_function(add: Add, workplace: Path, tmp_path: Path) -> None:
    add(SHAPES, None, SHAPE)
    first, _ = trained(workplace, tmp_path, reward_loss="gentle", preserve_weight=0.0)
    assert first["pushed"] == 1
