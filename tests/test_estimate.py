"""What a run needs, counted without weights, beside what it takes when it runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_leco_score
from benchmarks import memory
from library.rollouts.sample import SAMPLED_BYTES, SAMPLED_LATENTS
from library.settings.options import build_config
from library.slider_training.counted_memory import Allocations
from library.slider_training.estimate import COMPARE, DECODE, PARTS, SAMPLE, SCORE, STEP, Estimate, estimate
from library.slider_training.setup import leco_score_config
from tests.helpers.tiny_leco_run import make_workplace, settings

SETTINGS: dict[str, Any] = {"train_batch_size": 2, "mixed_precision": "no"}


def test_allocations_count_what_is_held() -> None:
    with Allocations("the rest") as allocations:
        with allocations.within(STEP):
            first = torch.empty(1024, device="meta")
            second = first[:10] + 0  # 40 bytes; the view is none
            assert allocations.now == 4096 + 40
            del first
        assert allocations.now == 40 and allocations.rises[STEP] == 4096 + 40
        del second
    assert allocations.now == 0


def test_pictures_in_a_call_are_as_many_as_was_counted() -> None:
    """What a picture is said to take while it is sampled covers both families, and not by much."""
    rows = [row for row in json.loads((memory.ROOT / "benchmarks" / "results" / "memory.json").read_text()) if "rises" in row]
    shares = {row["family"]: row["rises"][SAMPLE] / (SAMPLED_LATENTS * 2 * SAMPLED_BYTES) for row in rows}
    assert set(shares) == {"sd1", "sdxl"} and all(0.5 < share < 0.9 for share in shares.values())


@pytest.fixture(scope="module")
def plain() -> Estimate:
    return memory.counted("sd1", 256, tiny=True, scorer_size="tiny", **SETTINGS)


@pytest.mark.slow
def test_a_count_is_what_a_real_run_takes(plain: Estimate) -> None:
    ratios = {part: size / plain.rises[part] for part, size in memory.taken("sd1", 256, tiny=True, scorer_size="tiny", **SETTINGS).items()}
    assert set(ratios) == {STEP, SAMPLE, SCORE, DECODE, COMPARE}
    assert all(0.8 < ratio < 1.25 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_less_is_held_with_what_saves_memory_and_no_weight_is_read(plain: Estimate, tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    changes = {"gradient_checkpointing": True, "quantize_base": "nf4", "blocks_to_swap": 2, "resolution": [256, 256]}
    found = estimate(build_config(leco_score_config(), settings(workplace, tmp_path / "out", **SETTINGS | changes)))
    assert found.rises[STEP] < 0.8 * plain.rises[STEP]
    assert found.weights["U-Net"] < 0.5 * plain.weights["U-Net"]
    assert set(found.peaks) == set(PARTS) and found.peak == max(found.peaks.values())
    assert f"{found.peak / 2**30:.2f} GiB" in str(found)
    assert not (tmp_path / "out").exists()


def test_the_script_says_it_and_ends(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_leco_score, "estimate", lambda config: f"batches of {config.rollout.train_batch_size}")
    with pytest.raises(SystemExit) as ended:
        train_leco_score.train(build_config(leco_score_config(), settings(workplace, tmp_path / "out", estimate=True)))
    assert ended.value.code == 0 and capsys.readouterr().out == "batches of 2\n"
