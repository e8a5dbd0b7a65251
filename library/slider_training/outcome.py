"""What a run came to, in the words that its log, card and metadata share."""

from collections.abc import Sequence
from dataclasses import dataclass

from library.measuring.calibration import Calibration
from library.measuring.record import EvaluationRecord
from library.measuring.response_curve import ResponseCurve, curve_of, summarise_curve
from library.measuring.warnings import SliderWarning
from library.reports.text import curve_table, elsewhere_lines
from library.scorers.worth import Worth
from networks.lora_metadata import Card


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a slider does after `step` updates, at the weights -1, 0 and +1.

    Attributes:
        warnings: those that were not given before.
        stop: why training should stop now, or None.
    """

    step: int
    record: EvaluationRecord
    warnings: Sequence[SliderWarning] = ()
    stop: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a training.

    Attributes:
        step: after how many updates the network is that was kept.
        calibration: None without `calibrate`, a training score or prompts.
        record: the last measurement of it, at the weights -1, 0 and +1; None where nothing was measured.
        warnings: of that record.
        stop: why the training ended before its last step, or None.
        error: why the last measurement was lost, or None.
        worth: of the scorers that were followed.
    """

    step: int
    calibration: Calibration | None = None
    record: EvaluationRecord | None = None
    warnings: tuple[SliderWarning, ...] = ()
    stop: str | None = None
    error: str | None = None
    worth: Sequence[Worth] = ()

    @property
    def conclusion(self) -> str:
        """One sentence: whether the slider may be trusted."""
        if self.error is not None:
            return f"The last measurement was lost ({self.error}), so this slider is as trained: neither checked nor calibrated."
        if self.record is None:
            return "Nothing was measured: what this slider does was never looked at."
        if self.gamed:
            return "The score was gamed: do not trust this slider before you have looked at its pictures."
        if self.warnings:
            return f"{len(self.warnings)} warning{'s' if len(self.warnings) > 1 else ''}: " + " ".join(map(str, self.warnings))
        judged = "" if self.record.judges else " No independent judge was asked."
        return f"Nothing speaks against it.{judged}"

    @property
    def gamed(self) -> bool:
        return any(warning.kind == "gamed" for warning in self.warnings) or (self.stop is not None and self.stop.endswith("gamed"))

    @property
    def curve(self) -> ResponseCurve | None:
        """What was measured of the weights as they are in the file; None where it has no gains."""
        if self.calibration is not None and self.calibration.curve is not None:
            return self.calibration.curve
        scores = [] if self.record is None or self.error is not None else [*self.record.training_scores, *self.record.judges]
        return curve_of(self.record, scores[0].name) if self.record is not None and scores else None

    def card(self, comment: str | None = None) -> Card:
        """What is shown beside the file; `comment` is the user's own."""
        curve = self.curve
        if curve is None:
            return Card(hint=self.conclusion, notes="\n\n".join(filter(None, [self.note, comment])))
        line = summarise_curve(curve, self.calibration.target.max_drift if self.calibration and self.calibration.target else None)
        table = "\n".join([curve_table(curve), *(elsewhere_lines(self.record) if self.record is not None else [])])
        begin = f"; begin with {line.preferred_weight:+.3g}" if line.preferred_weight else ""
        low, high = (f"{end:+.3g}" if end else "0" for end in line.usable)
        usable = "at no weight" if line.usable == (0, 0) else f"from {low} to {high}"
        hint = f"Usable {usable}{begin}." + (" The score was gamed." if self.gamed else "")
        notes = "\n\n".join(filter(None, [self.note, table, comment]))
        return Card(hint=hint, notes=notes, preferred_weight=line.preferred_weight, usable=line.usable)

    @property
    def note(self) -> str:
        """All that a person who downloads the file should know."""
        parts = [self.calibration.note if self.calibration is not None else ""]
        if self.stop is not None:
            parts.append(f"Training stopped, because {self.stop}.")
        worth = [f"{str(worth)[0].upper()}{str(worth)[1:]}." for worth in self.worth]
        return " ".join(part for part in [*parts, self.conclusion, *worth] if part)

    def metadata(self) -> dict[str, object]:
        """`ss_leco_` entries of the LoRA's metadata."""
        return {
            **(self.calibration.metadata() if self.calibration is not None else {}),
            "leco_conclusion": self.conclusion,
            "leco_warnings": [warning.key for warning in self.warnings] or None,
            "leco_stopped": self.stop,
            "leco_scorer_worth": [str(worth) for worth in self.worth] or None,
        }
