"""What an evaluation comes to in a few numbers, and how several sliders differ on the same prompts and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from library.measuring.findings import ends
from library.measuring.observation import hack_index, share_kept
from library.measuring.response_curve import CurveSummary, curve_of, summarise_curve
from library.measuring.slider_evaluation import SliderEvaluation
from library.measuring.statistics import Interval, Response, nan_to_none, paired_difference


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A slider in one row of a table.

    Attributes:
        name: the slider's.
        score: the response that its slope is of: the first training score, or the first judge where none was given.
        line: slope, R2 and usable range of that score; None where it does not vary without the slider.
        hack_index: share of the training score's gain that the judges do not see, of the worse end; None without either.
    """

    name: str
    score: str
    line: CurveSummary | None
    hack_index: float | None

    @property
    def recommended(self) -> float | None:
        """The weight to begin with: 1, or the strongest usable weight where that is less; None if no positive weight is usable."""
        return min(1.0, self.line.usable[1]) if self.line is not None and self.line.usable[1] > 0 else None

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        line = self.line
        return {
            "score": self.score,
            "slope": None if line is None else _to_list(line.slope),
            "r2": None if line is None else nan_to_none(line.r2),
            "usable": None if line is None else list(line.usable),
            "recommended_weight": self.recommended,
            "hack_index": self.hack_index,
        }


def scaled(evaluation: SliderEvaluation) -> list[Response]:
    """The responses that have gains in standard deviations: those that vary without the slider and are no yes-or-no judges."""
    return [response for response in evaluation.responses.values() if response.std > 0 and not response.is_share]


def digest(evaluation: SliderEvaluation) -> Digest:
    responses = scaled(evaluation)
    main = next((response for response in responses if response.role == "scorer"), responses[0] if responses else None)
    return Digest(
        name=evaluation.name,
        score=main.name if main is not None else next(iter(evaluation.responses)),
        line=None if main is None else summarise_curve(curve_of(evaluation, main.name)),
        hack_index=_hack_index(evaluation),
    )


def differences(evaluations: Sequence[SliderEvaluation]) -> dict[str, dict[str, tuple[Interval, ...]]]:
    """How much more every slider but the first gains than the first, by its name and the score's, one a multiplier, in standard
    deviations. Sliders that were measured at other multipliers are left out."""
    first, *others = evaluations
    rng = np.random.default_rng(0)
    return {
        other.name: {
            response.name: paired_difference(other.responses[response.name], response, rng)
            for response in scaled(first)
            if response.name in other.responses
        }
        for other in others
        if other.multipliers == first.multipliers
    }


def comparison_dict(evaluations: Sequence[SliderEvaluation]) -> dict[str, object]:
    """As JSON values: what `differences` found, against whom."""
    found = {
        name: {score: [_to_list(difference) for difference in row] for score, row in rows.items()}
        for name, rows in differences(evaluations).items()
    }
    return {"against": evaluations[0].name, "gain_differences_std": found}


def comparison_text(evaluations: Sequence[SliderEvaluation]) -> str:
    """A line a slider for a terminal, and their differences from the first at the outer weights."""
    lines = [_digest_words(digest(evaluation)) for evaluation in evaluations]
    lowest, highest = ends(evaluations[0])
    multipliers = evaluations[0].multipliers
    for name, rows in differences(evaluations).items():
        for score, row in rows.items():
            words = [f"{_signed(row[place])} at {multipliers[place]:+g}" for place in (highest, lowest) if multipliers[place]]
            lines.append(f"{name} - {evaluations[0].name}, {score}: {', '.join(words)}")
    return "\n".join(lines)


def _digest_words(found: Digest) -> str:
    line = "has no standard deviation without the slider" if found.line is None else f"slope {found.line}"
    index = "" if found.hack_index is None else f"; hack index {found.hack_index:.2f}"
    return f"{found.name}: {found.score}: {line}{index}"


def _hack_index(evaluation: SliderEvaluation) -> float | None:
    zero = evaluation.multipliers.index(0)
    by_role: Mapping[str, list[Response]] = {"scorer": [], "judge": []}
    for response in scaled(evaluation):
        by_role[response.role].append(response)
    if not by_role["scorer"] or not by_role["judge"]:
        return None

    def gain(role: str, place: int) -> float:
        return float(np.sign(place - zero) * np.mean([response.gains_std[place].value for response in by_role[role]]))

    def index(place: int) -> float:
        return hack_index(gain("scorer", place), gain("judge", place), share_kept(evaluation.responses.values(), place, zero))

    return max(index(place) for place in ends(evaluation) if place != zero)


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _to_list(interval: Interval) -> list[float | None]:
    return [nan_to_none(bound) for bound in (interval.value, interval.low, interval.high)]
