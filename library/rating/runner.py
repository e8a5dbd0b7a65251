"""The process that trains: one script after the other, as their TOML files say, whether or not the page is still there.

    python -m library.rating.runner RUN_FOLDER

`plan.json` in the folder says which scripts; `progress.json` says which of them are done, and how it ended. All that they print is in
`log.txt`. An interrupt is handed on: the script saves what it has, and the same command goes on from there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.atomic_files import atomic_write_text
from library.errors import UserError
from library.training.output_files import only_process

ROOT = Path(__file__).resolve().parents[2]
PLAN, PROGRESS, LOG, LOCK = "plan.json", "progress.json", "log.txt", ".run.lock"


def read_state(path: Path) -> dict[str, Any]:
    """What a file says; nothing if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def run_steps(folder: Path) -> str:
    """Run the steps that are not done -> "done", "stopped", "interrupted" or "failed". Raises UserError if somebody runs them already."""
    stopped: list[int] = []
    child: subprocess.Popen | None = None

    def interrupt(number: int, _frame: object) -> None:
        stopped.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with only_process(folder / LOCK, f"{folder.name} is trained"):
        steps: Mapping[str, list[str]] = read_state(folder / PLAN)["steps"]
        done = [name for name in read_state(folder / PROGRESS).get("done", []) if name in steps]
        for name, words in steps.items():
            if name in done:
                continue
            write_progress(folder, "running", done, step=name)
            with (folder / LOG).open("ab") as log:
                log.write(f"$ python {' '.join(words)}\n".encode())
                log.flush()
                child = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                code = child.wait()
            if stopped:
                write_progress(folder, "stopped", done, step=name)
                return "stopped"
            if code:
                ended = "interrupted" if code < 0 else "failed"  # by a signal: somebody killed it, or the system that had no memory left
                write_progress(folder, ended, done, step=name, code=code)
                return ended
            done.append(name)
        write_progress(folder, "done", done)
        return "done"


def write_progress(folder: Path, state: str, done: list[str], **details: object) -> None:
    text = json.dumps({"state": state, "done": done, "time": time.time(), **details}, indent=1)
    atomic_write_text(folder / PROGRESS, text)


# -- from the page's server ---------------------------------------------------------------------------------------------------


def launch(folder: Path) -> None:
    """Start the runner in a session of its own: it goes on when the page's server ends."""
    write_progress(folder, "starting", read_state(folder / PROGRESS).get("done", []))
    process = subprocess.Popen(
        [sys.executable, "-m", "library.rating.runner", str(folder)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atomic_write_text(folder / "pid", str(process.pid))
    _runners[folder] = process


# Runners that this process started, by their run's folder: one that ended is waited for, and one that begins holds no lock yet.
_runners: dict[Path, subprocess.Popen] = {}


def is_running(folder: Path) -> bool:
    """Whether a runner holds this run, or is about to."""
    own = _runners.get(folder)
    if own is not None and own.poll() is None:
        return True
    if not (folder / LOCK).exists():
        return False
    try:
        with only_process(folder / LOCK, ""):
            return False
    except (UserError, OSError):
        return True


def interrupt(folder: Path) -> None:
    """As Ctrl-C to the runner, which hands it on."""
    try:
        os.kill(int((folder / "pid").read_text(encoding="ascii")), signal.SIGINT)
    except (OSError, ValueError):
        return


def kill_orphans(folder: Path) -> None:
    """End a script whose runner was killed: it belongs to the runner's process group."""
    if os.name == "posix" and not is_running(folder):
        try:
            group = int((folder / "pid").read_text(encoding="ascii"))
            if not is_alive(group):  # else the number is a stranger's by now, and nothing of ours is left of that group
                os.killpg(group, signal.SIGKILL)
        except (OSError, ValueError):
            return


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


if __name__ == "__main__":
    sys.exit(0 if run_steps(Path(sys.argv[1])) == "done" else 1)
