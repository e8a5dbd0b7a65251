"""How much of a graphics card's memory a whole run takes, by part, for every preset; counted on tensors without values.

    python -m benchmarks.memory
    python -m benchmarks.memory --families sdxl --presets 8gb

It is what `train_leco_score.py --estimate` says, for the published sizes of U-Net, VAE and text encoders, with a latent ResNet as scorer,
at 512 pixels for SD1 and 1024 for SDXL. The table ends with a check: the same count for a small model in float32, beside the bytes that
torch's profiler saw when the same parts ran for real on the CPU.
"""

import argparse
import dataclasses
import itertools
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import ROOT, markdown_table
from benchmarks.meter import environment
from benchmarks.random_models import PROMPTS, random_model
from benchmarks.shapes_runs import write_results
from library.models.base import DiffusionModel
from library.models.config import ModelConfig
from library.models.vae import VaeFingerprint
from library.scorers.base import SCORER_KINDS, ScorerSpec, build_scorer
from library.scorers.io import save_scorer
from library.settings.cli import run_main
from library.settings.options import build_config
from library.settings.presets import PRESETS
from library.settings.shared import TrainingConfig
from library.slider_training.estimate import Estimate, estimate, measurement, training_step
from library.slider_training.setup import LecoScoreConfig, leco_score_config, prepare
from library.training.runtime import create_accelerator

SIZES = {"sd1": 512, "sdxl": 1024}
GIB = 2**30


def settings(folder: Path, size: int, vae: VaeFingerprint | None = None, scorer_size: str = "base", **changes: Any) -> LecoScoreConfig:
    """The trainer's defaults, but for these changes, with an untrained scorer and prompts that are written into the folder."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    architecture = SCORER_KINDS["latent_resnet"].preset(scorer_size) | {"in_channels": 4}
    spec = ScorerSpec(kind="latent_resnet", architecture=architecture, vae=vae or VaeFingerprint(0.18215, (0.0,) * 256))
    save_scorer(folder / "scorer.safetensors", build_scorer(spec))
    files = {"pretrained_model_name_or_path": "random", "output_dir": str(folder), "prompts_file": str(folder / "prompts.txt")}
    return build_config(
        leco_score_config(), {**files, "scorer": [str(folder / "scorer.safetensors")], "resolution": [size, size], "seed": 0, **changes}
    )


def counted(family: str, size: int, *, tiny: bool = False, **changes: Any) -> Estimate:
    """The estimate for a family's published size, or for the tests' tiny model of it."""

    def load(**placed: Any) -> DiffusionModel:
        return random_model(family, tiny=tiny, **placed)

    with tempfile.TemporaryDirectory() as folder:
        return estimate(settings(Path(folder), size, **changes), load)


class Taken:
    """The most bytes that torch gave out within each part, less what was held at its beginning; on the CPU by its profiler.

    Attributes:
        rises: by part.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rises = device, dict[str, int]()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            self.rises[part] = torch.cuda.max_memory_allocated() - before
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            yield
        assert found.profiler is not None and found.profiler.kineto_results is not None
        events: list[Any] = found.profiler.kineto_results.events()
        self.rises[part] = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def taken(family: str, size: int, *, tiny: bool = False, device: torch.device | str = "cpu", **changes: Any) -> dict[str, int]:
    """The same parts of a run with random weights as they really are: bytes by part."""
    found, model = Taken(torch.device(device)), random_model(family, tiny=tiny)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder), size, model.vae_fingerprint(), **changes)
        accelerator = create_accelerator(config.training)
        with patch.object(ModelConfig, "load", lambda *_, dtype, device: model.to(device, dtype)):
            made = prepare(config, accelerator)
        training_step(made, found.within)
        measurement(made, found.within)
    return found.rises


def table(rows: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    texts = []
    if rows:
        parts = list(rows[0]["peaks"])
        lines = [
            [
                f"{row['family']} at {row['size']}",
                row["preset"],
                *(f"{row['peaks'].get(part, 0) / GIB:.2f}" for part in parts),
                f"**{row['peak'] / GIB:.2f}**",
            ]
            for row in rows
        ]
        texts += [f"GiB, weights included, {rows[0]['precision']}.", markdown_table(["model", "preset", *parts, "whole run"], lines)]
    if checks:
        texts.append("A tiny SD1 at 256 pixels in float32, what each part adds to what was held before it:")
        lines = [
            [row["part"], f"{row['counted'] / 2**20:.1f}", f"{row['seen'] / 2**20:.1f}", f"{row['seen'] / row['counted']:.2f}"]
            for row in checks
        ]
        texts.append(markdown_table(["part", "counted, MiB", "seen on the CPU, MiB", "seen / counted"], lines))
    return "\n\n".join(texts)


def check() -> list[dict[str, Any]]:
    """Counted and seen, for a tiny model."""
    words: dict[str, Any] = {"train_batch_size": 2, "scorer_size": "tiny", "mixed_precision": "no"}
    rises = taken("sd1", 256, tiny=True, **words)
    guess = counted("sd1", 256, tiny=True, **words).rises
    return [{"part": part, "counted": guess[part], "seen": size} for part, size in rises.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--no_check", action="store_true", help="leave out what is run for real")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json", help="JSON file; a table goes beside it"
    )
    given = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.memory", *(sys.argv[1:] if argv is None else argv)])
    where = {"command": command, "environment": environment(create_accelerator(TrainingConfig()))}
    checks = [] if given.no_check else check()
    rows: list[dict[str, Any]] = []
    for family in given.families:
        for preset in given.presets:
            found = counted(family, SIZES[family], preset=preset)
            row = {"family": family, "size": SIZES[family], "preset": preset, "peak": found.peak, "precision": found.settings["precision"]}
            rows.append(row | dataclasses.asdict(found) | where)
            write_results(given.out, [*rows, *checks], table(rows, checks))
    print(table(rows, checks))


if __name__ == "__main__":
    run_main(main)
