"""What a record comes to in a few numbers, and how several sliders differ on the same prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from library.measuring.record import EvaluationRecord
from library.measuring.response_curve import CurveSummary, curve_of, summarise_curve
from library.measuring.statistics import Interval, nan_to_none, paired_difference


@dataclass(frozen=True, kw_only=True)
class Summary:
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
        """See `CurveSummary.preferred_weight`; None if no weight is usable."""
        return None if self.line is None else self.line.preferred_weight or None

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        line = self.line
        return {
            "score": self.score,
            "slope": None if line is None else line.slope.to_list(),
            "r2": None if line is None else nan_to_none(line.r2),
            "usable": None if line is None else list(line.usable),
            "recommended_weight": self.recommended,
            "hack_index": self.hack_index,
        }


def summarise(record: EvaluationRecord) -> Summary:
    main = next(iter([*record.training_scores, *record.judges]), None)
    return Summary(
        name=record.name,
        score=main.name if main is not None else next(iter(record.responses)),
        line=None if main is None else summarise_curve(curve_of(record, main.name)),
        hack_index=record.hack_index,
    )


def differences(records: Sequence[EvaluationRecord]) -> dict[str, dict[str, tuple[Interval, ...]]]:
    """How much more every slider but the first gains than the first, by its name and the score's, one a multiplier, in standard
    deviations. Sliders that were measured at other multipliers are left out."""
    first, *others = records
    rng = np.random.default_rng(0)
    return {
        other.name: {
            response.name: paired_difference(other.responses[response.name], response, rng)
            for response in first.scaled
            if response.name in other.responses
        }
        for other in others
        if other.multipliers == first.multipliers
    }


def comparison_dict(records: Sequence[EvaluationRecord]) -> dict[str, object]:
    """As JSON values: what `differences` found, against whom."""
    found = {
        name: {score: [difference.to_list() for difference in row] for score, row in rows.items()}
        for name, rows in differences(records).items()
    }
    return {"against": records[0].name, "gain_differences_std": found}
