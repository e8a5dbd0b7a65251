"""What a run leaves on disk: the names that sd-scripts gives its files, and a state that a run goes on from to the bit.

Loading a state executes nothing that is in it (torch.load with weights_only): a state is tensors and plain containers. Its folder appears
whole, with a checksum that loading compares.
"""

import contextlib
import hashlib
import logging
import random
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from library.atomic_files import atomic_folder, atomic_open, check_stored
from library.errors import UserError
from library.training.output_files import check_outputs

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
CHECKSUM_FILE = "sha256sums"  # as `sha256sum --check` reads it
STATE_FORMAT = "leco-score training state 3"


def weights_path(output_dir: str | Path, output_name: str, step: int | None = None) -> Path:
    """NAME.safetensors, or NAME-step00000100.safetensors on the way."""
    return Path(output_dir) / f"{output_name}{_step_suffix(step)}.safetensors"


def state_path(output_dir: str | Path, output_name: str, step: int | None = None) -> Path:
    """The folder NAME-state, or NAME-step00000100-state on the way."""
    return Path(output_dir) / f"{output_name}{_step_suffix(step)}-state"


def prune_steps(output_dir: str | Path, output_name: str, *, step: int, last_n_steps: int, states: bool = False) -> list[Path]:
    """Delete what this run saved more than last_n_steps before `step` (--save_last_n_steps) -> what was deleted.

    Files NAME-stepXXXXXXXX.safetensors with their card (.json), or with `states` the state folders; nothing else is touched. What
    cannot be deleted is logged and left: no reason to end a run. No state goes before the newest one was read back and is whole.
    """
    if states:
        try:
            _check_whole(state_path(output_dir, output_name, step))
        except UserError as error:
            logger.warning("%s; the states before it stay", error)
            return []
    ending = "-state" if states else r"\.safetensors"
    pattern = re.compile(re.escape(output_name) + r"-step(\d{8})" + ending)
    deleted = []
    for path in sorted(Path(output_dir).glob("*")):
        match = pattern.fullmatch(path.name)
        if match is None or int(match[1]) >= step - last_n_steps:
            continue
        try:
            if not states:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)
            elif (path / STATE_FILE).is_file():
                shutil.rmtree(path)
            else:
                continue
        except OSError as error:
            logger.warning("%s could not be deleted (%s) and stays", path, error.strerror)
            continue
        deleted.append(path)
    return deleted


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write a state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    The folder takes its name when all of it is on the disk; a state that was there stays until then. Raises UserError for what
    could not be loaded again (an optimizer with an odd state), for a full disk, and for a folder that holds other files.
    """
    folder = Path(folder)
    _check_loadable(state, "state")
    if folder.is_dir() and (strangers := {path.name for path in folder.iterdir()} - {STATE_FILE, CHECKSUM_FILE}):
        raise UserError(f"{folder} holds {min(strangers)}, which is no part of a state, so none is written there; move it, or the folder")
    check_outputs(folders=[folder], space=_num_bytes(state))
    with atomic_folder(folder) as unfinished:
        with atomic_open(unfinished / STATE_FILE) as file:
            torch.save({"format": STATE_FORMAT, "state": state}, file)
        (unfinished / CHECKSUM_FILE).write_text(_checksums(unfinished), encoding="ascii", newline="\n")


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read what save_state wrote, all tensors on the CPU. Raises UserError for a folder that is missing, foreign or damaged."""
    path = Path(folder) / STATE_FILE
    _check_whole(folder)
    try:
        check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes of the reader
        raise UserError(f"{path} was not written by this program ({type(error).__name__}): resume from another state") from error
    if not isinstance(content, dict) or content.get("format") != STATE_FORMAT or not isinstance(content.get("state"), dict):
        raise UserError(f"{path} is not a {STATE_FORMAT!r}: resume from a state that this version wrote")
    return content["state"]


def newest_state(output_dir: str | Path, output_name: str) -> Path | None:
    """The state of this run that was written last and is whole; None if there is no state. Broken ones are logged and passed over.

    Raises:
        UserError: there are states, and all of them are broken.
    """
    pattern = re.compile(re.escape(output_name) + r"(-step\d{8})?-state")
    states = [path for path in Path(output_dir).glob("*") if pattern.fullmatch(path.name)]
    for path in sorted(states, key=_written_at, reverse=True):
        try:
            load_state(path)
            return path
        except UserError as error:
            logger.warning("%s; passed over", error)
    if states:
        raise UserError(f"none of the {len(states)} states of {output_name} in {output_dir} is whole; delete them to begin anew")
    return None


def _written_at(folder: Path) -> tuple[int, str]:
    with contextlib.suppress(OSError):
        return (folder / STATE_FILE).stat().st_mtime_ns, folder.name
    return 0, folder.name


def _checksums(folder: Path) -> str:
    with (folder / STATE_FILE).open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {STATE_FILE}\n"


def _check_whole(folder: str | Path) -> None:
    """Raise UserError unless every file of a state is there and as it was written."""
    folder = Path(folder)
    for name in (STATE_FILE, CHECKSUM_FILE):
        if not (folder / name).is_file():
            what = f"has no {name}" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {what}, so it is no saved training state: give a folder that --save_state wrote, NAME-state")
    try:
        whole = (folder / CHECKSUM_FILE).read_bytes() == _checksums(folder).encode()
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): resume from another state") from error
    if not whole:
        raise UserError(f"{folder} is damaged, as its checksum shows: resume from another state")


def rng_state() -> dict[str, Any]:
    """The global generators of Python, NumPy, torch and every CUDA device, as save_state can write them."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": key, "pos": int(numpy_state["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set the global generators to what rng_state returned; CUDA devices that are not here are passed over."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {"key": inner["key"].numpy().astype(np.uint32), "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)


def _num_bytes(value: Any) -> int:
    """Of the tensors in a state."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_bytes, parts))


def _step_suffix(step: int | None) -> str:
    return "" if step is None else f"-step{step:08d}"


def _check_loadable(value: Any, place: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _check_loadable(key, f"a key of {place}")
            _check_loadable(inner, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            _check_loadable(inner, f"{place}[{index}]")
    elif not (isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, complex, str, bytes)):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UserError(f"{place} is a {kind}, which cannot be read back safely: train without --save_state, or with another optimizer")
