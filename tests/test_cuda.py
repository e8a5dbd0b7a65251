"""What only a CUDA device can show: half precision near float32, the CPU's numbers again, a run that goes on where it was saved.

python -m pytest -m cuda
"""

from pathlib import Path

import pytest
import torch

from library.models.base import DiffusionModel
from library.objectives.rewards import Goal, Reward
from library.rollouts.sample import model_autocast
from library.training.checkpoints import load_state, save_state
from library.types import LossOutput, PromptSpec
from networks.lora import LoRANetwork
from tests.helpers.objective import make_stage
from tests.helpers.scorers import WavyScorer, scorer_for
from tests.helpers.tiny_models import KINDS, tiny_model
from tests.helpers.tiny_networks import lora_for

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]

DEVICE = "cuda"
PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square")]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 would round products to 10 bits, and hide a real difference from the CPU behind its own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


class Run:
    """The training step on a tiny model, without half precision."""

    def __init__(self, device: str, kind: str = "sd1") -> None:
        self.model: DiffusionModel = tiny_model(kind)
        scorer = scorer_for(self.model, WavyScorer).to(device)
        self.network: LoRANetwork = lora_for(self.model).to(device)
        self.model.to(device)
        reward = Reward([Goal(scorer=scorer)])
        stage = make_stage(model=self.model, network=self.network, reward=reward, prompts=PROMPTS, reward_loss="linear", resolution=64)
        self.rollout, self.objective = stage.rollout, stage.objective
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def step(self) -> tuple[LossOutput, torch.Tensor]:
        self.optimizer.zero_grad()
        out, eps = self.objective(self.rollout.next_batch())
        out.loss.backward()
        self.rollout.advance(eps)
        self.optimizer.step()
        return out, eps

    def state(self) -> dict:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "rollout": self.rollout.state_dict()}

    def load(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rollout.load_state_dict(state["rollout"])


def relative_rms(value: torch.Tensor, wanted: torch.Tensor) -> float:
    value, wanted = value.detach().float().cpu(), wanted.detach().float().cpu()
    return ((value - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def gradient_of(network: LoRANetwork) -> torch.Tensor:
    gradients = [parameter.grad for parameter in network.parameters()]
    assert gradients and all(gradient is not None for gradient in gradients)
    return torch.cat([gradient.flatten().cpu() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_lora_in_half_precision_is_near_float32(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """What the LoRA adds to a prediction, and the gradient of its float32 weights.

    The latents are 32x32: at 8x8 the deepest group norms of the tiny SD1 have two numbers a group, and jump at a rounding.
    """
    loss_scale = 2.0**12  # as accelerate's GradScaler does: small gradients underflow in fp16

    def added_and_gradient(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        model = tiny_model(kind)
        network = lora_for(model, strength=0.5).to(DEVICE)
        model.to(DEVICE, dtype)
        latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        timesteps = torch.tensor([200, 700], device=DEVICE)
        cond = model.encode_prompts([prompt.prompt for prompt in PROMPTS])
        with model_autocast(model):
            with torch.no_grad(), network.disabled():
                plain = model.predict_eps(latents, timesteps, cond)
            added = model.predict_eps(latents, timesteps, cond) - plain
        (added.square().mean() * loss_scale).backward()
        gradient = gradient_of(network)
        assert gradient.dtype == torch.float32
        return added, gradient

    (added, gradient), (wanted, wanted_gradient) = added_and_gradient(dtype), added_and_gradient(torch.float32)
    assert relative_rms(added, wanted) < tolerance
    assert relative_rms(gradient, wanted_gradient) < tolerance


@pytest.mark.parametrize("kind", list(KINDS))
def test_belt_and_step_equal_the_cpus(kind: str) -> None:
    ours, wanted = Run(DEVICE, kind), Run("cpu", kind)
    batch, wanted_batch = ours.rollout.next_batch(), wanted.rollout.next_batch()
    assert batch.prompts == wanted_batch.prompts
    assert relative_rms(batch.latents, wanted_batch.latents) < 1e-4
    (out, eps), (wanted_out, wanted_eps) = ours.objective(batch), wanted.objective(wanted_batch)
    out.loss.backward()
    wanted_out.loss.backward()
    assert relative_rms(eps, wanted_eps) < 1e-4
    assert relative_rms(out.sample_losses, wanted_out.sample_losses) < 1e-3
    gradients = [gradient_of(run.network) for run in (ours, wanted)]
    assert relative_rms(*gradients) < 1e-3


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """Not to the bit: some of CUDA's backward passes add in any order."""
    whole = Run(DEVICE)
    for _ in range(2):
        whole.step()
    save_state(tmp_path / "state", whole.state())
    resumed = Run(DEVICE)
    start = torch.cat([parameter.detach().flatten().clone() for parameter in resumed.network.parameters()])
    resumed.load(load_state(tmp_path / "state"))
    (wanted_out, wanted_eps), (out, eps) = [[run.step() for _ in range(4)][-1] for run in (whole, resumed)]
    assert relative_rms(eps, wanted_eps) < 1e-3
    assert out.loss.item() == pytest.approx(wanted_out.loss.item(), rel=1e-2)
    ends = [torch.cat([parameter.detach().flatten() for parameter in run.network.parameters()]) for run in (whole, resumed)]
    moved = ends[0].cpu() - start.cpu()
    assert relative_rms(ends[1].cpu() - start.cpu(), moved) < 1e-2
