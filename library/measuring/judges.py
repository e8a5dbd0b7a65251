"""Independent judges: opinions that the training never follows, so that a score which is gamed is found out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import UserError
from library.measuring.statistics import Role
from library.models.base import DiffusionModel
from library.scorers.base import Scorer
from library.scorers.io import check_scorer_fits, load_scorer
from library.scorers.judges import Judge, load_judge

ROLES: Mapping[str, Role] = {"follow": "judge", "stay": "stay", "share": "share"}  # as a user writes them after "="


@dataclass(frozen=True)
class Judges:
    """By name: functions of pixels, scorers of clean latents, and the roles of those that have another than "judge"."""

    functions: Mapping[str, Judge] = field(default_factory=dict)
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.functions, *self.scorers)

    def on(self, model: DiffusionModel) -> "Judges":
        """Themselves, the scorers on the model's device. Raises UserError for one that reads other latents than the model's."""
        for scorer in self.scorers.values():
            check_scorer_fits(scorer.to(model.device), model.vae_fingerprint())
        return self


def load_judges(
    functions: Sequence[str],
    scorer_files: Sequence[str],
    *,
    training_files: Sequence[str | Path],
    allow_code: Sequence[str] = (),
) -> Judges:
    """Find the functions and load the scorers.

    Args:
        functions: as `library.scorers.judges.load_judge` takes them. They are called by the name of the function, or by all
            of the word where a training score has that name.
        scorer_files: scorer files of any kind. They are called by the name of the file. Either may end in a role: "=follow" is to rise and
            fall with the weight, "=stay" is not to move, "=share" answers yes or no and must not fall.
        training_files: the scorers that the training follows.
        allow_code: what scorer files may run, see `library.scorers.io.load_scorer`.

    Raises:
        UserError: a judge that is none, or is a scorer of the training; two judges of one name.
    """
    followed = {Path(path).resolve() for path in training_files}
    roles: dict[str, Role] = {}
    named: dict[str, Judge | Scorer] = {}
    for number, word in enumerate([*functions, *scorer_files]):
        source, role = split_role(word)
        if number >= len(functions) and Path(source).resolve() in followed:
            raise UserError(
                f"judge_scorers has {source}, which training follows (scorer): it cannot judge itself; give one that was trained on other "
                "ratings or with another backbone, or a function of pixels in judges"
            )
        judge = load_judge(source) if number < len(functions) else load_scorer(source, allow_code)
        scores = {Path(path).stem for path in training_files}
        name = source.rpartition(":")[2] if isinstance(judge, Judge) else judge.name
        if name in scores and isinstance(judge, Judge):
            name = source
        if name in named or name in scores:
            raise UserError(f"a judge is called {name!r} as another judge or a training score is; give each a name of its own")
        named[name] = judge
        if role is not None:
            roles[name] = role
    return Judges(
        {name: judge for name, judge in named.items() if isinstance(judge, Judge)},
        {name: judge for name, judge in named.items() if isinstance(judge, Scorer)},
        roles,
    )


def split_role(word: str) -> tuple[str, Role | None]:
    """ "my.py:edges=stay" -> the judge and its role; None where none is given. Raises UserError for a role that is none."""
    source, equals, role = word.rpartition("=")
    if not equals:
        return word, None
    if role not in ROLES:
        raise UserError(f"judge {word!r} has the role {role!r}, but a role is follow, stay or share, as in my_judges.py:edges=stay")
    return source, ROLES[role]
