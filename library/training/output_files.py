"""What a run may write is found out before it begins, earlier files of its name are kept, and no other run writes there meanwhile."""

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from library.atomic_files import CannotWrite, refused, remove_unfinished, unfinished_name
from library.errors import UserError

logger = logging.getLogger(__name__)


def check_outputs(*files: Path, folders: Iterable[Path] = (), space: int = 0) -> None:
    """Find at the start what would keep a run from writing its files at the end; nothing is left behind, also no folder that was made.

    Every name is tried out beside its place, or where the first folder that exists is. What a killed process left of it is deleted.

    Args:
        folders: of the names, those that are to be folders.
        space: bytes that the run is sure to write.

    Raises:
        CannotWrite: a folder stands where a file is to be, or a file where a folder; a name is too long; no permission; too little space.
    """
    for path, is_folder in [*((path, False) for path in files), *((path, True) for path in folders)]:
        with refused(path):
            if path.exists() and path.is_dir() != is_folder:
                kinds = ("a file", "a folder") if is_folder else ("a folder", "a file")
                raise CannotWrite(f"{path} is {kinds[0]}, and {kinds[1]} of that name is to be written; move it, or give another name")
            place = _first_folder(path.parent)
            trial = unfinished_name(place / path.name)
            trial.open("wb").close()
            trial.unlink()
            remove_unfinished(place, re.escape(path.name))
            free = shutil.disk_usage(place).free
        if free < space:
            raise CannotWrite(f"{place} has {free / 2**20:.0f} MiB free, and {space / 2**20:.0f} MiB are to be written; free some space")


def _first_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists. Raises OSError where that is no folder."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
    return folder


def keep_earlier(folder: str | Path, name: str, names: str) -> list[Path]:
    """Give what an earlier run left other names: NAME becomes NAME-1 at their beginning, or the first number that is free -> the new names.

    Args:
        names: a regular expression of the names; each begins with `name`.
    """
    folder = Path(folder)
    present = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    found = [other for other in present if re.fullmatch(names, other)]
    number = next(n for n in itertools.count(1) if not any(re.match(rf"{re.escape(name)}-{n}(\D|$)", other) for other in present))
    with refused(folder):
        return [(folder / other).rename(folder / f"{name}-{number}{other.removeprefix(name)}") for other in found]


def keep_earlier_file(path: Path) -> None:
    """Before a file is written: give one that has its name already another, as `keep_earlier` does, and say so in the log."""
    for kept in keep_earlier(path.parent, path.stem, re.escape(path.name)):
        logger.info("an earlier file is kept as %s", kept)


@contextlib.contextmanager
def only_process(path: str | Path, what: str) -> Iterator[None]:
    """Hold a lock file for the block; the system gives it back when the process dies, however it does.

    Raises:
        UserError: another process holds it; `what` begins the sentence.
        CannotWrite: the file cannot be made.
    """
    path = Path(path)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    while True:
        with refused(path):
            path.parent.mkdir(parents=True, exist_ok=True)
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
        with contextlib.suppress(OSError):  # a folder in which nothing was written goes again
            for folder in made:
                folder.rmdir()


def _lock(file: TextIO) -> None:
    """Raises OSError if another process holds it."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(2**20)  # behind the text, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
