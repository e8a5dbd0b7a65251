"""Kill runs at random and at every write, interrupt them, and count what is lost: docs/reliability.md has the figures.

    python -m benchmarks.reliability --kills 50 --signals 12
    python -m benchmarks.reliability --steps 20000    # one run in a row instead: memory, handles, threads, and whether metrics can be read

Every run is a process forked from this one, which has everything imported and the tiny model loaded. A run of `train_leco_score.py` saves
slider and state after every update. After each end by force, every file under its own name must be whole; the run then goes on by itself
(`resume = auto`), and must end in the bits of the run that was never interrupted, with nothing left over. POSIX only.
"""

import argparse
import copy
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.config import ModelConfig
from library.settings.options import build
from library.training.checkpoints import load_state
from library.training.tracking import METRICS_FILE, read_metrics
from tests.helpers.tiny_leco_run import make_workplace, settings
from train_leco_score import leco_score_config, train

STEPS = 4


def fork(work: Callable[[], object]) -> int:
    """Run it in a process of its own -> the process's number. Its words go nowhere."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except UserError:
        code = 2
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_in(workplace: Path, folder: Path) -> None:
    values = {"max_train_steps": STEPS, "save_every_n_steps": 1, "save_last_n_steps": 2, "save_state": True, "resume": "auto"}
    train(build(leco_score_config(), settings(workplace, folder, **values)))


def endure(workplace: Path, folder: Path, num_steps: int, look_every: float = 5.0) -> list[tuple[int, float, int, int]]:
    """One run of so many steps, saved every 500 -> (steps in metrics.jsonl, MiB resident, handles, threads), every few seconds.

    Raises:
        AssertionError: the metrics could not be read at some time, the run failed, or it wrote another number of lines.
    """
    values = {"max_train_steps": num_steps, "train_batch_size": 1, "save_every_n_steps": 500, "save_last_n_steps": 500, "save_state": True}
    pid = fork(lambda: train(build(leco_score_config(), settings(workplace, folder, **values))))
    process, seen = psutil.Process(pid), []
    while process.status() != psutil.STATUS_ZOMBIE:
        if (folder / METRICS_FILE).exists():
            steps = len(read_metrics(folder / METRICS_FILE))
            seen.append((steps, process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
        time.sleep(look_every)
    assert wait(pid) == 0 and len(read_metrics(folder / METRICS_FILE)) == num_steps
    return seen


def die_at(number: int) -> None:
    """From now on, kill this process at moment `number`, where every write has one before it and one after it."""
    count = [0]

    def live_through_it() -> None:
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    def spy(call: Callable) -> Callable:
        def counted(*arguments: object, **options: object) -> object:
            if call is open_file and "w" not in str(arguments[1:2]):  # it is read
                return call(*arguments, **options)
            live_through_it()
            made = call(*arguments, **options)
            live_through_it()
            return made

        return counted

    open_file = Path.open
    Path.open = spy(Path.open)  # type: ignore[method-assign]
    os.fsync, os.replace, Path.rename = spy(os.fsync), spy(os.replace), spy(Path.rename)  # type: ignore[method-assign]


def broken_files(folder: Path) -> list[str]:
    """The names of files and states that are there and cannot be read."""
    broken = []
    for path in sorted(folder.glob("[!.]*")):
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.name.endswith("-state"):
                load_state(path)
        except Exception:
            broken.append(path.name)
    return broken


def check(workplace: Path, folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """What is wrong after an end by force, and after the run has gone on."""
    wrong = [f"broken: {name}" for name in broken_files(folder)] if folder.exists() else []
    code = wait(fork(lambda: train_in(workplace, folder)))
    done = code == 2 and (folder / "tiny.safetensors").exists()  # it was killed after its last file
    if code != 0 and not done:
        return [*wrong, f"the resumed run ended with {code}"]
    found = load_file(folder / "tiny.safetensors")
    if not all(torch.equal(tensor, found[name]) for name, tensor in expected.items()):
        wrong.append("the resumed run has other bits")
    wrong += [f"left over: {path.name}" for path in folder.rglob(".*.tmp")] + [f"left over: {path.name}" for path in folder.rglob(".*.old")]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="Runs that are killed, half at random, half at a write.")
    parser.add_argument("--signals", type=int, default=12, help="Runs that get SIGINT or SIGTERM.")
    parser.add_argument("--steps", type=int, default=0, help="No kills: one run of so many steps.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as home:
        workplace = make_workplace(Path(home))
        model = load(workplace)
        ModelConfig.load = lambda self, **options: copy.deepcopy(model)  # type: ignore[method-assign]
        if given.steps:
            seen = endure(workplace, Path(home, "long"), given.steps)
            print(f"metrics read {len(seen)} times\n| steps | MiB | handles | threads |\n|---|---|---|---|")
            for steps, memory, handles, threads in seen[:: max(1, len(seen) // 20)] + seen[-1:]:
                print(f"| {steps} | {memory:.0f} | {handles} | {threads} |")
            return
        started = time.monotonic()
        assert wait(fork(lambda: train_in(workplace, Path(home, "whole")))) == 0
        duration = time.monotonic() - started
        expected = load_file(Path(home, "whole", "tiny.safetensors"))
        counts: Counter[str] = Counter()
        for number in range(given.kills + given.signals):
            folder = Path(home, f"run{number}")
            if number < given.kills and number % 2:
                write = draw.randrange(80)
                ended = wait(fork(lambda write=write, folder=folder: (die_at(write), train_in(workplace, folder))))
                kind = "killed at a write"
            else:
                sent = signal.SIGKILL if number < given.kills else (signal.SIGINT, signal.SIGTERM)[number % 2]
                pid = fork(lambda folder=folder: train_in(workplace, folder))
                time.sleep(draw.uniform(0.2, 1.0) * duration)
                os.kill(pid, sent)
                ended, kind = wait(pid), "killed at random" if sent == signal.SIGKILL else f"got {sent.name}"
            counts[f"{kind}, ended with {ended}"] += 1
            for problem in check(workplace, folder, expected):
                counts[f"LOST: {problem}"] += 1
                print(number, kind, problem, file=sys.stderr)
            if number % 10 == 9:
                print(number + 1, "runs", dict(counts), flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:4d} {name}")


def load(workplace: Path) -> DiffusionModel:
    """Read once; every run works on a copy."""
    return ModelConfig(pretrained_model_name_or_path=str(workplace / "model")).load(dtype=torch.float32, device=torch.device("cpu"))


if __name__ == "__main__":
    main()
