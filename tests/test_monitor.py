"""What the monitor measures: against the same numbers made by hand."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.models.base import DiffusionModel
from library.monitor import Effect, Monitor, MonitorConfig, due
from library.rewards import Goal, Reward
from library.rollout import RolloutConfig
from library.sampling import PromptEncoder, sample
from library.scorers.base import Scorer
from library.statistics import within_prompt_std
from library.types import PromptSpec
from networks.lora import LoRANetwork, create_network
from tests.scorers_for_tests import ChannelScorer, scorer_for
from tests.test_rollout import lora_for
from tests.tiny_models import tiny_model

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", direction=-1.0)]


class ConstantScorer(ChannelScorer):
    """The same score for every picture."""

    def standardised(self, latents, sigmas, cond, prompts):
        return super().standardised(latents, sigmas, cond, prompts) * 0


def monitor_for(
    prompts: list[PromptSpec] = PROMPTS,
    *,
    scorer: type[Scorer] = ChannelScorer,
    network_of=lora_for,
    **settings,
) -> tuple[Monitor, DiffusionModel, LoRANetwork]:
    model = tiny_model()
    network = network_of(model)
    rollout = RolloutConfig(prompts_file="-", max_denoising_steps=3, leco_denoise_guidance_scale=2.0)
    config = MonitorConfig(**{"eval_seeds_per_prompt": 2, "num_sample_prompts": 2, **settings})
    reward = Reward([Goal(scorer=scorer_for(model, scorer))])
    return Monitor(model, network, reward, prompts, PromptEncoder(model, network), rollout, config), model, network


def latents_by_hand(model: DiffusionModel, network: LoRANetwork, prompt: PromptSpec, seeds: list[int], multiplier: float) -> torch.Tensor:
    return sample(model, network, [prompt] * 2, seeds, multiplier, num_steps=3, guidance_scale=2.0, resolution=(64, 64), batch_size=2)


def test_the_effect_is_the_gain_in_within_prompt_standard_deviations() -> None:
    monitor, model, network = monitor_for()
    effect = monitor.effect()
    scores = {
        multiplier: torch.stack(
            [
                latents_by_hand(model, network, prompt, [2 * row, 2 * row + 1], multiplier)[:, 0].mean((1, 2))
                for row, prompt in enumerate(PROMPTS)
            ]
        )
        for multiplier in (1.0, 0.0, -1.0)
    }
    unit = within_prompt_std(scores[0.0].double().numpy())
    wanted = torch.tensor([[1.0], [-1.0]])
    up, down = (((scores[multiplier] - scores[0.0]) * wanted).mean().item() / unit for multiplier in (1.0, -1.0))
    assert abs(up) > 1e-3
    assert (effect.up, effect.down) == (pytest.approx(up, rel=1e-3, abs=1e-4), pytest.approx(down, rel=1e-3, abs=1e-4))


def test_what_counts_as_strong_enough() -> None:
    assert Effect(up=2.0, down=-2.5).reaches(2.0)
    assert not Effect(up=2.5, down=-1.9).reaches(2.0)
    assert not Effect(up=1.9, down=-2.5).reaches(2.0)
    assert not Effect(up=float("nan"), down=float("nan")).reaches(2.0)


def test_a_network_that_does_nothing_has_no_effect() -> None:
    monitor, _, network = monitor_for()
    for lora in network.loras:
        torch.nn.init.zeros_(lora.lora_up.weight)
    assert monitor.effect() == Effect(up=0.0, down=0.0)


def test_a_score_belongs_to_its_prompt_whatever_the_sizes() -> None:
    """A size that is given and one that is the run's own may be equal; a prompt's direction turns its own gain round."""
    prompts = [PromptSpec(prompt="a"), PromptSpec(prompt="b", height=32), PromptSpec(prompt="c", height=64)]
    gains = []
    for turned in (None, "b"):
        directed = [
            PromptSpec(prompt=prompt.prompt, height=prompt.height, direction=-1.0 if prompt.prompt == turned else 1.0) for prompt in prompts
        ]
        gains.append(monitor_for(directed)[0].effect().up)
    alone, _, _ = monitor_for(prompts)
    latents_gain = alone._pictures(1.0, "")[0] - alone._base_pictures()[0]
    unit = within_prompt_std(alone._base_pictures()[0].double().numpy())
    row = [prompt.prompt for prompt in alone.prompts].index("b")
    assert gains[0] - gains[1] == pytest.approx(2 * latents_gain[row].sum().item() / 6 / unit, rel=1e-3, abs=1e-5)
    assert latents_gain[row].abs().max() > 1e-4


def test_calibration_makes_weight_1_do_what_the_scale_did() -> None:
    """The calibrated strength, measured again, is the gain that was promised (one rung, so nothing is interpolated but the line to 0)."""
    monitor, _, network = monitor_for(prompts=PROMPTS[:1], calibration_multipliers=(0.5, 1.0))
    up = monitor.effect().up
    calibration = monitor.calibration(1e6)  # out of reach: the end of the range in which both arms keep going their way
    assert calibration.scale in (0.5, 1.0) and not calibration.reached
    assert calibration.note.endswith(".")
    network.scale_alpha(2.0)
    assert monitor.effect().up != pytest.approx(up)


def test_a_text_encoder_lora_is_measured_as_it_is_now() -> None:
    """Its encodings change while it trains; none may be kept from one measurement to the next."""

    def network_of(model: DiffusionModel) -> LoRANetwork:
        network = create_network(1.0, 2, 2.0, model.vae, model.text_encoders, model.unet, generator=torch.Generator().manual_seed(0))
        network.apply_to(model.text_encoders, model.unet)
        model.freeze()
        return network

    monitor, _, network = monitor_for(network_of=network_of)
    assert monitor.effect() == Effect(up=0.0, down=0.0)
    for lora in network.text_encoder_loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    assert monitor.effect() != Effect(up=0.0, down=0.0)


def test_the_preview_is_a_picture(tmp_path: Path) -> None:
    monitor, _, _ = monitor_for()
    path = monitor.preview(tmp_path, "tiny", 30)
    assert path == tmp_path / "sample" / "tiny_000030.png"
    with Image.open(path) as picture:
        assert picture.width >= 3 * 64 and picture.height >= 2 * 64


def test_a_score_that_does_not_vary_has_no_unit() -> None:
    monitor, _, _ = monitor_for(scorer=ConstantScorer)
    with pytest.raises(UserError, match="does not vary"):
        monitor.effect()


def test_due() -> None:
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not due(5, None)


@pytest.mark.parametrize("values", [{"eval_seeds_per_prompt": 1}, {"calibration_multipliers": (0.0, 1.0)}, {"early_stop_gain": 0.0}])
def test_settings_that_mean_nothing(values: dict) -> None:
    with pytest.raises(UserError):
        MonitorConfig(**values)
