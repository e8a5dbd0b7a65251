"""A record in plain words, and as a table for the terminal."""

from collections.abc import Sequence

from library.measuring.comparison import Summary, differences, summarise
from library.measuring.record import EvaluationRecord
from library.measuring.response_curve import ResponseCurve
from library.measuring.statistics import Response
from library.measuring.warnings import final_warnings

ROLE_WORDS = {"scorer": "training score", "judge": "independent judge", "stay": "side effect", "share": "independent judge"}


def role_words(response: Response) -> str:
    return ROLE_WORDS[response.role]


def summary_sentence(record: EvaluationRecord) -> str:
    """What the slider does, in plain words."""
    weights = [f"at weight {_weight(record.multipliers[place])}" for place in record.ends]
    sentences = []
    for response in record.responses.values():
        if response.is_share:
            shares = [f"{response.means[place].value:.0%} {weight}" for place, weight in zip(record.ends, weights, strict=True)]
            base = response.means[record.base].value
            sentences.append(f"{response.name} holds for {base:.0%} of the base model's pictures, {' and '.join(shares)}.")
        else:
            moves = [f"{_gain_words(response, place)} {weight}" for place, weight in zip(record.ends, weights, strict=True)]
            sentences.append(f"The {role_words(response)} {response.name} {' and '.join(moves)}.")
    return " ".join(sentences)


def text_table(record: EvaluationRecord) -> str:
    """The record for a terminal, a line a multiplier; then its warnings.

    Gains are in within-prompt standard deviations with 95 % intervals (yes-or-no judges: shares of pictures); diversity, colours and
    fine detail are times the base model's.
    """
    columns = [["", "weight", *map(_weight, record.multipliers)]]
    for response in record.responses.values():
        if response in record.scaled:
            columns.append([response.name, f"{role_words(response)}, std", *map(str, response.gains_std)])
        else:
            columns.append([response.name, "mean", *(f"{mean.value:.3g} [{mean.low:.3g}, {mean.high:.3g}]" for mean in response.means)])
    for title, name, form in (
        ("pixel RMS", "pixel_drift", ".3f"),
        ("clipped", "clipped", ".1%"),
        ("diversity", "pixel_diversity", ".2f"),
        ("colours", "saturation", ".2f"),
        ("fine detail", "nyquist", ".2f"),
    ):
        columns.append(["drift" if name == "pixel_drift" else "", title, *(format(value, form) for value in record.statistics[name])])
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in zip(*columns, strict=True)]
    title = f"{record.name}: {len(record.prompts)} prompts, {record.num_pairs} pairs of prompt and seed"
    warnings = [f"warning: {warning}" for warning in final_warnings(record)]
    return "\n".join([title, *lines[:2], "-" * len(lines[0]), *lines[2:], *elsewhere_lines(record), *warnings])


def elsewhere_lines(record: EvaluationRecord) -> list[str]:
    """A line for each other way of sampling that was measured: what the scores gain at the ends, in standard deviations."""
    lines = []
    for other in record.elsewhere:
        gains = (
            f"{response.name} {', '.join(f'{response.gains_std[place]} at {_weight(other.multipliers[place])}' for place in other.ends)}"
            for response in other.scaled
        )
        lines.append(f"with {other.name}: {'; '.join(gains)}")
    return lines


def curve_table(curve: ResponseCurve) -> str:
    """A line a weight: what the training score, then each judge, gains in within-prompt standard deviations, and what share is clipped."""
    header = ["weight", "gain of the score", *curve.judges, *(["clipped"] if curve.clipped else [])]
    lines = [" | ".join(header)]
    for place, weight in enumerate(curve.multipliers):
        gain = str(curve.interval_at(weight)) if curve.resamples is not None else f"{curve.gains[place]:+.2f}"
        judged = [f"{gains[place]:+.2f}" for gains in curve.judges.values()]
        clipped = [f"{curve.clipped[place]:.1%}"] if curve.clipped else []
        lines.append(" | ".join([f"{weight:+.3g}" if weight else "0", gain, *judged, *clipped]))
    return "\n".join(lines)


def comparison_text(records: Sequence[EvaluationRecord]) -> str:
    """A line a slider for a terminal, and their differences from the first at the outer weights."""
    first = records[0]
    lines = [_summary_words(summarise(record)) for record in records]
    for name, rows in differences(records).items():
        for score, row in rows.items():
            words = [f"{row[place]} at {first.multipliers[place]:+g}" for place in first.ends]
            lines.append(f"{name} - {first.name}, {score}: {', '.join(words)}")
    return "\n".join(lines)


def _summary_words(found: Summary) -> str:
    line = "has no standard deviation without the slider" if found.line is None else f"slope {found.line}"
    index = "" if found.hack_index is None else f"; hack index {found.hack_index:.2f}"
    return f"{found.name}: {found.score}: {line}{index}"


def _gain_words(response: Response, place: int) -> str:
    gain = response.gains_std[place]
    if not gain.low * gain.high > 0:
        return "does not clearly move"
    low, high = sorted((abs(gain.low), abs(gain.high)))
    return f"{'rises' if gain.value > 0 else 'falls'} by {abs(gain.value):.2f} standard deviations (95 % interval {low:.2f} to {high:.2f})"


def _weight(multiplier: float) -> str:
    """In ASCII: a Windows console may not have the real minus sign."""
    return f"{multiplier:+g}" if multiplier else "0"
