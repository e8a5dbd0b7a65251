"""benchmarks/latent_cache.py, small."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import latent_cache
from library.settings.cli import run_main


def test_a_small_cache_is_measured_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = {"num_latents": 2500, "latent_size": 8, "batch_size": 32, "train_steps": 1, "num_threads": 1}
    words = [word for name, value in config.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["latent_cache", *words, "--folder", str(scratch), "--output", str(tmp_path / "results")])
    run_main(latent_cache.main)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_latents"] == 2500 and results["num_shards"] == 3 and results["epoch_batches"] == 79  # 31 + 31 + 14 and 3 short ones
    assert results["train_latents_per_second"] > 0 and results["latents_per_second"] > 0
    assert list(scratch.iterdir()) == []
    assert capsys.readouterr().out.strip() == (tmp_path / "results.md").read_text().strip()


def test_a_bad_size_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["latent_cache", "--latent_size", "12"])
    with pytest.raises(SystemExit):
        run_main(latent_cache.main)
    assert "latent_size is 12" in capsys.readouterr().err
