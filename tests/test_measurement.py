"""Measurements of fixed pictures: against the same numbers made by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

import library.measuring.measurement as measurement
from library.measuring.image_statistics import (
    chroma,
    clipped_share,
    eps_distance,
    perceptual_distance,
    perceptual_diversity,
    rms_distance,
    rms_diversity,
    vae_features,
)
from library.measuring.judges import Judges
from library.measuring.measurement import FixedPictures
from library.objectives.rewards import Goal, Reward
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, sample
from library.scorers.judges import Judge
from library.types import PromptSpec
from networks.lora import LoRANetwork
from tests.helpers.scorers import WavyScorer, scorer_for
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", direction=-1.0)]
REDNESS = Judge(name="redness", function=lambda pixels: pixels[:, 0].mean((1, 2)), takes_prompts=False)
DISTANCES = ("drift", "latent_statistics", "eps_distance", "perceptual_distance")
RATIOS = ("latent_diversity", "diversity", "latent_nyquist", "nyquist", "saturation", "edges")


def fixed_pictures(prompts: list[PromptSpec] = PROMPTS, judges: Judges | None = None, strength: float = 0.05, **settings) -> FixedPictures:
    model = tiny_model()
    network = lora_for(model, strength)
    return FixedPictures(
        model=model,
        network=network,
        reward=Reward([Goal(scorer=scorer_for(model))]),
        judges=judges or Judges(),
        prompts=prompts,
        encoder=PromptEncoder(model, network),
        sampling=SamplingConfig(num_steps=3, guidance_scale=2.0, size=(64, 64), batch_size=4),
        seeds_per_prompt=2,
        **settings,
    )


def by_hand(pictures: FixedPictures, prompt: PromptSpec, seeds: list[int], multiplier: float, num_steps: int = 3) -> Tensor:
    sampling = SamplingConfig(num_steps=num_steps, guidance_scale=2.0, size=(prompt.height or 64, prompt.width or 64))
    return sample(pictures.model, pictures.network, [prompt] * 2, seeds, multiplier, sampling=sampling)


def no_network(network: LoRANetwork) -> LoRANetwork:
    for lora in network.loras:
        torch.nn.init.zeros_(lora.lora_up.weight)
    return network


def test_scores_are_those_of_the_pictures() -> None:
    pictures = fixed_pictures(judges=Judges({"redness": REDNESS}))
    pictures.judges = Judges({"redness": REDNESS}, {"wavy": scorer_for(pictures.model, WavyScorer)})
    measured = pictures.measure(1.0, "")
    assert list(measured.scores) == ["reward", "ChannelScorer", "wavy", "redness"]
    for scores, multiplier in ((measured.scores, 1.0), (pictures.base().scores, 0.0)):
        for row, prompt in enumerate(PROMPTS):
            latents = by_hand(pictures, prompt, [2 * row, 2 * row + 1], multiplier)
            pixels = decode(pictures.model, latents, 2).clamp(0, 1)
            expected = {
                "reward": latents[:, 0].mean((1, 2)),
                "ChannelScorer": latents[:, 0].mean((1, 2)),
                "wavy": scorer_for(pictures.model, WavyScorer)(latents, torch.zeros(2)),
                "redness": pixels[:, 0].mean((1, 2)),
            }
            for name, own in expected.items():
                np.testing.assert_allclose(scores[name][row], own.numpy(), rtol=1e-3, atol=1e-4)
    assert np.abs(measured.scores["reward"] - pictures.base().scores["reward"]).max() > 1e-3


def test_statistics_are_those_of_the_pictures() -> None:
    pictures = fixed_pictures(PROMPTS[:1])
    measured = pictures.measure(1.0, "").statistics
    vae = pictures.model.vae
    latents, base = (by_hand(pictures, PROMPTS[0], [0, 1], multiplier) for multiplier in (1.0, 0.0))
    decoded, base_decoded = (decode(pictures.model, part, 2) for part in (latents, base))
    features, base_features = (vae_features(vae, (part.clamp(0, 1) * 255).round() / 255) for part in (decoded, base_decoded))
    expected = {
        "drift": rms_distance(latents, base).mean().item(),
        "perceptual_distance": perceptual_distance(features, base_features).mean().item(),
        "latent_diversity": rms_diversity(latents) / rms_diversity(base),
        "diversity": perceptual_diversity(features) / perceptual_diversity(base_features),
        "saturation": (chroma(decoded).mean() / chroma(base_decoded).mean()).item(),
        "clipped": clipped_share(decoded).mean().item(),
    }
    assert set(measured) == {*DISTANCES, *RATIOS, "clipped"}
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


def test_eps_distance_is_that_of_the_predictions_on_the_base_models_noised_pictures() -> None:
    pictures = fixed_pictures(PROMPTS[:1])
    measured = pictures.measure(-1.0, "").statistics["eps_distance"]
    model, network = pictures.model, pictures.network
    clean = by_hand(pictures, PROMPTS[0], [0, 1], 0.0)[:1].expand(3, -1, -1, -1)
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    timesteps = torch.tensor([200, 500, 799])
    noisy, cond = model.schedule.add_noise(clean, noise, timesteps), model.encode_prompts([PROMPTS[0].prompt] * 3)
    with torch.no_grad():
        network.set_multiplier(-1.0)
        eps = model.predict_eps(noisy, timesteps, cond)
        with network.disabled():
            base = model.predict_eps(noisy, timesteps, cond)
    assert measured == pytest.approx(eps_distance(eps, base).mean().item(), rel=1e-3)
    assert measured > 1e-3


def test_the_multiplier_is_put_back() -> None:
    pictures = fixed_pictures(PROMPTS[:1])
    pictures.network.set_multiplier(0.25)
    pictures.measure(1.0, "")
    assert pictures.network.multiplier == 0.25


def test_a_network_that_does_nothing_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = fixed_pictures()
    no_network(pictures.network)
    base = pictures.base()
    monkeypatch.setattr(measurement, "sample", None)
    measured = pictures.measure(1.0, "")
    assert measured.scores is base.scores
    assert {name: measured.statistics[name] for name in DISTANCES} == dict.fromkeys(DISTANCES, 0.0)
    assert {name: measured.statistics[name] for name in RATIOS} == dict.fromkeys(RATIOS, 1.0)


def test_a_network_that_does_nothing_measures_the_same_when_it_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortcut says what the long way would."""
    pictures = fixed_pictures()
    no_network(pictures.network)
    short = pictures.measure(1.0, "").statistics
    monkeypatch.setattr(measurement, "_is_null", lambda network: False)
    assert pictures.measure(1.0, "").statistics == pytest.approx(short, abs=1e-6)


@pytest.mark.parametrize(
    ("look_at_pixels", "judges", "decodes"), [(True, Judges(), True), (False, Judges(), False), (False, Judges({"redness": REDNESS}), True)]
)
def test_pictures_are_decoded_only_where_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, look_at_pixels: bool, judges: Judges, decodes: bool
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(measurement, "decode", lambda model, latents, size: calls.append(1) or decode(model, latents, size))
    pictures = fixed_pictures(judges=judges, look_at_pixels=look_at_pixels)
    measured = pictures.measure(1.0, "", thorough=False)
    assert bool(calls) is decodes
    assert ("saturation" in measured.statistics) is decodes
    assert {"drift", "latent_statistics", "latent_diversity", "latent_nyquist"} <= set(measured.statistics)
    assert not {"eps_distance", "perceptual_distance", "diversity"} & set(measured.statistics)


def test_prompts_of_all_sizes_steps_and_seeds_keep_their_rows() -> None:
    prompts = [
        PromptSpec(prompt="a"),
        PromptSpec(prompt="b", num_steps=2),
        PromptSpec(prompt="c", seed=77),
        PromptSpec(prompt="d", height=128),
    ]
    pictures = fixed_pictures(prompts)
    measured = pictures.measure(1.0, "")
    assert [pictures.seeds(row) for row in range(4)] == [[0, 1], [2, 3], [77, 78], [6, 7]]
    for row, prompt in enumerate(prompts):
        latents = by_hand(pictures, prompt, pictures.seeds(row), 1.0, prompt.num_steps or 3)
        np.testing.assert_allclose(measured.scores["reward"][row], latents[:, 0].mean((1, 2)).numpy(), rtol=1e-3, atol=1e-4)


def test_a_seed_offset_gives_other_pictures() -> None:
    assert not np.allclose(fixed_pictures().base().scores["reward"], fixed_pictures(seed_offset=1000).base().scores["reward"], atol=1e-3)


def test_without_a_score_there_are_still_statistics_and_judges() -> None:
    pictures = fixed_pictures(judges=Judges({"redness": REDNESS}))
    pictures.reward = Reward([])
    assert list(pictures.measure(1.0, "").scores) == ["redness"]
