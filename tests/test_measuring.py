"""Measurements of fixed pictures: against the same numbers made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import library.measuring.measure as measure
from library.errors import UserError
from library.measuring import against_base
from library.measuring.against_base import as_shown, beside_base
from library.measuring.image_statistics import chroma, clipped_share, perceptual_distance, rms_distance, rms_diversity, vae_features
from library.measuring.judges import Judges, load_judges
from library.measuring.measure import Measurer, Raters, seed_table
from library.measuring.pictures import Part
from library.models.base import DiffusionModel
from library.objectives.rewards import Goal, Reward
from library.rollouts.sample import SamplingConfig, decode, sample
from library.scorers.judges import Judge
from library.types import PromptSpec
from networks.lora import LoRANetwork
from tests.helpers.scorers import ChannelScorer, WavyScorer, scorer_for
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

# Of two sizes and numbers of steps, with a seed and a direction of their own.
PROMPTS = [
    PromptSpec(prompt="a red circle"),
    PromptSpec(prompt="a blue square", width=96, direction=-1.0),
    PromptSpec(prompt="a star", num_steps=3, seed=77),
]
SAMPLING = SamplingConfig(num_steps=2, guidance_scale=3.0, size=(64, 64), batch_size=3)
REDNESS = Judge(name="redness", function=lambda pixels: pixels[:, 0].mean((1, 2)), takes_prompts=False)
DISTANCES = {"latent_drift", "latent_statistics", "pixel_drift", "perceptual_distance"}
RATIOS = {"latent_diversity", "pixel_diversity", "latent_nyquist", "nyquist", "saturation", "edges"}


class OtherChannel(ChannelScorer):
    """Another channel, in units of its own."""

    def score(self, latents, sigmas, cond, prompts):
        assert (sigmas == 0).all()
        return 10 * latents[:, 1].mean((1, 2))


def measurer_for(prompts: list[PromptSpec] = PROMPTS[:1], raters: Raters | None = None, **settings) -> tuple[Measurer, LoRANetwork]:
    model = tiny_model()
    raters = raters or Raters(reward=Reward([Goal(scorer=scorer_for(model))]))
    measurer = Measurer(model=model, raters=raters, prompts=prompts, **({"seeds": seed_table(prompts, 2), "sampling": SAMPLING} | settings))
    return measurer, lora_for(model, 0.2)


def by_hand(model: DiffusionModel, network: LoRANetwork, prompt: PromptSpec, seeds: list[int], multiplier: float) -> Tensor:
    return sample(model, network, [prompt] * len(seeds), seeds, multiplier, sampling=SAMPLING)


def no_network(network: LoRANetwork) -> LoRANetwork:
    for lora in network.loras:
        torch.nn.init.zeros_(lora.lora_up.weight)
    return network


@pytest.fixture(scope="module")
def measured():
    model = tiny_model()
    raters = Raters(
        reward=Reward([Goal(scorer=scorer_for(model))]),
        scorers={"other": scorer_for(model, OtherChannel)},
        judges=Judges({"redness": REDNESS}, {"wavy": scorer_for(model, WavyScorer)}),
    )
    measurer, network = measurer_for(PROMPTS, raters, num_pictures=2)
    network.set_multiplier(0.25)
    return measurer, network, measurer.measure(network, (-1, 1), name="tiny")


def test_every_picture_is_scored_in_its_place(measured) -> None:
    measurer, network, record = measured
    assert record.multipliers == (-1.0, 0.0, 1.0) and record.num_pairs == 6 and record.name == "tiny"
    assert record.seeds == ((0, 1), (2, 3), (77, 78))
    roles = {name: response.role for name, response in record.responses.items()}
    assert roles == {"reward": "scorer", "ChannelScorer": "scorer", "other": "scorer", "wavy": "judge", "redness": "judge"}
    for row, prompt in enumerate(PROMPTS):
        for place, multiplier in enumerate(record.multipliers):
            latents = by_hand(measurer.model, network, prompt, list(record.seeds[row]), multiplier)
            pixels = decode(measurer.model, latents).clamp(0, 1)
            expected = {
                "reward": latents[:, 0].mean((1, 2)),
                "ChannelScorer": latents[:, 0].mean((1, 2)),
                "other": 10 * latents[:, 1].mean((1, 2)),
                "wavy": scorer_for(measurer.model, WavyScorer)(latents, torch.zeros(2)),
                "redness": pixels[:, 0].mean((1, 2)),
            }
            for name, own in expected.items():
                np.testing.assert_allclose(record.responses[name].values[row, :, place], own.numpy(), rtol=1e-3, atol=1e-4)
    values = record.responses["reward"].values
    gains = (values - values[:, :, [1]]) * np.array([1, -1, 1])[:, None, None]
    assert [gain.value for gain in record.responses["reward"].gains] == pytest.approx(gains.mean((0, 1)))
    assert network.multiplier == 0.25  # put back


def test_the_pictures_that_are_kept_are_the_first_seeds(measured) -> None:
    measurer, network, record = measured
    assert [tuple(pictures.shape) for pictures in record.pictures] == [(3, 3, 64, 64), (3, 3, 64, 96)]
    for place, multiplier in enumerate(record.multipliers):
        own = decode(measurer.model, by_hand(measurer.model, network, PROMPTS[0], [0], multiplier))[0].clamp(0, 1)
        assert (record.pictures[0][place] / 255 - own).abs().max() < 1.01 / 255


def test_statistics_are_those_of_the_pictures() -> None:
    measurer, network = measurer_for()
    measured = measurer.measure(network, [1.0]).statistics
    vae = measurer.model.vae
    latents, base = (by_hand(measurer.model, network, PROMPTS[0], [0, 1], multiplier) for multiplier in (1.0, 0.0))
    decoded, base_decoded = (decode(measurer.model, part) for part in (latents, base))
    pixels, base_pixels = decoded.clamp(0, 1), base_decoded.clamp(0, 1)
    expected = {
        "latent_drift": (0.0, rms_distance(latents, base).mean().item()),
        "pixel_drift": (0.0, rms_distance(pixels, base_pixels).mean().item()),
        "perceptual_distance": (0.0, perceptual_distance(vae_features(vae, pixels), vae_features(vae, base_pixels)).mean().item()),
        "latent_diversity": (1.0, rms_diversity(latents) / rms_diversity(base)),
        "pixel_diversity": (1.0, rms_diversity(pixels) / rms_diversity(base_pixels)),
        "saturation": (1.0, (chroma(decoded).mean() / chroma(base_decoded).mean()).item()),
        "clipped": (clipped_share(base_decoded).mean().item(), clipped_share(decoded).mean().item()),
    }
    assert set(measured) == {*DISTANCES, *RATIOS, "clipped"}
    for name, values in expected.items():
        assert measured[name] == pytest.approx(values, rel=1e-2, abs=1e-3), name  # kept pictures are of 8 bits
    assert measured["pixel_drift"][1] > 0.01


def test_a_network_that_does_nothing_is_not_sampled_and_measures_what_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer, network = measurer_for(num_pictures=1)
    no_network(network)
    measurer.base(network)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "sample", None)
        short = measurer.measure(network, [-1.0, 1.0])
    monkeypatch.setattr(measure, "_is_null", lambda network: False)
    long = measurer.measure(network, [-1.0, 1.0])
    assert set(short.statistics) == set(long.statistics)
    for name, values in short.statistics.items():
        assert values == pytest.approx(long.statistics[name], abs=1e-3)  # batches of other sizes round otherwise
    np.testing.assert_allclose(short.responses["reward"].values, long.responses["reward"].values, atol=1e-4)
    assert torch.equal(short.pictures[0][0], short.pictures[0][2]) and short.pictures[0].shape == long.pictures[0].shape


def test_base_pictures_are_made_once_for_several_sliders_and_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer, first = measurer_for()
    sampled, sizes = [], []
    monkeypatch.setattr(measure, "sample", lambda *args, **kwargs: sampled.append(args[4]) or sample(*args, **kwargs))
    predict = measurer.model.predict_eps
    monkeypatch.setattr(measurer.model, "predict_eps", lambda *given: sizes.append(len(given[0])) or predict(*given))
    values = [measurer.measure(first, [-1.0, 1.0]).responses["reward"].values]
    first.remove()
    values.append(measurer.measure(lora_for(measurer.model, 0.1), [-1.0, 1.0]).responses["reward"].values)
    assert sampled == [[0.0, 0.0], [-1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]] and max(sizes) == 2 * SAMPLING.batch_size
    assert np.array_equal(values[0][:, :, 1], values[1][:, :, 1]) and np.abs(values[0] - values[1]).max() > 1e-3


@pytest.mark.parametrize(("pixels", "judges", "decodes"), [(False, Judges(), False), (False, Judges({"redness": REDNESS}), True)])
def test_pictures_are_decoded_only_where_somebody_looks(pixels: bool, judges: Judges, decodes: bool, monkeypatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(measure, "decode", lambda model, latents: calls.append(1) or decode(model, latents))
    measurer, network = measurer_for(raters=Raters(judges=judges, scorers={"other": scorer_for(tiny_model())}), pixels=pixels)
    measured = measurer.measure(network, [1.0]).statistics
    assert bool(calls) is decodes and ("saturation" in measured) is decodes
    assert {"latent_drift", "latent_statistics", "latent_diversity", "latent_nyquist"} <= set(measured)
    assert ("perceptual_distance" in measured) is decodes


def test_what_is_measured_in_parts_is_what_is_measured_at_once() -> None:
    """The first seeds of all prompts and then the others; some prompts and then the others; the unit is that of all pictures."""
    prompts = [replace(prompt, width=None) for prompt in PROMPTS[:2]]
    measurer, network = measurer_for(prompts=prompts, seeds=seed_table(prompts, 4))
    whole = measurer.measure(network, [-1.0, 1.0])
    for parts in ((Part((0, 1), slice(0, 2)), Part((0, 1), slice(2, 4))), (Part((0,), slice(0, 4)), Part((1,), slice(0, 4)))):
        first, second = (measurer.measure(network, [-1.0, 1.0], part=part) for part in parts)
        joined = first.joined(second)
        assert (joined.prompts, joined.seeds, joined.num_pairs) == (whole.prompts, whole.seeds, 8) and first.num_pairs == 4
        again = joined.first(len(first.prompts), len(first.seeds[0]))
        assert (again.prompts, again.seeds) == (first.prompts, first.seeds) and np.array_equal(again.visibility, first.visibility)
        assert all(again.responses[name].gains == response.gains for name, response in first.responses.items())
        for name, response in joined.responses.items():
            np.testing.assert_allclose(response.values, whole.responses[name].values, atol=1e-4)
            assert response.std == first.responses[name].std == whole.responses[name].std
        assert joined.statistics["latent_drift"] == pytest.approx(whole.statistics["latent_drift"], rel=1e-3)
        assert joined.visibility is not None and whole.visibility is not None
        np.testing.assert_allclose(joined.visibility, whole.visibility, rtol=0.05, atol=1e-3)


def test_a_change_of_brightness_that_is_plainly_seen_has_visibility_1() -> None:
    measurer, network = measurer_for()
    shown = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    latents = torch.zeros(1, 4, 8, 8)
    for levels, visible in ((10, 1.0), (20, None), (0, 0.0)):
        _, seen = beside_base(measurer.model, latents[:, None], (shown + levels)[:, None] / 255, latents, shown)
        assert seen is not None
        found = seen.square()
        assert found.item() == pytest.approx(visible, rel=1e-3, abs=1e-6) if visible is not None else found.item() > 1.5
    record = measurer.measure(network, [-1.0, 1.0])
    assert record.visibility is not None and record.visibility.shape == (1, 2, 3) and (record.visibility[:, :, 1] == 0).all()
    assert record.visible_share(0) == (record.visibility[:, :, 0] > 1).mean()


def test_pictures_are_compared_a_few_at_a_time_and_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    latents, base_latents = torch.randn(5, 2, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)
    decoded, shown = torch.rand(5, 2, 3, 64, 64, generator=generator), (torch.rand(5, 3, 64, 64, generator=generator) * 255).byte()
    seen = []

    def watched(vae, pixels):
        seen.append(len(pixels))
        return vae_features(vae, pixels)

    monkeypatch.setattr(against_base, "vae_features", watched)
    monkeypatch.setattr(against_base, "features_at_once", lambda height, width: 2)
    distances, visibility = beside_base(model, latents, decoded, base_latents, shown)
    assert seen == [2] * 8 + [1] * 4  # the base pictures, those shifted, and two multipliers, of 2, 2 and 1 seeds
    base = vae_features(model.vae, shown / 255)
    for place in range(2):
        pixels = as_shown(decoded[:, place]) / 255
        expected = {
            "latent_drift": rms_distance(latents[:, place], base_latents),
            "pixel_drift": rms_distance(pixels, shown / 255),
            "perceptual_distance": perceptual_distance(vae_features(model.vae, pixels), base),
        }
        for name, own in expected.items():
            torch.testing.assert_close(distances[name][:, place], own)
    assert visibility is not None and visibility.shape == (5, 2)
    assert beside_base(model, latents, None, base_latents, None)[1] is None


def test_base_pictures_are_taken_over_by_a_run_that_goes_on_if_they_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer, network = measurer_for()
    before = measurer.measure(network, [1.0])
    state = measurer.state_dict()
    sampled = []
    monkeypatch.setattr(measure, "sample", lambda *args, **kwargs: sampled.append(args[4]) or sample(*args, **kwargs))
    resumed, same = measurer_for()
    resumed.load_state_dict(state)
    again = resumed.measure(same, [1.0])
    assert all(0.0 not in multipliers for multipliers in sampled)
    np.testing.assert_array_equal(again.responses["reward"].values[:, :, 0], before.responses["reward"].values[:, :, 0])
    other, _ = measurer_for(seeds=seed_table(PROMPTS[:1], 2, offset=7))
    other.load_state_dict(state)
    assert other._base is None


def test_a_judge_has_a_role() -> None:
    """It is written behind its name, comes into the record, and decides what is warned of."""
    model = tiny_model()
    judges = load_judges(["tests.helpers.pictures:redness=stay", "tests.helpers.pictures:is_dark=share"], [], training_files=[])
    assert judges.names == ("redness", "is_dark") and judges.roles == {"redness": "stay", "is_dark": "share"}
    measurer, network = measurer_for(raters=Raters(reward=Reward([Goal(scorer=scorer_for(model))]), judges=judges))
    record = measurer.measure(network, [-1.0, 1.0])
    assert [response.name for response in record.side_effects] == ["redness"] and not record.judges
    assert record.responses["is_dark"].is_share
    with pytest.raises(UserError, match="has the role 'follows', but a role is follow, stay or share"):
        load_judges(["tests.helpers.pictures:redness=follows"], [], training_files=[])


def test_seeds_differ_and_a_prompt_may_bring_its_own() -> None:
    assert seed_table(PROMPTS, 3, first=100) == [[100, 101, 102], [103, 104, 105], [77, 78, 79]]
    assert seed_table(PROMPTS, 2, offset=1000) == [[1000, 1001], [1002, 1003], [1077, 1078]]


def test_bad_input_is_said_before_any_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer, network = measurer_for()
    monkeypatch.setattr(measurer.model, "predict_eps", lambda *args: pytest.fail("sampled"))
    with pytest.raises(UserError, match="only multiplier is 0"):
        measurer.measure(network, [0.0])
    with pytest.raises(UserError, match="at least 2 seeds"):
        replace(measurer, seeds=[[1]])
    with pytest.raises(UserError, match="both called"):
        Raters(scorers={"redness": scorer_for(measurer.model)}, judges=Judges({"redness": REDNESS}))
