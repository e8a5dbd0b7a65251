"""Files that are whole or not there: a full disk or a killed process never leaves half of one, nor destroys the one before.

Written beside the target, flushed to the disk, then renamed over it, which POSIX and Windows do in one step.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

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
