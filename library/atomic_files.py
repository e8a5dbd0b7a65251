"""Files that are whole or not there: a full disk or a killed process never leaves half of one, nor destroys the one before.

Written beside the target, flushed to the disk, then renamed over it, which POSIX and Windows do in one step. Also here: reading
files of tensors, which are trusted with nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library.errors import UserError

if TYPE_CHECKING:  # processes that hold no tensor write files, too, and torch takes seconds to import
    from torch import Tensor

logger = logging.getLogger(__name__)


class CannotWrite(UserError):
    """The operating system refused to write: no space, no permission, no such name."""


_ADVICE = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota", errno.ENAMETOOLONG: "give a shorter name"}


@contextlib.contextmanager
def refused(path: Path) -> Iterator[None]:
    """An OSError of the block as CannotWrite, which names `path`, also where it is of a file that was to be a part of that."""
    try:
        yield
    except (OSError, CannotWrite) as caught:
        error = caught.__cause__ if isinstance(caught, CannotWrite) else caught
        if not isinstance(error, OSError):
            raise
        reason, advice = error.strerror or str(error), _ADVICE.get(error.errno or 0, "mend that")
        raise CannotWrite(
            f"{path} could not be written ({reason}): what stood there is unchanged; {advice}, or choose another folder"
        ) from error


@contextlib.contextmanager
def atomic_open(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends well, and is deleted when it does not. Makes missing folders.

    Raises CannotWrite for what the operating system refuses: no space, no permission, not a folder.
    """
    path = Path(path)
    # open() and not tempfile: a temporary file of tempfile's would keep its 0600 permissions. The pid keeps processes apart.
    unfinished = unfinished_name(path)
    with refused(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder that takes its name when the block ends well, in the place of one that was there, and is deleted when it does not.

    A process that is killed between the two renames leaves the old folder as .NAME.PID.old: see `remove_unfinished`. Raises CannotWrite
    for what the operating system refuses.
    """
    path = Path(path)
    unfinished, old = unfinished_name(path), unfinished_name(path, "old")
    with refused(path):
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if path.exists():
                path.rename(old)
            unfinished.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def unfinished_name(path: Path, ending: str = "tmp") -> Path:
    """What stands for a file or folder until it takes its name; `remove_unfinished` knows it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


@contextlib.contextmanager
def expendable(what: str) -> Iterator[None]:
    """What cannot be written inside the block is logged, and the program goes on without it; `what` begins the message."""
    try:
        yield
    except CannotWrite as error:
        logger.error("%s: %s. It goes on without it", what, error)


def remove_unfinished(folder: str | Path, names: str, *, older_than: float = 0.0) -> None:
    """Delete what killed processes were writing in a folder: hidden files and folders that never took their names.

    Args:
        names: a regular expression of the names that they were to take. Nothing else is touched.
        older_than: seconds; for a folder that processes of other machines write to as well, whose lives nobody here can see.
    """
    pattern = re.compile(rf"\.(?P<name>{names})\.(?P<pid>\d+)\.(?P<ending>tmp|old)")
    for path in Path(folder).glob(".*"):
        match = pattern.fullmatch(path.name)
        if match is None or (int(match["pid"]) != os.getpid() and _is_running(int(match["pid"]))):
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime < older_than:
                continue
            if match["ending"] == "old" and not path.with_name(match["name"]).exists():
                path.rename(path.with_name(match["name"]))
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return False  # nothing that another process has open is deleted there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    with atomic_open(path) as file:
        file.write(content)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8, line ends as they are."""
    atomic_write_bytes(path, text.encode())


def atomic_save_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (any device; copied when they share memory or are not contiguous) and string metadata."""
    import safetensors.torch
    import torch

    whole = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    atomic_write_bytes(path, safetensors.torch.save(whole, None if metadata is None else dict(metadata)))


class _Inert:
    """Stands for an object of a training program in a pickle: nothing of it is imported or run."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_TRAINING_PROGRAMS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "ldm.", "main.", "argparse.")


def _training_objects(path: Path) -> list[str]:
    """The classes that a file of torch.save names and that the program which trained it left there: callbacks, its options."""
    import torch

    if not zipfile.is_zipfile(path):
        return []
    return [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if name.startswith(_TRAINING_PROGRAMS)]


class NoTensors(ValueError):
    """Why a file cannot be read as one of tensors, as a part of a sentence."""


def check_stored(path: str | Path) -> None:
    """Refuse a zip of torch.save's whose parts are compressed, as torch leaves none: a megabyte could need a gigabyte. Raises NoTensors."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise NoTensors("its parts are compressed, as torch.save leaves none")


_IN_ITS_PLACE = (  # how files begin that people have where they believe to have another
    (rb"version https://git-lfs", "it is a pointer of Git LFS in the place of the file, which git lfs pull brings"),
    (rb"<(!doctype|html|\?xml)", "it is a web page in the place of the file, as sites answer who is not logged in"),
)


def _why_not_whole(path: Path, error: Exception) -> str:
    """Of a .safetensors or pickled file that cannot be read, in words; `error` is what its reader said."""
    with path.open("rb") as file:
        start = file.read(64)
        for beginning, what in _IN_ITS_PLACE:
            if re.match(rb"\s*" + beginning, start, re.IGNORECASE):
                return what
        if path.suffix.lower() not in (".safetensors", ".sft"):
            return "not a whole file of torch.save of plain tensors alone, and nothing else is read"
        file.seek(8)
        length, size = int.from_bytes(start[:8], "little"), path.stat().st_size
        try:
            header = json.loads(file.read(length)) if 2 <= length <= size - 8 else {}
            end = 8 + length + max(part["data_offsets"][1] for name, part in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            end = size
    why = " ".join(str(error).split())[:200] if end == size else f"it has {size:,} bytes, and {end:,} by its header"
    return f"not a whole safetensors file: {why}"


def load_tensors(path: str | Path, *, shapes_only: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """What a foreign file of tensors holds, on the CPU, and its metadata: a .safetensors, or else a file of torch.save, of which nothing
    but tensors and plain values is read; for what a training program left in it stands `_Inert`. Its values are not checked.

    Args:
        shapes_only: read no values; the tensors are on the device "meta".

    Raises:
        NoTensors: whatever is wrong with it, or if there is no such file.
    """
    import safetensors
    import torch

    path = Path(path)
    try:
        if path.suffix.lower() in (".safetensors", ".sft"):
            with safetensors.safe_open(path, framework="pt") as file:
                names, metadata = file.keys(), file.metadata() or {}
                if shapes_only:
                    return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}, metadata
                return {name: file.get_tensor(name) for name in names}, metadata
        check_stored(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _training_objects(path)]):
            content = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise NoTensors(error.strerror or " ".join(str(error).split())[:200]) from error
    except NoTensors:
        raise
    except Exception as error:  # for torch, a file that ends too early is an OSError; its own words would advise to turn its guard off
        raise NoTensors(_why_not_whole(path, error)) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise NoTensors(f"it holds a {type(content).__name__}, and not tensors by name")
    for name, value in content.items():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, torch.Tensor) and (tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes()):
                raise NoTensors(f"{name} is a tensor of shape {tuple(tensor.shape)}, of which the file holds less")
    return content, {}
