"""What keeps a run from writing is found at its start, and what an earlier run wrote is not lost."""

import errno
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.atomic_files import CannotWrite, atomic_open, atomic_write_bytes, expendable, remove_unfinished
from library.training.checkpoints import save_state
from library.training.output_files import check_outputs, keep_earlier

GONE = 2**22 + 1  # no process: more than Linux numbers


def test_what_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / f".there.{GONE}.tmp").write_text("of a killed process")
    check_outputs(tmp_path / "there", tmp_path / "new" / "deep" / "file", folders=[tmp_path / "state"], space=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"] and (tmp_path / "there").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "is_folder", "says"),
    [
        ("folder", False, "is a folder, and a file of that name"),
        ("file", True, "is a file, and a folder of that name"),
        ("file/below", False, "Not a directory|is a file"),
        ("n" * 250, False, "File name too long.*give a shorter name"),
        ("n" * 250, True, "give a shorter name"),
    ],
)
def test_what_stands_in_the_way_is_named(tmp_path: Path, name: str, is_folder: bool, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=says):
        check_outputs(*([] if is_folder else [tmp_path / name]), folders=[tmp_path / name] if is_folder else [])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CannotWrite, match="Permission denied"):
        check_outputs(tmp_path / "file")


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 << 20))
    check_outputs(tmp_path / "file", space=3 << 20)
    with pytest.raises(CannotWrite, match="3 MiB free, and 4 MiB are to be written"):
        check_outputs(tmp_path / "file", space=4 << 20)


def test_what_is_expendable_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    atomic_write_bytes(tmp_path / "file", b"old")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with expendable("step 3"):
        atomic_write_bytes(tmp_path / "file", b"new")
    assert caplog.records[0].getMessage().startswith("step 3: ") and "free some space" in caplog.text
    with pytest.raises(ZeroDivisionError), expendable("a mistake of ours"), atomic_open(tmp_path / "file"):
        raise ZeroDivisionError
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_a_folder_was_to_hold_cannot_be_written_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match=f"^{re.escape(str(tmp_path / 'state'))} could not be written .No space.* free some space"):
        save_state(tmp_path / "state", {"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_keeps_its_files_under_one_new_number(tmp_path: Path) -> None:
    names = r"slider(-step\d+)?(\.safetensors|-state)"
    assert keep_earlier(tmp_path / "nowhere", "slider", names) == keep_earlier(tmp_path, "slider", names) == []
    for name in ("slider.safetensors", "slider-step12.safetensors", "slider-1.safetensors", "slider-12-x", "slider2.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "slider-state").mkdir()
    kept = keep_earlier(tmp_path, "slider", names)
    assert sorted(path.name for path in kept) == ["slider-2-state", "slider-2-step12.safetensors", "slider-2.safetensors"]
    left = sorted(path.name for path in tmp_path.iterdir() if path not in kept)
    assert left == ["slider-1.safetensors", "slider-12-x", "slider2.safetensors"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    for pid in (GONE, os.getppid()):
        (tmp_path / f".file.{pid}.tmp").touch()
    remove_unfinished(tmp_path, "file", older_than=60)
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path, "file")
    assert [path.name for path in tmp_path.iterdir()] == [f".file.{os.getppid()}.tmp"]
