"""Independent judges: opinions that the training never follows, so that a score which is gamed is found out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import UserError
from library.models.base import DiffusionModel
from library.scorers.base import Scorer
from library.scorers.io import check_scorer_fits, load_scorer
from library.scorers.judges import Judge, load_judge


@dataclass(frozen=True)
class Judges:
    """By name: functions of pixels, and scorers of clean latents."""

    functions: Mapping[str, Judge] = field(default_factory=dict)
    scorers: Mapping[str, Scorer] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.functions, *self.scorers)


def load_judges(
    functions: Sequence[str],
    scorer_files: Sequence[str],
    *,
    training_files: Sequence[str],
    model: DiffusionModel,
    allow_code: Sequence[str] = (),
) -> Judges:
    """Find the functions and load the scorers.

    Args:
        functions: as `library.scorers.judges.load_judge` takes them. They are called by the name of the function.
        scorer_files: scorer files of any kind. They are called by the name of the file.
        training_files: the scorers that the training follows.
        model: whose latents the scorers read, on whose device.
        allow_code: what scorer files may run, see `library.scorers.io.load_scorer`.

    Raises:
        UserError: a judge that is none, or reads another VAE's latents, or is a scorer of the training; two judges of one name.
    """
    followed = {Path(path).resolve() for path in training_files}
    for path in scorer_files:
        if Path(path).resolve() in followed:
            raise UserError(
                f"judge_scorers has {path}, which training follows (scorer): it cannot judge itself; give one that was trained on other "
                "ratings or with another backbone, or a function of pixels in judges"
            )
    named: dict[str, Judge | Scorer] = {}
    for name, judge in [*((name.rpartition(":")[2], load_judge(name)) for name in functions), *_scorers(scorer_files, model, allow_code)]:
        if name in named or name in {Path(path).stem for path in training_files}:
            raise UserError(f"a judge is called {name!r} as another judge or a training score is; give each a name of its own")
        named[name] = judge
    return Judges(
        {name: judge for name, judge in named.items() if isinstance(judge, Judge)},
        {name: judge for name, judge in named.items() if isinstance(judge, Scorer)},
    )


def _scorers(files: Sequence[str], model: DiffusionModel, allow_code: Sequence[str]) -> list[tuple[str, Scorer]]:
    scorers = [load_scorer(path, allow_code) for path in files]
    for scorer in scorers:
        check_scorer_fits(scorer, model.vae_fingerprint())
    return [(scorer.name, scorer.to(model.device)) for scorer in scorers]
