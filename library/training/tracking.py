"""Numbers and pictures of a run: a JSON-lines file always, TensorBoard and wandb when asked, and the progress bar."""

import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from library.atomic_files import CannotWrite, atomic_write_text
from library.errors import UserError
from library.settings.shared import LoggingConfig

logger = logging.getLogger(__name__)

QUIET_SECONDS = 30.0


class Sink(Protocol):
    """Where a tracker writes to."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, image: Image.Image, step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes metrics and images to every sink; a context manager that closes them.

    A step's number is that of its update, from 0; so a run that resumes at `first_step` writes that one anew.

    Args:
        config: which sinks, besides the JSON-lines file.
        path: of that file; it is written when the first numbers are logged. Beside it are the other sinks' `logs`.
        first_step: where the run starts; lines of the file from this step on are dropped, so 0 starts a new file.
        begin: called before the file is written.
        settings: the run's settings, for wandb. Give no secret.
        enabled: False (for every process but the first) makes every method do nothing.

    Raises:
        UserError: the package of a tracker that was asked for is missing.
    """

    def __init__(
        self,
        config: LoggingConfig,
        path: Path,
        *,
        first_step: int = 0,
        begin: Callable[[], None] = lambda: None,
        settings: Mapping[str, object] | None = None,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        self._bar: tqdm | None = None
        self._shown: tuple[str, ...] = ()
        self._sinks: list[Sink] = []
        if not enabled:
            return
        folder = config.logging_dir or path.parent / "logs"
        if "tensorboard" in config.trackers:
            run = config.details.get("log_prefix", "") + time.strftime("%Y%m%d%H%M%S")
            self._sinks.append(TensorBoardSink(folder / run / config.details.get("log_tracker_name", "")))
        if "wandb" in config.trackers:
            self._sinks.append(WandbSink(config, folder, settings or {}))
        self._sinks.append(JsonLinesSink(path, first_step, begin))

    def log(self, metrics: Mapping[str, float | Tensor], step: int) -> dict[str, float]:
        """Write numbers, or tensors of one element, which are fetched together, one wait for the device a call -> all as numbers.

        NaN and infinity are written as null to the file.
        """
        if not self._enabled:
            return {}
        values = to_floats(metrics)
        for sink in self._sinks:
            sink.log(values, step)
        if self._bar is not None:
            self._bar.set_postfix({name: f"{values[name]:.4g}" for name in self._shown if name in values}, refresh=False)
        return values

    def image(self, name: str, image: Image.Image | str | Path, step: int) -> None:
        """Show a picture, or a picture file, in the trackers that show pictures."""
        if not self._enabled:
            return
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        for sink in self._sinks:
            sink.image(name, picture, step)

    def progress(self, total: int, initial: int = 0, desc: str = "steps", show: Sequence[str] = ("loss",)) -> tqdm:
        """A progress bar that the caller updates; each `log` shows the metrics named in `show` at its end."""
        self._shown = tuple(show)
        self._bar = progress_bar(total=total, initial=initial, desc=desc, disable=not self._enabled)
        return self._bar

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_trackers(config: LoggingConfig) -> None:
    """Raise UserError if the package of a tracker that was asked for is missing."""
    for name in config.trackers:
        _tracker_package(name)


def _tracker_package(name: str) -> Any:
    try:
        return importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError as error:
        raise UserError(f"log_with = {name} needs a package ({error}); try: pip install {name}") from error


class JsonLinesSink:
    """One JSON object a line: {"step": 3, "time": 1700000000.0, "loss": 0.1}. Pictures are left out."""

    def __init__(self, path: Path, first_step: int = 0, begin: Callable[[], None] = lambda: None) -> None:
        self._path, self._first_step, self._begin, self._lost = path, first_step, begin, 0
        self._file: BinaryIO | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """A line that cannot be written is lost, and the run goes on; the first of them is told."""
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **numbers}, allow_nan=False)
        try:
            if self._file is None:
                self._begin()
                atomic_write_text(self._path, "".join(_lines_before(self._path, self._first_step)))
                self._file = self._path.open("ab", buffering=0)  # a line is written whole, or cut short by a full disk
            self._file.write(("\n" if self._lost else "").encode() + line.encode() + b"\n")  # what came before may be cut short
        except (OSError, CannotWrite) as error:
            if not self._lost:
                reason = error.strerror if isinstance(error, OSError) else error
                logger.warning("%s cannot be written (%s): training goes on without its lines", self._path, reason)
            self._lost += 1

    def image(self, name: str, image: Image.Image, step: int) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoardSink:
    def __init__(self, folder: Path) -> None:
        self._writer = _tracker_package("tensorboard").SummaryWriter(str(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, config: LoggingConfig, folder: Path, settings: Mapping[str, object]) -> None:
        wandb = _tracker_package("wandb")
        if "wandb_api_key" in config.details:
            wandb.login(key=config.details["wandb_api_key"])
        folder.mkdir(parents=True, exist_ok=True)
        self._make_image = wandb.Image
        self._run = wandb.init(
            project=config.details.get("log_tracker_name", "leco_score"),
            name=config.details.get("wandb_run_name"),
            config=dict(settings),
            dir=str(folder),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._run.log({name: self._make_image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Lines:
    """A text stream on which tqdm's redrawn bar becomes a line each time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if (line := text.strip("\r\n ")) and not line.startswith("\x1b"):  # not a move of the cursor
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(**settings: Any) -> tqdm:
    """tqdm's bar; where nobody watches (a file, CI), a line every `QUIET_SECONDS` in place of a stream of redrawn bars."""
    settings = {"dynamic_ncols": True} | settings
    if not sys.stderr.isatty():
        settings |= {"file": _Lines(sys.stderr), "mininterval": QUIET_SECONDS, "maxinterval": QUIET_SECONDS, "ncols": 100, "leave": False}
    bar: Any = tqdm(**settings)
    return bar


def to_floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Numbers and one-element tensors as numbers, in the given order; each device is waited for once."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, {})[name] = value.detach().float().reshape(())
    fetched: dict[str, float] = {}
    for tensors in by_device.values():
        fetched |= zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)
    return {name: fetched[name] if isinstance(value, Tensor) else float(value) for name, value in metrics.items()}


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl, without a last one that a crash cut short."""
    return [record for _, record in _records(path)]


def _lines_before(path: Path, first_step: int) -> list[str]:
    if first_step <= 0 or not path.exists():
        return []
    return [line + "\n" for line, record in _records(path) if record["step"] < first_step]


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """The lines of a metrics.jsonl that are whole, each with its record; others, of a crash or of another program, are passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); move it away, or give another folder") from error
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield line, record
