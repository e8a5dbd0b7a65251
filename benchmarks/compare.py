"""What one graded sample costs in other programs, by their own step code, beside ours: FLOPs on one U-Net, every program at its defaults.

    python -m benchmarks.compare --leco ../LECO --sd_scripts ../sd-scripts --ai_toolkit ../ai-toolkit

The folders are those that you downloaded the programs to: p1atdev/LECO; kohya-ss/sd-scripts from v0.10.2 on, which has train_leco.py;
ostris/ai-toolkit, whose concept slider is measured. One that is not given, or does not run here, is left out with a line. A sample is one
latent with a gradient of its own. The U-Net is the tests' tiny SD1 or, with --published_width, one of SD1.5's width (4 GB), with random
weights and latents of 8 x 8. FLOPs are counted by torch where they are made, recomputation for checkpoints and LoRAs included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT, markdown_table
from benchmarks.meter import Meter, environment
from benchmarks.random_models import random_model
from benchmarks.shapes_runs import write_results
from benchmarks.step import Step, build_step, parse
from library.settings.cli import run_main
from library.training.runtime import create_accelerator

PROGRAMS = {"leco": "p1atdev/LECO", "sd_scripts": "sd-scripts train_leco", "ai_toolkit": "ai-toolkit concept slider"}
LATENT = 8


def count_flops() -> FlopCounterMode:
    """torch's counter without its record of modules, which cannot follow the scorer's autograd.grad."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = MagicMock(parents={"Global"})
    return counter


def ours(scorer_size: str, published_width: bool) -> tuple[Step, dict[str, Any]]:
    """The step at the trainer's defaults, and what it costs."""
    words = ["--random_weights", "sd1", "--scorer_size", scorer_size, *["--tiny"] * (not published_width)]
    step, config = build_step(*parse([*words, "--resolution", str(8 * LATENT)]))
    step()  # the first update moves nothing but sets up what later ones reuse
    meter = Meter("step")
    hook = meter.count_unet(step.model.unet)
    with count_flops() as counter:
        step()
    hook.remove()
    rows = {"forward": meter.current.unet_rows, "with_gradient": meter.current.unet_rows_with_gradient}
    where = environment(create_accelerator(config.training))
    return step, {"flops": counter.get_total_flops(), "samples": step.batch_size, "rows": rows, "environment": where}


def theirs(program: str, folder: Path, unet: Path) -> dict[str, Any]:
    """Their step's cost, or why there is none under "error"."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "other_programs.py"), program, str(folder.resolve()), str(unet), str(output)]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=name)
        if finished.returncode:
            return {"error": f"does not run here: {finished.stderr.strip().splitlines()[-1]}"}
        return json.loads(output.read_text(encoding="utf-8"))


def forward_flops(step: Step) -> int:
    """Of one row through the U-Net without a LoRA."""
    model = step.model
    width = model.unet.config["cross_attention_dim"]
    with step.network.disabled(), torch.no_grad(), count_flops() as counter:
        model.unet(torch.randn(1, 4, LATENT, LATENT), torch.tensor([500]), torch.randn(1, 77, width))
    return counter.get_total_flops()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    own = rows[0]["flops"] / rows[0]["samples"]
    columns = (
        "program",
        "rows through the U-Net a sample",
        "of them with gradient",
        "GFLOPs a sample",
        "in forwards of a row",
        "ours is less by",
    )
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["program"], row["error"], *[""] * 4])
            continue
        flops, counts = row["flops"] / row["samples"], {name: value / row["samples"] for name, value in row["rows"].items()}
        called = [f"{counts[name]:.1f}" for name in ("forward", "with_gradient")]
        lines.append([row["program"], *called, f"{flops / 1e9:.3g}", f"{flops / rows[0]['forward_flops']:.1f}", f"{flops / own:.1f} x"])
    return markdown_table(columns, lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leco", type=Path, help="folder of p1atdev/LECO")
    parser.add_argument("--sd_scripts", type=Path, help="folder of kohya-ss/sd-scripts")
    parser.add_argument("--ai_toolkit", type=Path, help="folder of ostris/ai-toolkit")
    parser.add_argument("--published_width", action="store_true", help="a U-Net of SD1.5's width")
    parser.add_argument("--scorer_size", default="tiny", help="of our untrained scorer, whose FLOPs count")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "compare")
    given = parser.parse_args(argv)
    step, cost = ours(given.scorer_size, given.published_width)
    rows = [{"program": "LECO score", **cost, "forward_flops": forward_flops(step)}]
    rows[0] |= {"scorer_size": given.scorer_size, "published_width": given.published_width}
    with tempfile.TemporaryDirectory() as name:
        unet: Any = random_model("sd1", tiny=not given.published_width).unet
        unet.register_to_config(sample_size=LATENT)
        unet.save_pretrained(name)
        del step, unet
        for program, title in PROGRAMS.items():
            folder = getattr(given, program)
            found = {"error": f"left out: --{program} names no folder"} if folder is None else theirs(program, folder, Path(name))
            rows.append({"program": title, **found})
    write_results(given.results, rows, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
