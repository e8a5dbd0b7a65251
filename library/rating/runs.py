"""Training from the page: the TOML files of the two scripts, the process that runs them, and what the page shows of it."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.atomic_files import atomic_write_text
from library.errors import UserError
from library.rating.live import LiveOpinion
from library.rating.runner import LOG, PLAN, PROGRESS, interrupt, is_running, kill_orphans, launch, read_state
from library.rating.store import Opinion, Project
from library.rating.tables import marks_csv, write_tables

RUNS, MARKS = "runs", "marks.csv"
FEWEST = 20  # answers that a training is begun with
ENOUGH = 100  # marks, without the errors that answers have: a part of them says when the network follows them, and folds are not needed
LOG_TAIL = 60_000  # bytes
CURVES = re.compile(r"(running_|judge/.+/)?gain_at_[+-]1")  # of the metrics: what the score and the judges gain
WARNING = re.compile(r"^WARNING: (.*)$", re.MULTILINE)
ERROR = re.compile(r"^error: (.*)$", re.MULTILINE)
FILES: Mapping[str, tuple[str, str]] = {  # what the page may ask for: its place in the run, and its type
    "slider.safetensors": ("slider/slider.safetensors", "application/octet-stream"),
    "slider.json": ("slider/slider.json", "application/json"),
    "scorer.safetensors": ("scorer/scorer.safetensors", "application/octet-stream"),
    "scorer.toml": ("scorer.toml", "text/plain"),
    "slider.toml": ("slider.toml", "text/plain"),
    "check.toml": ("check.toml", "text/plain"),
    "report.html": ("check/report.html", "text/html"),
    "grid.png": ("check/grid.png", "image/png"),
    "calibration.png": ("slider/slider_calibration.png", "image/png"),
    "log.txt": ("log.txt", "text/plain"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the scripts are to be set, beside what follows from the project: values by section, for each of the three.

    Attributes:
        model: checkpoint or diffusers folder. prompts_file: what the slider is trained on.
        scorer, slider, check: of train_latent_scorer.py, train_leco_score.py and tools/evaluate_slider.py.
    """

    model: str
    prompts_file: str | None
    scorer: Mapping[str, Mapping[str, Any]]
    slider: Mapping[str, Mapping[str, Any]]
    check: Mapping[str, Mapping[str, Any]]


def toml_text(script: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A config file of a script. JSON's texts, numbers and lists are TOML's, too."""
    lines = [f"# script: {script}"]
    for title, values in sections.items():
        lines += ["", f"[{title}]", *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def merged(*parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections joined; later values count."""
    result: dict[str, dict[str, Any]] = {}
    for part in parts:
        for title, values in part.items():
            result.setdefault(title, {}).update(values)
    return result


class Runs:
    """The trainings of a project, one at a time: `runs/OPINION-NUMBER/` each."""

    def __init__(self, project: Project, recipe: Recipe) -> None:
        self.project, self.recipe, self.folder = project, recipe, project.folder / RUNS
        self._one_at_a_time = threading.RLock()  # a button that is pressed twice

    def latest(self, opinion: Opinion) -> Path | None:
        """The newest run of an opinion."""
        own = [path for path in self.folder.glob(f"{slug(opinion)}-*") if re.fullmatch(rf"{re.escape(slug(opinion))}-\d+", path.name)]
        return max(own, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def running(self) -> Path | None:
        """The run that trains now, whoever started it."""
        return next((path for path in self.folder.glob("*") if is_running(path)), None)

    def start(self, live: LiveOpinion) -> Path:
        """Write tables and TOML files, and train. Raises UserError if that cannot be done now."""
        with self._one_at_a_time:
            return self._start(live)

    def _start(self, live: LiveOpinion) -> Path:
        opinion = live.opinion
        if (busy := self.running()) is not None:
            raise UserError(f"{busy.name} is being trained; one training at a time: stop it, or wait for it")
        if self.recipe.prompts_file is None:
            raise UserError("a slider is trained on prompts, and there are none; start the page with --prompts_file")
        answers = [rating for rating in self.project.ratings(opinion) if rating.mode != "skip"]
        if len(answers) < FEWEST:
            raise UserError(f"{opinion.name} has {len(answers)} answers; give at least {FEWEST}")
        last = self.latest(opinion)
        folder = self.folder / f"{slug(opinion)}-{1 if last is None else int(last.name.rpartition('-')[2]) + 1}"
        live.learn()
        live.measure()
        write_tables(self.project, opinion, folder)
        atomic_write_text(folder / MARKS, marks_csv(live))
        sections = self.toml(folder, live)
        scripts = {"scorer": "train_latent_scorer.py", "slider": "train_leco_score.py", "check": "tools/evaluate_slider.py"}
        for name, script in scripts.items():
            atomic_write_text(folder / f"{name}.toml", toml_text(script, sections[name]))
        steps = {name: [script, "--config_file", str(folder / f"{name}.toml")] for name, script in scripts.items()}
        atomic_write_text(folder / PLAN, json.dumps({"opinion": opinion.name, "answers": len(answers), "steps": steps}, indent=1))
        launch(folder)
        return folder

    def toml(self, folder: Path, live: LiveOpinion) -> dict[str, dict[str, dict[str, Any]]]:
        """The values of the three TOML files, by section. The network of the slider learns what the running scorer says of every picture:
        from so few answers alone, it learns much less than that one (docs/experiments.md)."""
        recipe, known = self.recipe, live.progress.rank_correlation
        data: dict[str, Any] = {
            "train_data_file": str(folder / MARKS),
            "image_dir": str(self.project.folder),
            "criterion": "mse",
            "marks_worth": [round(number, 4) for number in (known.value, known.low, known.high)],
            "cache_dir": str(self.project.folder / "latent_cache"),
        }
        if len(live.worths()[0]) >= ENOUGH:
            data |= {"validation_folds": 0, "validation_split": 0.15}
        model = {"model": {"pretrained_model_name_or_path": recipe.model}}
        seed = {"training": {"seed": int(folder.name.rpartition("-")[2])}}  # the file trains the same slider again, and Train anew another
        scorer, slider = folder / "scorer" / "scorer.safetensors", folder / "slider" / "slider.safetensors"
        return {
            "scorer": merged(model, recipe.scorer, {"data": data, "output": {**_output(scorer), "resume": "auto"}}),
            "slider": merged(
                model,
                seed,
                recipe.slider,
                {
                    "score": {"scorer": [str(scorer)]},
                    "rollout": {"prompts_file": recipe.prompts_file},
                    "saving": {**_output(slider), "save_state": True, "resume": "auto"},
                },
            ),
            "check": merged(
                model,
                recipe.check,
                {
                    "evaluation": {
                        "network_weights": [str(slider)],
                        "scorer": [str(scorer)],
                        "prompts_file": recipe.prompts_file,
                        "output_dir": str(folder / "check"),
                    }
                },
            ),
        }

    def stop(self) -> None:
        """Interrupt the run that trains: its script saves the best so far, and `resume` goes on."""
        folder = self.running()
        if folder is not None:
            interrupt(folder)

    def resume(self, opinion: Opinion) -> None:
        """Go on with an opinion's newest run. Raises UserError if there is nothing to go on with."""
        with self._one_at_a_time:
            folder = self.latest(opinion)
            if folder is None or read_state(folder / PROGRESS).get("state") == "done":
                raise UserError(f"there is no training of {opinion.name} to go on with; start one")
            if (busy := self.running()) is not None:
                raise UserError(f"{busy.name} is being trained already")
            kill_orphans(folder)
            launch(folder)


def slug(opinion: Opinion) -> str:
    """An opinion's name as that of a folder."""
    return re.sub(r"\W+", "-", opinion.name.lower()).strip("-") or f"opinion-{opinion.id}"


def describe(folder: Path) -> dict[str, Any]:
    """What the page shows of a run, as JSON values."""
    plan, progress = read_state(folder / PLAN), read_state(folder / PROGRESS)
    state = progress.get("state", "starting")
    if state in ("running", "starting") and not is_running(folder):
        state = "interrupted"
    step = progress.get("step", "")
    log = _tail(folder / LOG)
    errors = ERROR.findall(log)
    scorer, slider = (_metrics(folder / name / f"{name}.metrics.jsonl") for name in ("scorer", "slider"))
    previews = sorted((folder / "slider" / "sample").glob("slider_*.png"))
    return {
        "name": folder.name,
        "state": state,
        "step": step,
        "done": progress.get("done", []),
        "answers": plan.get("answers"),
        "warnings": list(dict.fromkeys(WARNING.findall(log)))[-8:],
        "error": errors[-1] if state == "failed" and errors else "",
        "log": log[-4000:],
        "progress": {"scorer": _progress(folder, "scorer", scorer), "slider": _progress(folder, "slider", slider)},
        "curves": _curves(slider),
        "preview": previews[-1].name if previews else "",
        "toml": {name: _text(folder / f"{name}.toml") for name in ("scorer", "slider", "check")},
        "commands": [f"python {' '.join(words)}" for words in plan.get("steps", {}).values()],
        "description": read_state(folder / "slider" / "slider.json").get("description", ""),
        "files": [name for name, (place, _) in FILES.items() if (folder / place).is_file()],
    }


def file_of(folder: Path, name: str) -> tuple[Path, str] | None:
    """A file that the page may have, and its type; None for every other name."""
    if re.fullmatch(r"slider_\d{6,9}\.png", name):
        place, kind = f"slider/sample/{name}", "image/png"
    elif name in FILES:
        place, kind = FILES[name]
    else:
        return None
    return (folder / place, kind) if (folder / place).is_file() else None


def _output(path: Path) -> dict[str, str]:
    return {"output_dir": str(path.parent), "output_name": path.stem}


def _progress(folder: Path, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    match = re.search(r"^max_train_steps = (\d+)", _text(folder / f"{name}.toml"), re.MULTILINE)
    return {"step": lines[-1]["step"] + 1 if lines else 0, "of": int(match[1]) if match else 0}


def _metrics(path: Path) -> list[dict[str, Any]]:
    """As `library.training.tracking.read_metrics`, without torch; a last line may be cut short."""
    lines = []
    for line in _text(path).splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _curves(lines: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Step and value of every gain that there is, by its name."""
    names = dict.fromkeys(name for line in lines for name in line if CURVES.fullmatch(name))
    return {name: [[line["step"], line[name]] for line in lines if line.get(name) is not None] for name in names}


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
