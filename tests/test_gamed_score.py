"""A whole run whose score is gamed: its judge says the opposite. The run warns, stops, and saves the step that did the least harm."""

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

import library.slider_training.setup as slider_setup
from library.measuring.judges import Judges
from library.objectives.rewards import Goal, Reward
from library.training.tracking import read_metrics
from tests.helpers.scorers import ChannelScorer, scorer_for
from tests.helpers.tiny_leco_run import make_workplace, run
from tests.helpers.tiny_models import tiny_model


class Opposite(ChannelScorer):
    def standardised(self, latents: Tensor, sigmas: Tensor, cond, prompts) -> Tensor:
        return -super().standardised(latents, sigmas, cond, prompts)


def test_a_gamed_score_warns_stops_and_keeps_the_best_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    monkeypatch.setattr(slider_setup, "load_reward", lambda *_args, **_settings: Reward([Goal(scorer=scorer_for(model))]))
    judges = Judges(scorers={"taste": scorer_for(model, Opposite)})
    monkeypatch.setattr(slider_setup, "load_judges", lambda *_args, **_settings: judges)
    workplace = make_workplace(tmp_path / "in")
    (workplace / "prompts.txt").write_text("a red circle\n", encoding="utf-8")

    path = run(
        workplace,
        tmp_path / "out",
        max_train_steps=12,
        evaluate_every_n_steps=2,
        measure="light",
        calibrate="off",
        save_every_n_steps=2,
        learning_rate=8e-3,
        preserve_weight=0.0,
        leco_denoise_guidance_scale=1.0,
    )

    assert "moves the way the weight says and a judge the other way" in caplog.text
    records = [record for record in read_metrics(tmp_path / "out" / "tiny.metrics.jsonl") if "hack_index" in record]
    assert 2 < len(records) < 7  # at the start, and stopped before the end
    assert records[0]["hack_index"] == 0
    indices = [record["hack_index"] or 0.0 for record in records]
    assert indices[-1] > 0.3 and indices == sorted(indices)
    for record in records:
        assert record["judge/taste/gain_at_+1"] == pytest.approx(-(record["gain_at_+1"] or 0.0), abs=1e-6)
    first, last = (load_file(tmp_path / "out" / f"tiny-step{step:08d}.safetensors") for step in (2, 2 * len(records) - 2))
    saved = load_file(path)
    assert all(torch.equal(tensor, first[name]) for name, tensor in saved.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in saved.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["ss_steps"] == "2"
