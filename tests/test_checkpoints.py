"""Files that are whole or not there, and a state that a run goes on from to the bit."""

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from library import atomic_files
from library.atomic_files import (
    atomic_folder,
    atomic_open,
    atomic_save_safetensors,
    atomic_write_bytes,
    atomic_write_text,
    remove_unfinished,
)
from library.errors import UserError
from library.training.checkpoints import (
    CHECKSUM_FILE,
    STATE_FILE,
    load_state,
    newest_state,
    prune_steps,
    restore_rng_state,
    rng_state,
    save_state,
    state_path,
    weights_path,
)
from library.training.output_files import only_process


def test_written_files_hold_what_was_given(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    atomic_save_safetensors({"a": shared, "b": shared.T}, tmp_path / "new" / "x.safetensors", {"key": "value"})
    loaded = safetensors.torch.load_file(tmp_path / "new" / "x.safetensors")
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared.T)
    with safetensors.safe_open(tmp_path / "new" / "x.safetensors", "pt") as file:
        assert file.metadata() == {"key": "value"}
    atomic_write_text(tmp_path / "card.json", "ä\n")
    assert (tmp_path / "card.json").read_bytes() == b"\xc3\xa4\n"
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_failing_writer_leaves_the_old_file_and_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_open(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_folder_that_is_a_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        atomic_write_text(tmp_path / "file" / "x.txt", "")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only")
def test_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys\n"
        "from library.atomic_files import atomic_open\n"
        "with atomic_open(sys.argv[1]) as file:\n"
        "    file.write(b'half' * 10000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(atomic_files.__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_names_are_those_of_sd_scripts() -> None:
    assert weights_path("out", "slider") == Path("out/slider.safetensors")
    assert weights_path("out", "slider", 100) == Path("out/slider-step00000100.safetensors")
    assert state_path("out", "slider") == Path("out/slider-state")
    assert state_path("out", "slider", 100) == Path("out/slider-step00000100-state")


def test_prune_deletes_only_this_runs_old_steps(tmp_path: Path) -> None:
    for step in (50, 60, 70, 80, 90, 100):
        weights_path(tmp_path, "a.b", step).write_bytes(b"")
        weights_path(tmp_path, "a.b", step).with_suffix(".json").write_bytes(b"")
    others = [
        "a.b.safetensors",
        "aXb-step00000050.safetensors",
        "c-a.b-step00000050.safetensors",
        "a.b-step50.safetensors",
        "a.b-step00000050.png",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    before = {path.name for path in tmp_path.iterdir()}
    deleted = prune_steps(tmp_path, "a.b", step=100, last_n_steps=30)
    assert deleted == [weights_path(tmp_path, "a.b", 50), weights_path(tmp_path, "a.b", 60)]
    gone = {f"a.b-step000000{step}.{ending}" for step in (50, 60) for ending in ("safetensors", "json")}
    assert {path.name for path in tmp_path.iterdir()} == before - gone


def test_prune_of_states_leaves_foreign_folders(tmp_path: Path) -> None:
    save_state(state_path(tmp_path, "a", 10), {})
    save_state(state_path(tmp_path, "a", 20), {})
    save_state(state_path(tmp_path, "a", 25), {})
    foreign = state_path(tmp_path, "a", 5)
    foreign.mkdir()
    assert prune_steps(tmp_path, "a", step=25, last_n_steps=10, states=True) == [state_path(tmp_path, "a", 10)]
    assert foreign.is_dir()
    assert state_path(tmp_path, "a", 20).is_dir()


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    for _ in range(steps):
        scale = random.random() + float(np.random.normal())
        loss = (model(torch.randn(4, 3)) * scale).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def _parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)


def test_resumed_run_equals_the_unbroken_one_to_the_bit(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    np.random.normal()  # leaves one Gaussian in NumPy's cache, which is state too
    torch.manual_seed(3)
    model, optimizer, scheduler = _parts()
    _train(model, optimizer, scheduler, 4)
    generator = torch.Generator().manual_seed(7)
    belt = {"latents": torch.randn(2, 4), "half": torch.randn(3).bfloat16(), "prompts": ["a", "b"], "generator": generator.get_state()}
    state = {
        "network": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "belt": belt,
        "step": 4,
        "rng": rng_state(),
    }
    save_state(tmp_path / "s-state", state)
    _train(model, optimizer, scheduler, 5)
    drawn = torch.randn(3, generator=generator)

    resumed_model, resumed_optimizer, resumed_scheduler = _parts()
    loaded = load_state(tmp_path / "s-state")
    resumed_model.load_state_dict(loaded["network"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    resumed_scheduler.load_state_dict(loaded["lr_scheduler"])
    restore_rng_state(loaded["rng"])
    _train(resumed_model, resumed_optimizer, resumed_scheduler, 5)

    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[name]), name
    assert resumed_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert loaded["step"] == 4
    assert loaded["belt"]["prompts"] == ["a", "b"]
    assert loaded["belt"]["half"].dtype == torch.bfloat16
    assert torch.equal(loaded["belt"]["half"], belt["half"])
    again = torch.Generator()
    again.set_state(loaded["belt"]["generator"])
    assert torch.equal(torch.randn(3, generator=again), drawn)


def test_saving_again_replaces_the_state(tmp_path: Path) -> None:
    save_state(tmp_path, {"step": 1})
    save_state(tmp_path, {"step": 2})
    assert load_state(tmp_path) == {"step": 2}
    assert sorted(os.listdir(tmp_path)) == [CHECKSUM_FILE, STATE_FILE]
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")] == []


def test_state_that_could_not_be_loaded_is_refused_at_saving(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"state\['optimizer'\]\[0\] is a numpy.float64"):
        save_state(tmp_path / "s", {"optimizer": [np.float64(1.0)]})
    assert not (tmp_path / "s").exists()


class _Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("trap_was_sprung",)


@pytest.mark.parametrize("damage", ["missing", "empty folder", "empty file", "truncated", "text", "foreign tensors", "code", "no checksum"])
def test_bad_state_is_a_user_error(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "s"
    if damage != "missing":
        folder.mkdir()
    file = folder / STATE_FILE
    if damage == "empty file":
        file.write_bytes(b"")
    elif damage == "no checksum":
        save_state(folder, {})
        (folder / CHECKSUM_FILE).unlink()
    elif damage == "truncated":
        save_state(folder, {"weights": torch.zeros(1000)})
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "text":
        file.write_text("not a state")
    elif damage == "foreign tensors":
        torch.save({"weights": torch.zeros(2)}, file)
    elif damage == "code":
        torch.save({"format": _Trap()}, file)
    if damage in ("text", "foreign tensors", "code"):
        (folder / CHECKSUM_FILE).write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {STATE_FILE}\n")
    with pytest.raises(UserError, match=str(folder)):
        load_state(folder)
    assert not (tmp_path / "trap_was_sprung").exists()


def test_a_state_that_another_version_wrote_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"step": 1})
    content = torch.load(tmp_path / "s" / STATE_FILE, weights_only=True)
    for other in (content | {"format": "leco-score training state 1"}, {"state": {"step": 1}}, content | {"state": [1]}, [content]):
        torch.save(other, tmp_path / "s" / STATE_FILE)
        digest = hashlib.sha256((tmp_path / "s" / STATE_FILE).read_bytes()).hexdigest()
        (tmp_path / "s" / CHECKSUM_FILE).write_text(f"{digest}  {STATE_FILE}\n")
        with pytest.raises(UserError, match="resume from a state that this version wrote"):
            load_state(tmp_path / "s")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    save_state(folder, {"weights": torch.randn(50), "step": 3})
    draw = random.Random(0)
    for name in (STATE_FILE, CHECKSUM_FILE):
        whole = (folder / name).read_bytes()
        for _ in range(100):
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(flipped)
            with pytest.raises(UserError, match="damaged"):
                load_state(folder)
        (folder / name).write_bytes(whole)
    assert load_state(folder)["step"] == 3


def test_the_newest_whole_state_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_state(tmp_path, "a") is None
    for age, (name, step) in enumerate([("a", 10), ("a", 20), ("a", None), ("b", 99)]):
        save_state(state_path(tmp_path, name, step), {})
        os.utime(state_path(tmp_path, name, step) / STATE_FILE, (1000 + age, 1000 + age))
    assert newest_state(tmp_path, "a") == state_path(tmp_path, "a")
    (state_path(tmp_path, "a") / STATE_FILE).write_bytes(b"")
    assert newest_state(tmp_path, "a") == state_path(tmp_path, "a", 20)
    assert "a-state is damaged" in caplog.text and "passed over" in caplog.text
    for step in (10, 20):
        (state_path(tmp_path, "a", step) / CHECKSUM_FILE).unlink()
    with pytest.raises(UserError, match="none of the 3 states of a"):
        newest_state(tmp_path, "a")


def test_no_state_is_deleted_before_the_newest_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20):
        save_state(state_path(tmp_path, "a", step), {})
    (state_path(tmp_path, "a", 20) / STATE_FILE).write_bytes(b"cut")
    assert prune_steps(tmp_path, "a", step=20, last_n_steps=5, states=True) == []
    assert load_state(state_path(tmp_path, "a", 10)) == {} and "the states before it stay" in caplog.text


def test_a_state_larger_than_the_free_space_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path / "x-state", {"step": 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * 999))
    with pytest.raises(UserError, match="MiB free"):
        save_state(tmp_path / "x-state", {"parts": [{"weights": torch.zeros(1000)}]})
    assert load_state(tmp_path / "x-state") == {"step": 1} and len(list(tmp_path.iterdir())) == 1
    save_state(tmp_path / "x-state", {"parts": [{"weights": torch.zeros(999)}]})


def test_a_state_is_not_written_over_other_files(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "holiday.png").touch()
    with pytest.raises(UserError, match="holds holiday.png"):
        save_state(tmp_path / "s", {})
    assert os.listdir(tmp_path / "s") == ["holiday.png"]


KILLED = """
import os, signal, sys
from pathlib import Path
from library import atomic_files
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "renaming":
    rename = Path.rename
    Path.rename = lambda self, target: kill() if self.name.endswith(".tmp") else rename(self, target)
with atomic_files.atomic_folder(sys.argv[1]) as folder:
    (folder / "new").write_text("half")
    if sys.argv[2] == "writing":
        kill()
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_process_killed_while_it_replaces_a_folder_costs_nothing(tmp_path: Path, moment: str) -> None:
    with atomic_folder(tmp_path / "s") as folder:
        (folder / "old").touch()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s"), moment], cwd=Path(atomic_files.__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "s").exists() == (moment == "writing")
    remove_unfinished(tmp_path, "s")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["s", "s/old"]


HOLD = """
import sys
from library.training.output_files import only_process
with only_process(sys.argv[1], "x"):
    print("held", flush=True)
    input()
"""


@pytest.mark.skipif(os.name != "posix", reason="the lock's file stays elsewhere")
def test_a_lock_leaves_no_empty_folder(tmp_path: Path) -> None:
    with only_process(tmp_path / "a" / "b" / ".x.lock", "x"):
        pass
    assert not list(tmp_path.iterdir())
    with only_process(tmp_path / "a" / "b" / ".x.lock", "x"):
        (tmp_path / "a" / "y").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "y"]


def test_a_name_is_one_process_until_it_dies(tmp_path: Path) -> None:
    lock, root = tmp_path / ".a.lock", Path(atomic_files.__file__).parents[1]
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"a is trained by process {holder.pid} already"), only_process(lock, "a is trained"):
            pass
        holder.kill()
    assert lock.exists()
    with only_process(lock, "a is trained"):
        assert lock.read_text() == str(os.getpid())
        with pytest.raises(UserError, match="already"), only_process(lock, "a is trained"):
            pass
    assert os.name != "posix" or not lock.exists()
