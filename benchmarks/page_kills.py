"""Trainings that the page began, killed at random moments: does the page see it, do they go on, and is the slider the same?

    python -m benchmarks.page_kills --folder NEW --kills 50

The page's server is real, and so are the three scripts, with few steps, on the embedded model. SIGKILL goes to the runner, to the script
that it runs, or to both; then Go on is pressed. Each training is killed ten times at most and must end in the slider of the first one,
which nobody killed, to the bit. Meanwhile ratings are given, and all must be there in the end. POSIX only.
"""

import contextlib
import json
import random
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from benchmarks import argument_parser
from benchmarks.reliability import broken_files
from library.rating.store import Project
from tests.helpers.rating_project import drawn_project, served, short_recipe, stars_of

KILLS_EACH = 10
PAUSE = 1.0  # seconds until a person presses a button


class Page:
    """The page's server, as the page speaks to it."""

    def __init__(self, address: str, worth: np.ndarray) -> None:
        self.address, self.worth, self.acknowledged = address, worth, set[str]()

    def post(self, path: str, **body: Any) -> Any:
        headers = {"content-type": "application/json"}
        content = json.dumps({"opinion": "beauty"} | body).encode()
        return json.loads(urllib.request.urlopen(urllib.request.Request(f"{self.address}/api/{path}", content, headers), timeout=60).read())

    def rate(self, opinion: str, picture: int) -> None:
        token = f"{opinion}-{len(self.acknowledged)}"
        value = stars_of(self.worth[picture - 1], np.random.default_rng(picture))
        self.post("rate", opinion=opinion, answers=[{"token": token, "mode": "stars", "pictures": [picture], "value": value}])
        self.acknowledged.add(token)

    def wait_for(self, *states: str, seconds: float) -> str:
        """The training's state: one of these, or what it is after so long."""
        end = time.monotonic() + seconds
        while (state := self.post("state")["run"]["state"]) not in states and time.monotonic() < end:
            time.sleep(0.2)
        return state


def kill(run: Path, draw: random.Random) -> tuple[bool, bool]:
    """Kill the runner, its script, or both -> whether there was something to kill, and whether nothing of the run is alive."""
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # it ended just now
        runner = psutil.Process(int((run / "pid").read_text()))
        scripts = runner.children()
        whom = draw.choice([[runner], scripts, [runner, *scripts]])
        for process in whom:
            process.kill()
        return bool(whom), all(script in whom for script in scripts)
    return False, False


def kill_trainings(folder: Path, num_kills: int, draw: random.Random) -> Counter[str]:
    """So many kills, and as many trainings as that takes -> where they were killed, how they ended, and what was lost."""
    counts: Counter[str] = Counter()
    project, worth = drawn_project(folder, 120)
    with served(project, recipe=short_recipe(folder)) as (address, _):
        page = Page(address, worth)
        for picture in range(1, 41):
            page.rate("beauty", picture)
        page.post("opinions", name="cosy", levels=5)  # what is rated meanwhile, so that every training is of the same answers
        expected, duration, killed = None, 0.0, 0
        while killed < num_kills:
            run, began = project.folder / "runs" / page.post("train")["run"], time.monotonic()
            for _ in range(0 if expected is None else min(KILLS_EACH, num_kills - killed)):
                if page.wait_for("done", seconds=draw.uniform(0, duration / 3)) == "done":
                    break
                step = page.post("state")["run"]["step"] or "the beginning"
                found, all_dead = kill(run, draw)
                if not found:
                    continue
                killed += 1
                counts[f"killed in {step}"] += 1
                page.rate("cosy", 1 + killed)
                if (state := page.wait_for("interrupted", "done", seconds=30)) == "done":
                    break
                counts[f"LOST: the page says {state}"] += state != "interrupted"
                if all_dead:  # else the script goes on writing
                    counts.update(f"LOST: {name} is broken" for name in broken_files(run))
                time.sleep(PAUSE)
                page.post("resume")
            counts[f"ended: {page.wait_for('done', 'failed', 'interrupted', seconds=600)}"] += 1
            time.sleep(PAUSE)
            marks, slider = (run / "marks.csv").read_text(), load_file(run / "slider" / "slider.safetensors")
            if expected is None:
                expected, duration = (marks, slider), time.monotonic() - began
            assert marks == expected[0], "it was given other marks to learn"
            counts["LOST: another slider"] += not all(torch.equal(slider[name], own) for name, own in expected[1].items())
            print(f"{run.name}, {time.monotonic() - began:.0f} s: {dict(+counts)}", flush=True)
    again = Project(folder)
    kept = {rating.token for opinion in again.opinions() for rating in again.ratings(opinion)}
    counts["LOST: a rating"] += len(page.acknowledged - kept)
    return +counts


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Of the project; a new one.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for what, count in sorted(kill_trainings(given.folder, given.kills, random.Random(given.seed)).items()):
        print(f"{count:4d} {what}")


if __name__ == "__main__":
    main()
