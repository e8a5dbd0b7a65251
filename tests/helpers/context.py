"""A training context with a tiny model, for the terms of the objective."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from library.models.base import DiffusionModel
from library.objectives.base import TERMS, Term, TrainingContext
from library.objectives.estimator import ESTIMATORS
from library.objectives.rewards import Goal, Reward
from library.rollouts.base import ROLLOUTS
from library.rollouts.config import RolloutConfig
from library.rollouts.few_step import resolve_sampling
from library.rollouts.prompt_encoder import PromptEncoder
from library.scorers.base import Scorer
from library.training.runtime import generator
from library.types import PromptSpec
from networks.lora import LoRANetwork
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for


def part_settings(**values: Any) -> dict[str, Any]:
    """The settings of every registered term, estimator and rollout that has some, with these values of options."""
    made, left = {}, dict(values)
    for table in (TERMS, ESTIMATORS, ROLLOUTS):
        for name, part in table.items():
            if part.config_class is not None:
                own = {field.name for field in fields(part.config_class)}
                made[name] = part.config_class(**{option: left.pop(option) for option in own & left.keys()})
    assert not left, f"no part has the options {', '.join(left)}"
    return made


def make_context(
    kind: str = "sd1",
    *,
    model: DiffusionModel | None = None,
    network: LoRANetwork | None = None,
    strength: float = 0.05,
    seed: int = 0,
    scorers: Sequence[Scorer] = (),
    reward: Reward | None = None,
    prompts: Sequence[PromptSpec] = (),
    gamma: float | None = None,
    settings: dict[str, Any] | None = None,
    **rollout: Any,
) -> TrainingContext:
    """A LoRA that already does something, a batch of 3, 4 steps, pictures of 64 pixels."""
    model = model or tiny_model(kind)
    network = network or lora_for(model, strength)
    config = RolloutConfig(
        **{"prompts_file": "", "train_batch_size": 3, "max_denoising_steps": 4, "leco_denoise_guidance_scale": 3.0, **rollout}
    )
    return TrainingContext(
        model=model,
        network=network,
        encoder=PromptEncoder(model, network),
        generator=lambda name: generator(seed, name),
        rollout=config,
        sampling=resolve_sampling(config, model),
        reward=reward or Reward([Goal(scorer=scorer) for scorer in scorers]),
        prompts=prompts,
        min_snr_gamma=gamma,
        settings=part_settings() if settings is None else settings,
    )


def evaluations_of(context: TrainingContext, term: Callable[[], object]) -> int:
    """What one call of a term costs."""
    before = context.model.num_unet_evaluations
    term()
    return context.model.num_unet_evaluations - before


def train_steps(term: Term, context: TrainingContext, count: int, learning_rate: float = 1e-2) -> list[torch.Tensor]:
    """The loss before each of `count` steps of Adam on the term alone."""
    optimizer = torch.optim.Adam(context.network.parameters(), lr=learning_rate)
    losses = []
    for _ in range(count):
        out = term()
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.detach())
    return losses


def assert_resumes(make: Callable[[TrainingContext], Term], context_of: Callable[..., TrainingContext] = make_context) -> None:
    """A term that was put away and taken out again goes on as the one that was never interrupted."""
    first = make(context_of())
    for _ in range(2):
        first()
    state = first.state_dict()
    second = make(context_of(seed=1))  # other draws, until the state is in
    second()
    second.load_state_dict(state)
    for _ in range(2):
        one, other = first(), second()
        assert torch.equal(one.sample_losses, other.sample_losses)
        assert list(one.samples) == list(other.samples)
