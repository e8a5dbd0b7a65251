"""All that the page's server holds: the project, its opinions while they are given, the process that makes pictures, and the trainings.

It knows nothing of HTTP, and no model: those are the worker's and the trainers', in processes of their own.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from typing import Any

import numpy as np

from library.errors import UserError
from library.rating.live import LEARN_EVERY, Gallery, LiveOpinion
from library.rating.runner import ROOT
from library.rating.runs import Recipe, Runs, describe
from library.rating.store import Opinion, Project, Rating

logger = logging.getLogger(__name__)

SHOWN = 12  # pictures that the scorer likes most, least, and disagrees about
TICK = 0.25  # seconds
RESTARTS = 3  # of a worker that died by itself
SOURCE_FIELDS = ("model", "prompts_file", "pictures", "resolution", "num_steps", "guidance_scale", "mixed_precision")


class RatingSession:
    """Starts working when it is made; `close` ends it.

    Args:
        source: fields of `library.rating.worker.PictureSource`; None makes no pictures.
    """

    def __init__(self, project: Project, recipe: Recipe, source: dict[str, Any] | None, *, seed: int | None = None) -> None:
        self.project, self.runs, self._source, self._seed = project, Runs(project, recipe), source, seed
        self.gallery = Gallery(project)
        self.gallery.refresh()
        self.live: dict[str, LiveOpinion] = {}
        self.worker: dict[str, Any] = {"state": "loading" if source else "ready", "pictures": len(self.gallery.pictures)}
        self._process: subprocess.Popen | None = None
        self._starts = 0
        self._lock = threading.RLock()
        self._wake, self._closing = threading.Event(), threading.Event()
        for opinion in project.opinions() or [project.add_opinion("beauty")]:
            self._add(opinion)
        self._thread = threading.Thread(target=self._keep_learning, name="learning", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=10)
        self._end_worker()

    def opinion(self, name: str) -> LiveOpinion:
        """Raises UserError if there is none of that name."""
        live = self.live.get(name.casefold())
        if live is None:
            raise UserError(f"this project has no opinion {name[:40]!r}; it has {', '.join(o.opinion.name for o in self.live.values())}")
        return live

    def add_opinion(self, name: str, levels: int) -> LiveOpinion:
        with self._lock:
            return self._add(self.project.add_opinion(name, levels))

    def _add(self, opinion: Opinion) -> LiveOpinion:
        return self.live.setdefault(opinion.name.casefold(), LiveOpinion(self.project, self.gallery, opinion, self._seed))

    def state(self, live: LiveOpinion) -> dict[str, Any]:
        """What the page shows beside the pictures."""
        prompts: dict[str, int] = {}
        for picture in self.gallery.pictures:
            prompts[picture.prompt] = prompts.get(picture.prompt, 0) + 1
        folder = self.runs.latest(live.opinion)
        stars = [rating.value for rating in live.ratings if rating.mode == "stars"]
        return {
            "opinions": [
                {"name": o.opinion.name, "levels": o.opinion.levels, "answers": sum(r.mode != "skip" for r in o.ratings)}
                for o in list(self.live.values())
            ],
            "opinion": live.opinion.name,
            "levels": live.opinion.levels,
            "answers": sum(rating.mode != "skip" for rating in live.ratings),
            "stars": [stars.count(level) for level in range(1, live.opinion.levels + 1)],
            "prompts": sorted(prompt for prompt, count in prompts.items() if prompt and count)[:500],
            "worker": {**self.worker, "pictures": len(self.gallery.pictures), "waiting": len(self.gallery.pictures) - len(live._seen())},
            "progress": live.progress.to_dict(),
            "learning": live.learned < len(live.ratings) - LEARN_EVERY,
            "run": describe(folder) if folder is not None else None,
            "trains_elsewhere": (busy := self.runs.running()) is not None and busy != folder,
        }

    def answer(self, live: LiveOpinion, ratings: list[Rating]) -> int:
        new = live.answer(ratings)
        self._wake.set()
        return new

    def extremes(self, live: LiveOpinion) -> dict[str, list[dict[str, Any]]]:
        """The pictures that the running scorer likes most and least, and the answers that it disagrees with most."""
        worth, deviation = live.worths()
        order = np.argsort(-worth, kind="stable")
        given = {rating.first: rating for rating in live.ratings if rating.mode == "stars"}
        row_of = self.gallery.row_of

        def shown(row: int) -> dict[str, Any]:
            picture = self.gallery.pictures[row]
            own = given.get(picture.id)
            return self.picture(picture.id) | {
                "worth": round(float(worth[row]), 2),
                "unsure": round(float(deviation[row]), 2),
                "stars": own.value if own is not None else None,
                "expected": self._expected(live, worth, given, row),
            }

        rated = [row_of[picture] for picture in given if row_of.get(picture, len(worth)) < len(worth)]
        apart = sorted(
            rated, key=lambda row: -abs(self._expected(live, worth, given, row) - (given[self.gallery.pictures[row].id].value or 0))
        )
        return {
            "most": [shown(int(row)) for row in order[:SHOWN]],
            "least": [shown(int(row)) for row in order[::-1][:SHOWN]],
            "apart": [shown(row) for row in apart[:SHOWN]] if len(worth) else [],
        }

    def _expected(self, live: LiveOpinion, worth: np.ndarray, given: dict[int, Rating], row: int) -> float:
        """The stars that a picture of this worth would get: as many of the rated ones have fewer as are worth less."""
        rows = [place for picture in given if (place := self.gallery.row_of.get(picture, len(worth))) < len(worth)]
        if not rows:
            return 0.0
        stars = np.sort([given[self.gallery.pictures[place].id].value or 0 for place in rows])
        return float(stars[min(len(stars) - 1, int((worth[rows] < worth[row]).sum()))])

    def picture(self, number: int) -> dict[str, Any]:
        """Raises UserError if there is no such picture."""
        row = self.gallery.row_of.get(number)
        if row is None:
            raise UserError("the project has no such picture; load the page anew")
        picture = self.gallery.pictures[row]
        return {"id": picture.id, "prompt": picture.prompt, "width": picture.width, "height": picture.height}

    def correct(self, live: LiveOpinion, picture: int, value: float, token: str) -> None:
        """A person changes their mind about a picture: all that they said of it before is taken back."""
        self.picture(picture)
        for rating in live.ratings:
            if rating.mode == "stars" and rating.first == picture:
                live.undo(rating.token)
        self.answer(live, [Rating(token=token, mode="stars", first=picture, value=value, reason="picked")])

    # -- what goes on behind the page --------------------------------------------------------------------------------

    def _keep_learning(self) -> None:
        while not self._closing.is_set():
            try:
                self._tend_worker()
                grown = self.gallery.refresh()
                for live in list(self.live.values()):
                    if grown or live.due():
                        live.learn()
                    if live.measure_due() or (grown and live.ratings):
                        live.measure()
            except Exception:  # the page must go on
                logger.exception("learning failed; it is tried again")
                self._closing.wait(5)
            self._wake.wait(TICK)
            self._wake.clear()

    def _tend_worker(self) -> None:
        """Pictures are made while nothing is trained: both at once would only be slower."""
        if self._source is None:
            return
        if self.runs.running() is not None:
            if self._process is not None:
                self._end_worker()
                self.worker = {"state": "resting"}
        elif self._process is None and self.worker.get("state") != "error":
            self._start_worker()
        elif self._process is not None and self._process.poll() is not None:
            self._process = None
            if self.worker.get("state") != "error" and self._starts >= RESTARTS:
                self.worker = {
                    "state": "error",
                    "sentence": "the process that makes pictures ends by itself again and again; see the console",
                }

    def _start_worker(self) -> None:
        self._starts += 1
        self.worker = {"state": "loading"}
        process = subprocess.Popen(
            [sys.executable, "-m", "library.rating.worker", str(self.project.folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._process = process
        assert process.stdin is not None
        process.stdin.write(json.dumps({name: (self._source or {}).get(name) for name in SOURCE_FIELDS}) + "\n")
        process.stdin.flush()
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if process is self._process and isinstance(said, dict):
                self.worker = said
                if said.get("state") in ("making", "reading", "ready"):
                    self._starts = 0
                self._wake.set()

    def _end_worker(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()  # it ends by itself
            try:
                process.wait(timeout=8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def question_dict(session: RatingSession, asked: Any) -> dict[str, Any]:
    """A question as the page gets it; why it is asked is not said, so that nobody answers the second time as the first."""
    return {"token": asked.token, "pictures": [session.picture(number) for number in asked.pictures]}
