"""LECO's loss against the published formula written out, and that it moves the target where it says."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.objectives.base import TrainingContext
from library.objectives.registry import ObjectiveConfig, build_terms
from library.objectives.terms.leco import LecoConfig, LecoTerm, possible_sizes, random_crops
from library.prompts.leco_files import LecoSetting
from library.rollouts.belt import Belt
from library.types import PromptSpec, RolloutBatch
from tests.helpers.context import assert_resumes, evaluations_of, make_context, train_steps
from tests.helpers.scorers import a_scorer

SETTINGS = [
    LecoSetting(target="a red circle", positive="a red circle", action="erase", guidance_scale=1.5),
    LecoSetting(target="a square", positive="blue", unconditional="red", neutral="grey", action="enhance", multiplier=-0.5, weight=2.0),
    LecoSetting(target="", positive="bright", unconditional="dark", action="erase", guidance_scale=0.5, multiplier=2.0, weight=0.25),
]


def make_term(context: TrainingContext, settings: list[LecoSetting] = SETTINGS) -> LecoTerm:
    return LecoTerm(context, settings)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[RolloutBatch]:
    """Every batch that a belt hands out."""
    seen: list[RolloutBatch] = []
    original = Belt.next_batch

    def batch(self: Belt) -> RolloutBatch:
        seen.append(original(self))
        return seen[-1]

    monkeypatch.setattr(Belt, "next_batch", batch)
    return seen


def raw(model: DiffusionModel, latents: Tensor, timestep: Tensor, text: str, size: tuple[int, int]) -> Tensor:
    """What the U-Net itself puts out for one sample."""
    cond = model.encode_prompts([text], size)
    return model.unet(latents, timestep, cond.text, added_cond_kwargs=model._added_cond(cond)).sample  # pyright: ignore


def published_loss(context: TrainingContext, batch: RolloutBatch, place: int, setting: LecoSetting, gamma: float | None) -> Tensor:
    """A sample's loss as LECO and sd-scripts have it, one U-Net call after another, with the true timestep."""
    model, network = context.model, context.network
    latents, timestep = batch.latents[place : place + 1], batch.timesteps[place : place + 1]
    size = (latents.shape[2] * 8, latents.shape[3] * 8)
    with torch.no_grad(), network.disabled():
        positive, unconditional, neutral = (
            raw(model, latents, timestep, text, size) for text in (setting.positive, setting.unconditional, setting.neutral)
        )
    offset = setting.guidance_scale * (positive - unconditional)
    target = neutral - offset if setting.action == "erase" else neutral + offset
    network.set_multiplier(setting.multiplier)
    loss = torch.nn.functional.mse_loss(raw(model, latents, timestep, setting.target, size), target)
    if gamma is not None:
        abar = model.schedule.alphas_cumprod[int(timestep)]
        snr = abar / (1 - abar)
        loss = loss * min(snr.item(), gamma) / (snr + 1 if model.spec.prediction_type == "v_prediction" else snr)
    return setting.weight * loss


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["sd1", "sd2_v", "sdxl"])
def test_the_loss_is_the_published_one(kind: str, gamma: float | None, batches: list[RolloutBatch]) -> None:
    """1e-5, relative; for v-prediction the error is in v."""
    context = make_context(kind, max_denoising_steps=3, gamma=gamma)
    term = make_term(context)
    seen = set()
    for _ in range(2):
        out = term()
        expected = []
        for place, prompt in enumerate(batches[-1].prompts):
            (setting,) = [one for one in SETTINGS if (one.target, one.multiplier) == (prompt.prompt, prompt.multiplier)]
            seen.add(setting.target)
            expected.append(published_loss(context, batches[-1], place, setting, gamma))
        torch.testing.assert_close(out.sample_losses, torch.stack(expected).detach(), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(out.loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-8)
    assert len(seen) > 1


@pytest.mark.parametrize("kind", ["sd1", "sd2_v"])
def test_the_gradient_is_the_published_losss(kind: str, batches: list[RolloutBatch]) -> None:
    context = make_context(kind)
    term = make_term(context)
    term().loss.backward()
    parameters = list(context.network.parameters())
    gradient = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    context.network.zero_grad()
    settings = [
        one for prompt in batches[-1].prompts for one in SETTINGS if (one.target, one.multiplier) == (prompt.prompt, prompt.multiplier)
    ]
    torch.stack([published_loss(context, batches[-1], place, one, None) for place, one in enumerate(settings)]).mean().backward()
    for mine, parameter in zip(gradient, parameters, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd1", "sd2_v"])
def test_the_trajectory_goes_on_along_the_guided_prediction_with_the_lora(kind: str, batches: list[RolloutBatch]) -> None:
    """What the term advances its belt by is what the belt itself would have predicted (float32: 1e-5)."""
    context = make_context(kind, train_batch_size=2, guidance_rescale=0.7)
    term = make_term(context, SETTINGS[1:2])
    term()
    (belt,) = term._belts.values()
    before = batches[-1]
    expected, _ = belt.trajectories.step(before, belt.trajectories.predict(before))
    torch.testing.assert_close(belt.next_batch().latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_call_with_gradient_and_one_without(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No unconditional halves: 1 row a sample with gradient; without, its different texts, and one more where the rollout is guided."""
    context = make_context(train_batch_size=2, leco_denoise_guidance_scale=guidance)
    term = make_term(context, SETTINGS[:1])  # positive is the target, neutral is the unconditional: two texts
    term()
    rows: list[tuple[int, bool]] = []
    original = type(context.model).predict_eps

    def predict_eps(self, latents: Tensor, *args, **kwargs) -> Tensor:
        rows.append((len(latents), torch.is_grad_enabled()))
        return original(self, latents, *args, **kwargs)

    monkeypatch.setattr(type(context.model), "predict_eps", predict_eps)
    cost = evaluations_of(context, term)
    without = 2 * (2 + (guidance != 1))
    assert sorted(rows) == sorted([(2, True), (without, False)])
    assert cost == 3 * 2 + without


@pytest.mark.slow
def test_leco_alone_moves_the_prediction_along_the_direction() -> None:
    """On the embedded model, at noise that was never trained on: at +1 towards red, at -1 towards green, at each noise level."""
    text, red, green = (f"a {colour}circle on a blue background" for colour in ("", "red ", "green "))
    slider = [
        LecoSetting(target=text, positive=red, unconditional=green, neutral=text, action=action, multiplier=multiplier)
        for action, multiplier in (("enhance", 1.0), ("erase", -1.0))
    ]
    context = make_context(model=load_model("examples/shapes/model"), strength=0.0, train_batch_size=4)
    model, network = context.model, context.network
    losses = train_steps(make_term(context, slider), context, 24, learning_rate=1e-3)
    assert torch.stack(losses[-6:]).mean() < 0.6 * torch.stack(losses[:3]).mean()

    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    timesteps = torch.tensor([501, 601, 701, 901])

    @torch.no_grad()
    def eps(text: str, multiplier: float) -> Tensor:
        network.set_multiplier(multiplier)
        return model.predict_eps(latents, timesteps, model.encode_prompts([text] * 4))

    direction = (eps(red, 0.0) - eps(green, 0.0)).flatten(1)
    for multiplier in (1.0, -1.0):
        moved = (eps(text, multiplier) - eps(text, 0.0)).flatten(1)
        assert bool((torch.nn.functional.cosine_similarity(moved, multiplier * direction) > 0.35).all())


def test_a_term_goes_on_where_it_was_put_away() -> None:
    dynamic = LecoSetting(target="b", positive="c", size=(128, 128), dynamic_resolution=True)
    assert_resumes(
        lambda context: make_term(context, [SETTINGS[1], dynamic]), lambda seed=0: make_context(seed=seed, max_denoising_steps=2)
    )


def test_a_state_of_other_sizes_is_refused() -> None:
    context = make_context()
    term = make_term(context, [LecoSetting(target="a", positive="b", size=(128, 64))])
    term()
    with pytest.raises(UserError, match="64x128 pixels"):
        make_term(make_context()).load_state_dict(term.state_dict())


@pytest.mark.parametrize(
    ("side", "sides"),
    [(512, [256, 320, 384, 448, 512]), (128, [64, 128]), (64, [64]), (520, [256, 320, 384, 448, 512]), (96, [64])],
)
def test_dynamic_sizes_are_multiples_of_64_up_to_the_resolution_itself(side: int, sides: list[int]) -> None:
    setting = LecoSetting(target="a", positive="b", size=(side, side), dynamic_resolution=True)
    assert possible_sizes(setting, (1, 1)) == [(high, wide) for high in sides for wide in sides]


def test_a_setting_without_a_size_takes_the_runs_and_a_rectangle_is_not_varied() -> None:
    assert possible_sizes(LecoSetting(target="a", positive="b"), (64, 128)) == [(64, 128)]
    assert possible_sizes(LecoSetting(target="a", positive="b", size=(64, 128), dynamic_resolution=True), (1, 1)) == [(64, 128)]


def test_every_dynamic_size_is_reached_and_settings_are_drawn_alike(batches: list[RolloutBatch], monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(train_batch_size=1, max_denoising_steps=1)
    monkeypatch.setattr(type(context.model), "predict_eps", lambda self, latents, timesteps, cond: torch.zeros_like(latents))
    dynamic = LecoSetting(target="dynamic", positive="b", size=(128, 128), dynamic_resolution=True)
    term = make_term(context, [dynamic, LecoSetting(target="fixed", positive="b", size=(64, 64))])
    drawn = []
    for _ in range(80):
        term()
        drawn.append((batches[-1].prompts[0].prompt, tuple(batches[-1].latents.shape[2:])))
    assert {size for prompt, size in drawn if prompt == "dynamic"} == {(8, 8), (8, 16), (16, 8), (16, 16)}
    share = sum(prompt == "fixed" for prompt, _ in drawn) / len(drawn)
    assert 0.33 < share < 0.67  # 3 standard deviations


def test_dynamic_crops_tell_all_predictions_of_a_sample_one_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context("sdxl", train_batch_size=2, resolution=(64, 128))
    term = make_term(context, [LecoSetting(target="a", positive="b", unconditional="c", neutral="d", dynamic_crops=True)])
    term()
    told: list[Tensor] = []
    original = type(context.model).predict_eps

    def predict_eps(self, latents: Tensor, timesteps: Tensor, cond) -> Tensor:
        told.append(cond.time_ids)
        return original(self, latents, timesteps, cond)

    monkeypatch.setattr(type(context.model), "predict_eps", predict_eps)
    term()
    frozen, graded = told
    first, second = graded
    assert not torch.equal(first, second)
    assert torch.equal(frozen, torch.stack([first, second] + [first] * 3 + [second] * 3))
    assert graded[:, 4:].tolist() == [[128, 64]] * 2


def test_random_crops_lie_within_pictures_of_up_to_three_times_the_size() -> None:
    whole = torch.tensor([[64.0, 128.0, 0.0, 0.0, 64.0, 128.0]]).repeat(200, 1)
    crops = random_crops(whole, torch.Generator().manual_seed(0))
    original, corner, size = crops[:, :2], crops[:, 2:4], crops[:, 4:]
    assert torch.equal(size, whole[:, 4:])
    assert bool((original >= size).all()) and bool((original <= 3 * size).all())
    assert bool((corner >= 0).all()) and bool((corner + size <= original).all())
    assert original[:, 0].max() > 2.8 * 64 and original[:, 0].min() < 1.2 * 64 and corner.max() > 128


def test_what_is_not_used_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_term(make_context(), [LecoSetting(target="a", positive="b", batch_size=4, dynamic_crops=True)])
    assert "have 3 trajectories" in caplog.text and "only SDXL" in caplog.text


@pytest.mark.parametrize(("given", "count"), [(None, 4), (2, 2)])
def test_the_files_batch_size_counts_unless_one_is_given(given: int | None, count: int) -> None:
    settings = [LecoSetting(target=name, positive="b", batch_size=size) for name, size in (("a", 1), ("c", 4), ("d", None))]
    assert len(make_term(make_context(train_batch_size=given), settings)().sample_losses) == count


@pytest.fixture
def leco_file(tmp_path: Path) -> Callable[[], Path]:
    def write() -> Path:
        path = tmp_path / "leco.toml"
        path.write_text('[[targets]]\ntarget_class = "a"\npositive = "b"\nnegative = "c"\nresolution = 64\n', encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(("objective", "warns"), [((), False), (("leco",), False), (("score",), True)])
def test_keys_of_an_objective_in_use_are_not_complained_of(
    leco_file: Callable[[], Path], caplog: pytest.LogCaptureFixture, objective: tuple[str, ...], warns: bool
) -> None:
    scorers = [a_scorer()] if "score" in objective else []
    context = make_context(prompts_file=str(leco_file()), scorers=scorers, prompts=[PromptSpec(prompt="a")])
    build_terms(context, ObjectiveConfig(objective=objective))
    assert ("negative, positive are for objective leco" in caplog.text) is warns


def test_build_reads_its_own_file_or_prompts_file(leco_file: Callable[[], Path]) -> None:
    path = str(leco_file())
    by_own = LecoTerm.build(make_context(), LecoConfig(leco_prompts_file=path))
    by_prompts = LecoTerm.build(make_context(prompts_file=path), LecoConfig())
    assert by_own.settings == by_prompts.settings and len(by_own.settings) == 4
    with pytest.raises(UserError, match="leco_prompts_file"):
        LecoTerm.build(make_context(), LecoConfig())
