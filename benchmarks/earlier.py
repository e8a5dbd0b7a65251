"""CPU time of a training step beside that of an earlier checkout, at each one's own defaults: in one process, in turn, on the same weights.

    git worktree add ../earlier 2d80727
    python -m benchmarks.earlier ../earlier --widths tiny published

Both trees' packages have the same names, so that a step runs with its own tree's modules in sys.modules. The networks are copies that share
their weights: the U-Net of the tests, and one of SD1.5's width (some 5 GB), with random weights and latents of 8 x 8.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.meter import environment
from benchmarks.random_models import random_model
from benchmarks.shapes_runs import write_results

OURS = ("benchmarks", "library", "networks", "tests")  # top-level packages of a tree


class Tree:
    """A checkout's packages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.modules = str(folder.resolve()), dict[str, Any]()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, what is imported is this tree's."""
        others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OURS}
        sys.modules.update(self.modules)
        sys.path.insert(0, self.folder)
        try:
            yield
        finally:
            sys.path.remove(self.folder)
            self.modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OURS}
            sys.modules.update(others)


def sharing(module: nn.Module) -> nn.Module:
    """A copy with the same weights, not equal ones."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def step_of(tree: Tree, model: Any, scorer_size: str, settings: Sequence[str]) -> Callable[[], None]:
    """The tree's step with copies of the model's networks."""
    with tree.active():
        step: Any = import_module("benchmarks.step")
        family = import_module("library.models.registry").FAMILIES["sd1"]
        config = import_module("library.models.single_file").bundled_config("sd1")["scheduler"]
        schedule = import_module("library.diffusion.noise_schedule").NoiseSchedule.from_config(config)
        unet, vae, text_encoder = map(sharing, (model.unet, model.vae, model.text_encoders[0]))
        parts = {"schedule": schedule, "unet": unet, "vae": vae, "text_encoders": [text_encoder], "tokenizers": model.tokenizers}
        spec = family.spec(prediction_type="epsilon", unet=unet, vae=vae, name="random")
        step.random_model = lambda *_, **__: family.model_class(spec=spec, **parts).freeze()
        words = ["--random_weights", "sd1", "--scorer_size", scorer_size, "--resolution", "64", "--seed", "0", *settings]
        one, _ = step.build_step(*step.parse(words))

    def run() -> None:
        with tree.active():
            assert one().isfinite().all()

    return run


def compare(earlier: Path, width: str, pairs: int, settings: Sequence[str]) -> dict[str, Any]:
    """CPU seconds of each step, in pairs, after one pair that does not count."""
    torch.manual_seed(0)
    model = random_model("sd1", tiny=width == "tiny")
    steps = {
        name: step_of(Tree(folder), model, "tiny" if width == "tiny" else "base", settings)
        for name, folder in (("earlier", earlier), ("now", ROOT))
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(pairs + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    seconds = {name: own[1:] for name, own in seconds.items()}
    ratios = [before / now for before, now in zip(seconds["earlier"], seconds["now"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"width": width, "seconds": seconds, "ratio": median(ratios), "quartiles": [low, high]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        seconds = (f"{median(row['seconds'][name]):.2f}" for name in ("earlier", "now"))
        spread = "{:.2f} to {:.2f}".format(*row["quartiles"])
        lines.append([row["width"], len(row["seconds"]["now"]), *seconds, f"{row['ratio']:.2f} ({spread})"])
    return markdown_table(["U-Net", "steps", "earlier, CPU s", "now, CPU s", "earlier / now, step by step (quartiles)"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("earlier", type=Path, help="folder of the other checkout")
    parser.add_argument("--widths", nargs="+", choices=("tiny", "published"), default=["tiny"])
    parser.add_argument("--pairs", type=int, default=16, help="of steps, 2 or more")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "earlier")
    given, settings = parser.parse_known_args(argv)
    rows: list[dict[str, Any]] = []
    for width in given.widths:
        rows.append(compare(given.earlier, width, given.pairs, settings) | {"environment": environment(Accelerator(cpu=True))})
        write_results(given.results, rows, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
