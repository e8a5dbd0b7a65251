"""How strongly a sample is pushed: the shapes' values, and what the objective's margins make of them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.objectives import score
from library.objectives.reward_shapes import SHAPES, hinge, linear, softplus, target
from tests.helpers.objective import make_stage
from tests.helpers.scorers import ChannelScorer

GAINS = torch.tensor([-1.0, 0.0, 1.75, 1.9, 2.0, 2.1, 3.0])
MARGIN = torch.full((7,), 2.0)


def test_hinge_pushes_until_the_gain_is_there() -> None:
    assert hinge(GAINS, MARGIN).tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_target_fades_out_at_the_target_and_pushes_back_beyond_it() -> None:
    """Over a quarter of the margin to either side, which is where Huber's loss is a parabola."""
    assert torch.allclose(target(GAINS, MARGIN), torch.tensor([1, 1, 0.5, 0.2, 0, -0.2, -1]), atol=1e-5)


def test_linear_never_rests() -> None:
    assert linear(GAINS, MARGIN).tolist() == [1] * 7


def test_softplus_is_half_at_the_margin() -> None:
    found = softplus(GAINS, MARGIN)
    assert found[4] == 0.5 and (found.diff() < 0).all()
    assert torch.allclose(found[3] + found[5], torch.tensor(1.0)) and found[0] > 0.99 and found[6] < 0.2


def test_every_push_is_the_slope_of_its_loss() -> None:
    """The losses as they are written down elsewhere; margin 2, so that Huber's knee is at half a standard deviation."""
    gains = torch.linspace(-1, 5, 23, requires_grad=True)
    margin = torch.full_like(gains, 2.0)
    losses: dict[str, Tensor] = {
        "hinge": torch.relu(margin - gains),
        "target": torch.nn.functional.huber_loss(gains, margin, reduction="none", delta=0.5) / 0.5,
        "linear": -gains,
        "softplus": torch.nn.functional.softplus(margin - gains, beta=2.0),
    }
    assert losses.keys() == set(SHAPES)
    for name, loss in losses.items():
        (slope,) = torch.autograd.grad(loss.sum(), gains)
        assert torch.allclose(SHAPES[name](gains.detach(), margin), -slope, atol=1e-5), name


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_margin_of_zero_gives_finite_pushes(name: str) -> None:
    assert torch.isfinite(SHAPES[name](GAINS, torch.zeros(7))).all()


# -- in the objective ------------------------------------------------------------------------------------------------------

CALM = {"scorer": ChannelScorer, "resolution": 64, "guidance": 1.0}


def pushed(shape: str, gain: float, *, num_steps: int | None = None, multiplier: float = 1.0, **settings) -> float:
    """The push of one sample whose gain is `gain`, of which 6 steps make a trajectory."""
    stage = make_stage(batch_size=1, reward_loss=shape, **CALM, **settings)
    batch = replace(stage.rollout.next_batch(), multipliers=torch.tensor([multiplier]))
    batch = batch if num_steps is None else replace(batch, num_steps=num_steps)
    predicted = stage.objective.estimator.predict_latents(stage.state(batch), torch.zeros_like(batch.latents))
    return stage.objective._push(batch, predicted)(torch.tensor([gain])).item()


def test_the_margin_is_a_steps_part_of_the_whole_trajectorys() -> None:
    """5 standard deviations for the hinge, 3 for the target, over 6 steps."""
    assert [pushed("hinge", gain) for gain in (0.83, 0.84)] == [1, 0]
    assert [pushed("hinge", gain, multiplier=-2.0) for gain in (1.66, 1.67)] == [1, 0]
    assert [pushed("hinge", gain, num_steps=60) for gain in (0.083, 0.084)] == [1, 0]
    assert pushed("target", 0.5) == 0
    assert pushed("target", 0.6) < 0
    assert pushed("softplus", 5 / 6) == pytest.approx(0.5)
    assert pushed("linear", 99.0) == 1


def test_a_sample_that_is_far_enough_rests_and_one_beyond_its_target_is_pushed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "HINGE_MARGIN", 1e-6)
    monkeypatch.setattr(score, "TARGET", 1e-6)
    settings = {"strength": 0.5, "preserve_weight": 1e-9, **CALM}  # not 0: losses count from the frozen model
    resting = make_stage(reward_loss="hinge", **settings)
    batch = resting.rollout.next_batch()
    turned = replace(batch, prompt_directions=torch.cat([-batch.prompt_directions[:1], batch.prompt_directions[1:]]))
    pushed = [metrics["pushed"] for metrics in (resting.loss(batch).metrics, resting.loss(turned).metrics)]
    assert abs(pushed[0] - pushed[1]) == pytest.approx(1 / 3)  # the first sample went the right way, or the wrong one
    onward = make_stage(reward_loss="linear", **settings)
    back = make_stage(reward_loss="target", **settings)
    resting_rows = resting.loss(turned).sample_losses.abs() < 1e-6
    assert resting_rows.any() and not resting_rows.all()
    assert torch.allclose(back.loss(turned).sample_losses, onward.loss(turned).sample_losses * torch.where(resting_rows, -1, 1), rtol=1e-3)
