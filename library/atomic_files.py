"""Files that are whole or not there: a full disk or a killed process never leaves half of one, nor destroys the one before.

Written beside the target, flushed to the disk, then renamed over it, which POSIX and Windows do in one step.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TextIO

import safetensors.torch
import torch
from torch import Tensor

from library.errors import UserError


@contextlib.contextmanager
def atomic_open(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends well, and is deleted when it does not. Makes missing folders.

    Raises UserError for what the operating system refuses: no space, no permission, not a folder.
    """
    path = Path(path)
    # open() and not tempfile: a temporary file of tempfile's would keep its 0600 permissions. The pid keeps processes apart.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path} could not be written ({reason}): what stood there is unchanged; free the space or choose another folder"
        ) from error


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder that takes its name when the block ends well, in the place of one that was there, and is deleted when it does not.

    A process that is killed between the two renames leaves the old folder as .NAME.PID.old: see `remove_unfinished`. Raises UserError
    for what the operating system refuses.
    """
    path = Path(path)
    unfinished, old = (path.with_name(f".{path.name}.{os.getpid()}.{ending}") for ending in ("tmp", "old"))
    try:
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
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path} could not be written ({reason}): what stood there is unchanged; free the space or choose another folder"
        ) from error


def remove_unfinished(folder: str | Path, names: str) -> None:
    """Delete what killed processes were writing in a folder: hidden files and folders that never took their names.

    Args:
        names: a regular expression of the names that they were to take. Nothing else is touched.
    """
    pattern = re.compile(rf"\.(?P<name>{names})\.\d+\.(?P<ending>tmp|old)")
    for path in Path(folder).glob(".*"):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(OSError):
            if match["ending"] == "old" and not path.with_name(match["name"]).exists():
                path.rename(path.with_name(match["name"]))
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def only_process(path: str | Path, what: str) -> Iterator[None]:
    """Hold a lock file for the block; the system gives it back when the process dies, however it does.

    Raises:
        UserError: another process holds it; `what` begins the sentence.
    """
    path = Path(path)
    while True:
        file = path.open("a+", encoding="ascii")
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            holder = file.read(20).strip() or "another one"
            file.close()
            raise UserError(f"{what} by process {holder} already; wait for it to end, or give another output_name") from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its holder ended and deleted it just now
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        if os.name == "posix":
            path.unlink(missing_ok=True)  # while it is held, so that nobody can hold a file that is gone
        file.close()


def _lock(file: TextIO) -> None:
    """Raises OSError if another process holds it."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(2**20)  # behind the text, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    with atomic_open(path) as file:
        file.write(content)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8, line ends as they are."""
    atomic_write_bytes(path, text.encode())


def atomic_save_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (any device; copied when they share memory or are not contiguous) and string metadata."""
    whole = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    atomic_write_bytes(path, safetensors.torch.save(whole, None if metadata is None else dict(metadata)))
