"""Scorers whose opinion depends on the prompt: the prompt reaches them in the loss, in measurements and in evaluations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.measuring.measure import Measurer, Raters, seed_table
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.objectives.rewards import Goal, Reward, score_gradients
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig
from library.scorers.base import Scorer
from library.scorers.io import load_scorer, save_scorer
from library.scorers.kinds.unet_encoder import UNetEncoder
from library.types import Conditioning, PromptSpec
from networks.lora import LoRANetwork, create_network
from tests.helpers.objective import Stage, make_stage
from tests.helpers.scorers import StandardisedScorer, scorer_for
from tests.helpers.tiny_leco_run import make_workplace, run
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for
from tests.helpers.unet_encoders import make_scorer

RED, BLUE = PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", negative_prompt="ugly")


class RedScorer(StandardisedScorer):
    """Channel 0 where red was asked for, channel 1 where it was not."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        assert prompts is not None
        red = torch.tensor(["red" in prompt for prompt in prompts])
        return torch.where(red, latents[:, 0].mean((1, 2)), latents[:, 1].mean((1, 2)))


class TellingScorer(StandardisedScorer):
    """Remembers what it was told."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.told: list[tuple[Conditioning, list[str]]] = []

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        assert cond is not None and prompts is not None
        self.told.append((cond, list(prompts)))
        return latents.mean((1, 2, 3))


def objective_for(model: DiffusionModel, scorer: Scorer, *, network: LoRANetwork | None = None, **settings) -> Stage:
    reward = Reward([Goal(scorer=scorer)])
    return make_stage(model=model, network=network, reward=reward, prompts=[RED, BLUE], batch_size=4, **settings)


def test_gradients_differ_by_prompt() -> None:
    reward = Reward([Goal(scorer=scorer_for(tiny_model(), RedScorer, uses_prompt=True))])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    values, gradients = score_gradients(reward, latents, torch.zeros(2), None, [RED, BLUE])
    assert torch.allclose(values["RedScorer"], torch.stack([latents[0, 0].mean(), latents[1, 1].mean()]))
    moved = gradients["RedScorer"].abs().amax((2, 3)) > 0  # [B, C]
    assert moved.tolist() == [[True, False, False, False], [False, True, False, False]]


def test_a_unet_encoder_follows_the_prompt_through_the_loss() -> None:
    """One sample; only the words that the scorer is told change. Told the same words, the LoRA's gradient is the same."""
    model = tiny_model()
    scorer = make_scorer(model=model, use_prompt=True)
    stage = objective_for(model, scorer, reward_loss="linear", preserve_weight=0.0)
    batch, size = stage.rollout.next_batch(), (64, 64)
    found = []
    for prompt in (RED, BLUE, RED):
        given = PromptEncoder(model, stage.network).encode([prompt.prompt] * len(batch.prompts), size)
        # the scorer's conditioning; the U-Net's own stays
        stage.objective.context.encoder.frozen_cond = lambda prompts, cond, given=given: given
        found.append(stage.gradient(batch))
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("settings", [{}, {"score_estimator": "x0_renoise"}], ids=str)
def test_the_loss_tells_the_scorer_the_prompts_and_not_the_negative_ones(kind: str, settings: dict[str, Any]) -> None:
    """Row by row, with guidance on and however many rows an estimator makes of a sample."""
    model = tiny_model(kind)
    scorer = scorer_for(model, TellingScorer, uses_prompt=True)
    assert isinstance(scorer, TellingScorer)
    stage = objective_for(model, scorer, **settings)
    batch = stage.rollout.next_batch()
    stage.loss(batch)
    assert {prompt.prompt for prompt in batch.prompts} == {RED.prompt, BLUE.prompt}
    assert len(scorer.told) == 2  # the LoRA's latents and the frozen model's
    for cond, texts in scorer.told:
        assert texts == [prompt.prompt for prompt in batch.prompts] * (len(texts) // 4) and len(texts) == len(cond)
        _assert_is_what_was_asked_for(model, cond, texts)


def test_a_lora_of_the_text_encoder_does_not_talk_to_the_scorer() -> None:
    model = tiny_model()
    network = create_network(1.0, 2, 2.0, model.vae, model.text_encoders, model.unet, generator=torch.Generator().manual_seed(0))
    for lora in [*network.text_encoder_loras, *network.unet_loras]:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    network.apply_to(model.text_encoders, model.unet)
    model.freeze()
    scorer = scorer_for(model, TellingScorer, uses_prompt=True)
    assert isinstance(scorer, TellingScorer)
    stage = objective_for(model, scorer, network=network)
    batch = stage.rollout.next_batch()
    stage.loss(batch)
    with network.disabled():
        for cond, texts in scorer.told:
            _assert_is_what_was_asked_for(model, cond, texts)
    assert (batch.cond.text - scorer.told[0][0].text).abs().max() > 0.01  # what the U-Net is told has changed


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_whole_run_with_a_unet_encoder_that_reads_prompts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and measurements, once with calibration, and an evaluation. At every call the scorer has its pictures' prompts."""
    workplace = make_workplace(tmp_path / "in", kind)
    model = load_model(str(workplace / "model"))
    path = workplace / "told.safetensors"
    scorer = make_scorer(model=model, use_prompt=True)
    scorer.spec = replace(scorer.spec, std=0.05)
    save_scorer(path, scorer)
    texts = [line.split(" --")[0] for line in (workplace / "prompts.txt").read_text(encoding="utf-8").splitlines()]
    expected = {text: model.encode_prompts([text]) for text in texts}
    calls: list[tuple[str, bool]] = []
    forward = UNetEncoder.forward

    def watched(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        assert cond is not None and prompts is not None
        for row, prompt in enumerate(prompts):
            assert torch.allclose(cond.text[row : row + 1], expected[prompt].text, atol=1e-5)
            pooled = expected[prompt].pooled
            if pooled is not None:
                assert cond.pooled is not None and torch.allclose(cond.pooled[row : row + 1], pooled, atol=1e-5)
            calls.append((prompt, bool(sigmas[row] > 0)))
        return forward(self, latents, sigmas, cond, prompts)

    monkeypatch.setattr(UNetEncoder, "forward", watched)
    calibrate = "visible" if kind == "sdxl" else "off"
    slider = run(workplace, tmp_path / "out", scorer=[str(path)], measure="light", evaluate_every_n_steps=2, calibrate=calibrate)
    assert slider.exists()
    assert {prompt for prompt, noisy in calls if not noisy} == set(texts)  # when measured
    assert any(noisy for _, noisy in calls)  # in the loss

    calls.clear()
    network = lora_for(model)
    prompts = [PromptSpec(prompt=text) for text in texts]
    measurer = Measurer(
        model=model,
        raters=Raters(scorers={"told": load_scorer(path)}),
        prompts=prompts,
        seeds=seed_table(prompts, 2),
        sampling=SamplingConfig(num_steps=2, guidance_scale=3.0, size=(64, 64), batch_size=8),
    )
    record = measurer.measure(network, [-1.0, 1.0])
    assert {prompt for prompt, _ in calls} == set(texts) and "told" in record.responses


def _assert_is_what_was_asked_for(model: DiffusionModel, cond: Conditioning, texts: Sequence[str]) -> None:
    expected = model.encode_prompts(texts, (64, 64))
    assert torch.allclose(cond.text, expected.text, atol=1e-5)
    assert (cond.pooled is None) == (expected.pooled is None)
    if cond.pooled is not None and expected.pooled is not None:
        assert torch.allclose(cond.pooled, expected.pooled, atol=1e-5)
