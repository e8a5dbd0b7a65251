"""Anchors: the distance from the frozen model on prompts of their own, and that it is kept small."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.models.loading import load_model
from library.objectives.base import TrainingContext
from library.objectives.terms.anchors import AnchorConfig, AnchorsTerm
from library.types import PromptSpec
from tests.helpers.context import assert_resumes, evaluations_of, make_context, train_steps

PROMPTS = [PromptSpec(prompt="a tree"), PromptSpec(prompt="a house", negative_prompt="fog")]


def make_term(context: TrainingContext, prompts: list[PromptSpec] = PROMPTS) -> AnchorsTerm:
    return AnchorsTerm(context, prompts)


@pytest.mark.parametrize("kind", ["sd1", "sd2_v", "sdxl"])
def test_the_loss_is_the_distance_of_the_outputs_with_and_without_the_lora(kind: str) -> None:
    """Against raw U-Net calls, in v for a v-prediction model (1e-4)."""
    context = make_context(kind)
    term = make_term(context)
    batch = term.belt.next_batch()
    term.belt.next_batch = lambda: batch
    out = term()

    @torch.no_grad()
    def raw(multiplier: float, row: int) -> Tensor:
        context.network.set_multiplier(multiplier)
        cond = batch.cond[row : row + 1]
        added = context.model._added_cond(cond)
        return context.model.unet(batch.latents[row : row + 1], batch.timesteps[row : row + 1], cond.text, added_cond_kwargs=added).sample

    expected = [
        torch.nn.functional.mse_loss(raw(multiplier, row), raw(0.0, row)) for row, multiplier in enumerate(batch.multipliers.tolist())
    ]
    torch.testing.assert_close(out.sample_losses, torch.stack(expected), rtol=1e-4, atol=1e-7)
    assert set(batch.multipliers.tolist()) == {1.0, -1.0}
    assert set(out.samples[0].split()[:1]) == {"anchor"}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_anchor_costs_what_its_docstring_says(guidance: float) -> None:
    context = make_context(leco_denoise_guidance_scale=guidance)
    assert evaluations_of(context, make_term(context)) == 2 * (3 + 1 + (guidance != 1))


def test_an_untouched_lora_has_no_distance() -> None:
    out = make_term(make_context(strength=0.0))()
    assert out.loss < 1e-10  # batches of other sizes round otherwise


def test_anchors_alone_bring_the_lora_back_on_their_prompts() -> None:
    """On the embedded model, at noise that was never trained on, at both signs."""
    prompt = "a red circle on a blue background"
    context = make_context(model=load_model("examples/shapes/model"), strength=0.02, max_denoising_steps=4)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([501, 601, 701, 901])
    cond = context.encoder.encode([prompt] * 4, (128, 128))

    @torch.no_grad()
    def distance(multiplier: float) -> float:
        outputs = []
        for strength in (multiplier, 0.0):
            context.network.set_multiplier(strength)
            outputs.append(context.model.predict_eps(latents, timesteps, cond))
        return (outputs[0] - outputs[1]).square().mean().item()

    before = {multiplier: distance(multiplier) for multiplier in (1.0, -1.0)}
    train_steps(make_term(context, [PromptSpec(prompt=prompt)]), context, 12, learning_rate=1e-3)
    for multiplier, drift in before.items():
        assert distance(multiplier) < 0.6 * drift


def test_a_term_goes_on_where_it_was_put_away() -> None:
    assert_resumes(make_term)


def test_build_reads_the_file_and_turns_off_without_one(tmp_path: Path) -> None:
    path = tmp_path / "anchors.txt"
    path.write_text("a tree\na house --n fog\n", encoding="utf-8")
    term = AnchorsTerm.build(make_context(), AnchorConfig(anchor_prompts_file=str(path)))
    assert {prompt.prompt for pool in term.belt.trajectories.pools for prompt in pool.prompts} == {"a tree", "a house"}
    with pytest.raises(UserError, match="anchor_prompts_file"):
        AnchorsTerm.build(make_context(), AnchorConfig())
