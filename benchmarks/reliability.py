"""Kill runs at random and at every write, interrupt them, and count what is lost: docs/reliability.md has the figures.

    python -m benchmarks.reliability --kills 50 --signals 12
    python -m benchmarks.reliability --steps 20000    # one run in a row instead: memory, handles, threads, and whether metrics can be read

Every run is a process forked from this one, which has everything imported: of `train_leco_score.py`, of `train_latent_scorer.py` and of
`tools/cache_latents.py`. After each end by force, every file under its own name must be whole; the run then goes on by itself
(`resume = auto`), and must end in the bits of the run that was never interrupted, with nothing left over. POSIX only.
"""

import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

import train_latent_scorer
import train_leco_score
from benchmarks import argument_parser, markdown_table
from examples.shapes.draw_pictures import write_ratings
from library.errors import UserError
from library.models.config import ModelConfig
from library.models.vae import VaeFingerprint
from library.scorer_data import encoding, latent_cache
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.latent_cache import open_cache
from library.scorer_data.records import FilePicture
from library.scorer_training.config import LatentScorerConfig
from library.settings.options import build_config
from library.slider_training.setup import leco_score_config
from library.training.checkpoints import load_state
from library.training.tracking import read_metrics
from tests.helpers.golden_scorer import SMALL
from tests.helpers.tiny_leco_run import make_workplace, settings
from tests.helpers.tiny_models import tiny_vae
from tools import cache_latents


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
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass(frozen=True)
class Case:
    """A script whose runs are ended by force.

    Attributes:
        run: works in a folder, or goes on there.
        result: what it came to, by name; it raises while the work is not done.
        tolerance: how far that may be from what the uninterrupted run came to; 0: the same bits.
    """

    run: Callable[[Path], object]
    result: Callable[[Path], dict[str, torch.Tensor]]
    tolerance: float = 0.0


def slider_case(home: Path) -> Case:
    """Slider and state are saved after each of four updates; the model is loaded once, here."""
    workplace = make_workplace(home / "slider")
    model = ModelConfig(pretrained_model_name_or_path=str(workplace / "model")).load(dtype=torch.float32, device=torch.device("cpu"))
    ModelConfig.load = lambda self, **options: copy.deepcopy(model)  # type: ignore[method-assign]
    often = {"max_train_steps": 4, "save_every_n_steps": 1, "save_last_n_steps": 2, "save_state": True, "resume": "auto"}
    return Case(
        lambda folder: train_leco_score.train(build_config(leco_score_config(), settings(workplace, folder, **often))),
        lambda folder: load_file(folder / "tiny.safetensors"),
    )


def scorer_case(home: Path) -> Case:
    """Scorer and state after every second of six steps; the latents are in the cache from the second run on."""
    ratings = write_ratings(home / "pictures", 40, "brightness", seed=0)
    tiny_vae().save_pretrained(home / "vae")
    values = {**SMALL, "vae": home / "vae", "train_data_file": ratings, "cache_dir": home / "cache", "num_threads": 1, "max_train_steps": 6}
    values |= {"save_every_n_steps": 2, "save_state": True, "resume": "auto", "validate_every_n_steps": 3}
    return Case(
        lambda folder: train_latent_scorer.train(build_config(LatentScorerConfig, {**values, "output_dir": folder})),
        lambda folder: load_file(folder / "scorer.safetensors"),
    )


def cache_case(home: Path) -> Case:
    """40 pictures in shards of 16."""
    pictures = write_ratings(home / "to cache", 40, "brightness", seed=0).parent
    vae = tiny_vae()
    vae.save_pretrained(home / "cache vae")
    words = ["--vae", str(home / "cache vae"), "--model_family", "sd1", "--picture_folder", str(pictures), "--num_threads", "1"]
    words += ["--resolution", "64", "--no-enable_bucket", "--cache_dir"]

    def run(folder: Path) -> None:
        encoding.SHARD_ROWS = 16
        latent_cache.OTHER_MACHINES = 0.0  # the files of a killed process of this machine are deleted at once
        sys.argv = ["cache_latents.py", *words, str(folder)]
        cache_latents.main()

    def result(folder: Path) -> dict[str, torch.Tensor]:
        cache = open_cache(folder, VaeFingerprint.of(vae), BucketConfig(resolution="64", enable_bucket=False))
        files = sorted(pictures.rglob("*.png"))
        rows = cache.find_all([FilePicture(file.absolute()) for file in files])[:, 0]
        assert (rows >= 0).all(), "a picture is not cached"
        return {"latents": cache.read(rows)}

    return Case(run, result, tolerance=1e-3)  # in other batches, the last digits may be others


CASES = {"slider": slider_case, "scorer": scorer_case, "cache": cache_case}


def endure(workplace: Path, folder: Path, num_steps: int, look_every: float = 5.0) -> list[tuple[int, float, int, int]]:
    """One run of so many steps, saved every 500 -> (steps in the metrics, MiB resident, handles, threads), every few seconds.

    Raises:
        AssertionError: the metrics could not be read at some time, the run failed, or it wrote another number of lines.
    """
    values = {"max_train_steps": num_steps, "train_batch_size": 1, "save_every_n_steps": 500, "save_last_n_steps": 500, "save_state": True}
    pid = fork(lambda: train_leco_score.train(build_config(leco_score_config(), settings(workplace, folder, **values))))
    process, seen, path = psutil.Process(pid), [], folder / "tiny.metrics.jsonl"
    while process.status() != psutil.STATUS_ZOMBIE:
        if path.exists():
            steps, memory = len(read_metrics(path)), process.memory_info().rss / 2**20
            if memory:  # it may have ended just now
                seen.append((steps, memory, process.num_fds(), process.num_threads()))
        time.sleep(look_every)
    assert wait(pid) == 0 and len(read_metrics(path)) == num_steps
    return seen


def die_at(number: int) -> list[int]:
    """From now on, kill this process at moment `number`, where every write has one before it and one after it -> the moments so far."""
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
    return count


def count_moments(case: Case, folder: Path) -> int:
    """Run it undisturbed -> how many moments `die_at` knows there."""
    note = folder.with_suffix(".moments")

    def work() -> None:
        count = die_at(-1)
        case.run(folder)
        note.write_text(str(count[0]))

    assert wait(fork(work)) == 0
    return int(note.read_text())


def broken_files(folder: Path) -> list[str]:
    """The names of files and states that are there and cannot be read."""
    broken = []
    for path in sorted(folder.rglob("[!.]*")):
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.name.endswith("-state"):
                load_state(path)
        except Exception:
            broken.append(path.name)
    return broken


def check(case: Case, folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """What is wrong after an end by force, and after the run has gone on."""
    wrong = [f"broken: {name}" for name in broken_files(folder)] if folder.exists() else []
    code = wait(fork(lambda: case.run(folder)))
    if code not in (0, 2):  # 2: it was killed after its last file, and nothing is left to train
        return [*wrong, f"the resumed run ended with {code}"]
    try:
        found = case.result(folder)
    except Exception as error:
        return [*wrong, f"the resumed run ended with {code} and without a result ({error})"]
    if not all(torch.allclose(tensor, found[name], rtol=0, atol=case.tolerance) for name, tensor in expected.items()):
        wrong.append("the resumed run has another result")
    return wrong + [f"left over: {path.name}" for ending in ("tmp", "old") for path in folder.rglob(f".*.{ending}")]


def end_by_force(case: Case, home: Path, num_kills: int, num_signals: int, draw: random.Random) -> Counter[str]:
    """So many runs killed, by turns at random and at a write, then so many that get a signal -> how they ended, and what was lost."""
    moments = count_moments(case, home / "counted")
    started = time.monotonic()
    assert wait(fork(lambda: case.run(home / "whole"))) == 0
    duration = time.monotonic() - started
    expected = case.result(home / "whole")
    counts: Counter[str] = Counter()
    for number in range(num_kills + num_signals):
        folder = home / f"run{number}"
        if number < num_kills and number % 2:
            write = draw.randrange(moments)
            ended = wait(fork(lambda write=write, folder=folder: (die_at(write), case.run(folder))))
            kind = "killed at a write"
        else:
            sent = signal.SIGKILL if number < num_kills else (signal.SIGINT, signal.SIGTERM)[number % 2]
            pid = fork(lambda folder=folder: case.run(folder))
            time.sleep(draw.uniform(0.1, 0.9) * duration)
            os.kill(pid, sent)
            ended, kind = wait(pid), "killed at random" if sent == signal.SIGKILL else f"got {sent.name}"
        counts[f"{kind}, ended with {ended}"] += 1
        for problem in check(case, folder, expected):
            counts[f"LOST: {problem}"] += 1
            print(number, kind, problem, file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--kills", type=int, default=50, help="Runs of each that are killed, half at random, half at a write.")
    parser.add_argument("--signals", type=int, default=12, help="Runs of each that get SIGINT or SIGTERM.")
    parser.add_argument("--steps", type=int, default=0, help="No kills: one run of so many steps.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored, and stays so in what is forked
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        if given.steps:
            seen = endure(make_workplace(home), home / "long", given.steps)
            some = seen[:: max(1, len(seen) // 20)] + seen[-1:]
            rows = [(steps, f"{memory:.0f}", handles, threads) for steps, memory, handles, threads in some]
            print(f"metrics read {len(seen)} times\n{markdown_table(('steps', 'MiB', 'handles', 'threads'), rows)}")
            return
        for case in given.cases:
            own = home / case
            counts = end_by_force(CASES[case](own), own, given.kills, given.signals, random.Random(given.seed))
            for ending, count in sorted(counts.items()):
                print(f"{case}: {count:4d} {ending}", flush=True)


if __name__ == "__main__":
    main()
