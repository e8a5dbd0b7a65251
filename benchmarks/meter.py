"""What a part of a program costs: seconds, rows through the U-Net, pictures through the VAE, memory; and on which machine."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from benchmarks import ROOT
from library.training.runtime import describe_device


def count_flops() -> FlopCounterMode:
    """torch's counter without its record of modules, which cannot follow the scorer's autograd.grad."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = MagicMock(parents={"Global"})
    return counter


@dataclass
class Counts:
    """What happened in one part; peaks in bytes: the process's resident memory, and what CUDA gave out."""

    seconds: float = 0.0
    unet_rows: int = 0
    unet_rows_with_gradient: int = 0
    decoded: int = 0
    encoded: int = 0
    scored: int = 0
    peak_resident: int = 0
    peak_cuda: int = 0

    @property
    def evaluations(self) -> int:
        """Rows through the U-Net; one with gradient counts 3, for its backward pass is about two."""
        return self.unet_rows + 2 * self.unet_rows_with_gradient


class Meter:
    """Counts by part: what happens while a part is the innermost one that is open. The device is waited for at both ends of a part.

    Args:
        first: the part of what happens outside all others.
        divisible: parts within which others may begin; within the rest, all belongs to the outer one. None: all parts.
    """

    def __init__(self, first: str, divisible: Collection[str] | None = None) -> None:
        self.parts: dict[str, Counts] = {}
        self.open, self.divisible = [first], divisible
        self.since = time.perf_counter()

    @property
    def current(self) -> Counts:
        return self.parts.setdefault(self.open[-1], Counts())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.close()
        outer = self.open[-1]
        self.open.append(name if self.divisible is None or outer in self.divisible else outer)
        try:
            yield
        finally:
            self.close()
            self.open.pop()

    def close(self) -> None:
        """Write down the time and the memory since the last change of parts."""
        counts = self.current
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        counts.seconds += time.perf_counter() - self.since
        counts.peak_resident = max(counts.peak_resident, peak_resident())
        if torch.cuda.is_available():
            counts.peak_cuda = max(counts.peak_cuda, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        self.since = time.perf_counter()

    def wrap(self, owner: Any, name: str, part: str | Callable[[], str], then: Callable[[Any], object] | None = None) -> None:
        """From now on calls of `owner.name` are a part, and what they return is shown to `then`."""
        function = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(part if isinstance(part, str) else part()):
                found = function(*args, **kwargs)
                if then is not None:
                    then(found)
                return found

        setattr(owner, name, measured)

    def count_calls(self, module: torch.nn.Module, name: str) -> None:
        """Every row that goes into a module counts as `name`."""

        def count(module: torch.nn.Module, args: tuple) -> None:
            setattr(self.current, name, getattr(self.current, name) + len(args[0]))

        module.register_forward_pre_hook(count)

    def count_unet(self, unet: torch.nn.Module) -> RemovableHandle:
        """Every row that the U-Net predicts counts; so does whether a gradient goes back through it."""

        def count(module: torch.nn.Module, args: tuple, output: Any) -> None:
            self.current.unet_rows += len(args[0])
            self.current.unet_rows_with_gradient += len(args[0]) if output[0].requires_grad else 0

        return unet.register_forward_hook(count)


def peak_resident() -> int:
    """The most bytes that the process held since the last call; where that cannot be reset (only Linux can), since it began; 0: unknown."""
    try:
        found = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is what is held now
        return found * 1024
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return 0  # the standard library cannot tell
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Where and with what a measurement was made, without names of the computer."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "xformers", "triton")
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": describe_device(accelerator),
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": commit or None,
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
