"""The process that trains: one script after the other, as their TOML files say, whether or not the page is still there.

    python -m library.rating.runner RUN_FOLDER

`plan.json` in the folder says which scripts; `progress.json` says which of them are done, and how it ended. All that they print is in
`log.txt`. An interrupt is handed on: the script saves what it has, and the same command goes on from there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.atomic_files import atomic_write_text
from library.training.output_files import only_process

ROOT = Path(__file__).resolve().parents[2]
PLAN, PROGRESS, LOG, LOCK = "plan.json", "progress.json", "log.txt", ".run.lock"


def read_json(path: Path) -> dict[str, Any]:
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
        steps: Mapping[str, list[str]] = read_json(folder / PLAN)["steps"]
        done = [name for name in read_json(folder / PROGRESS).get("done", []) if name in steps]
        for name, words in steps.items():
            if name in done:
                continue
            say(folder, "running", done, step=name)
            with (folder / LOG).open("ab") as log:
                log.write(f"$ python {' '.join(words)}\n".encode())
                log.flush()
                child = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                code = child.wait()
            if stopped:
                say(folder, "stopped", done, step=name)
                return "stopped"
            if code:
                ended = "interrupted" if code < 0 else "failed"  # by a signal: somebody killed it, or the system that had no memory left
                say(folder, ended, done, step=name, code=code)
                return ended
            done.append(name)
        say(folder, "done", done)
        return "done"


def say(folder: Path, state: str, done: list[str], **details: object) -> None:
    text = json.dumps({"state": state, "done": done, "time": time.time(), **details}, indent=1)
    atomic_write_text(folder / PROGRESS, text)


if __name__ == "__main__":
    sys.exit(0 if run_steps(Path(sys.argv[1])) == "done" else 1)
