"""A workbench with a tiny model, for the terms of the objective."""

from collections.abc import Callable

import torch

from library.models.base import DiffusionModel
from library.objectives.base import Term, Workbench
from library.rollouts.belt import RolloutConfig
from library.rollouts.sample import PromptEncoder
from library.training.runtime import generator
from networks.lora import LoRANetwork
from tests.helpers.tiny_models import tiny_model
from tests.test_rollout import lora_for


def make_workbench(
    kind: str = "sd1",
    *,
    model: DiffusionModel | None = None,
    network: LoRANetwork | None = None,
    strength: float = 0.05,
    seed: int = 0,
    **rollout,
) -> Workbench:
    """A LoRA that already does something, a batch of 3, 4 steps, pictures of 64 pixels.

    What a batch and its rows alone must agree on is compared at 128: at 64 the tiny model's deepest norms have one position and two
    channels a group, and jump.
    """
    model = model or tiny_model(kind)
    network = network or lora_for(model, strength)
    settings = {"prompts_file": "", "train_batch_size": 3, "max_denoising_steps": 4, "leco_denoise_guidance_scale": 3.0, **rollout}
    return Workbench(
        model=model,
        network=network,
        encoder=PromptEncoder(model, network),
        generator=lambda name: generator(seed, name),
        rollout=RolloutConfig(**settings),
    )


def train_steps(term: Term, workbench: Workbench, count: int, learning_rate: float = 1e-2) -> list[torch.Tensor]:
    """The loss before each of `count` steps of Adam on the term alone."""
    optimizer = torch.optim.Adam(workbench.network.parameters(), lr=learning_rate)
    losses = []
    for _ in range(count):
        out = term()
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.detach())
    return losses


def assert_resumes(make: Callable[[Workbench], Term], workbench_of: Callable[..., Workbench] = make_workbench, count: int = 2) -> None:
    """A term that was put away and taken out again goes on as the one that was never interrupted."""
    first_bench = workbench_of()
    first = make(first_bench)
    for _ in range(count):
        first()
    state = first.state_dict()
    second_bench = workbench_of(seed=1)  # other draws, until the state is in
    second = make(second_bench)
    second()
    second.load_state_dict(state)
    for _ in range(count):
        one, other = first(), second()
        assert torch.equal(one.sample_losses, other.sample_losses)
        assert list(one.samples) == list(other.samples)
        assert one.num_unet_evaluations == other.num_unet_evaluations
