"""What a measurement means, in words and as a table for the terminal."""

from collections.abc import Sequence

from library.measuring.evaluation import SliderEvaluation
from library.measuring.statistics import Interval, Response
from library.measuring.verdict import CAPTION_LOSS, CLIPPING_RISE, DIVERSITY_FLOOR, JUDGE_SHARE, NYQUIST_CEILING, SATURATION_CEILING

FEW_PAIRS = 32


def ends(evaluation: SliderEvaluation) -> tuple[int, int]:
    """Where the weights -1 and +1 stand among the multipliers; the outermost ones if they were not measured."""
    multipliers = evaluation.multipliers
    lowest, highest = (multipliers.index(end) if end in multipliers else place for end, place in ((-1, 0), (1, len(multipliers) - 1)))
    return lowest, highest


def summary(evaluation: SliderEvaluation) -> str:
    """What the slider does, in plain words."""
    lowest, highest = ends(evaluation)
    base = evaluation.multipliers.index(0)
    places = [place for place in (highest, lowest) if place != base]
    sentences = []
    for response in evaluation.responses.values():
        weights = [f"at weight {_weight(evaluation.multipliers[place])}" for place in places]
        if response.is_share:
            shares = [f"{response.means[place].value:.0%} {weight}" for place, weight in zip(places, weights, strict=True)]
            sentences.append(
                f"{response.name} holds for {response.means[base].value:.0%} of the base model's pictures, {' and '.join(shares)}."
            )
        else:
            moves = [f"{_gain_words(response, place)} {weight}" for place, weight in zip(places, weights, strict=True)]
            sentences.append(f"The {role_words(response)} {response.name} {' and '.join(moves)}.")
    return " ".join(sentences)


def warnings_of(evaluation: SliderEvaluation) -> list[str]:
    """What a person should know before trusting the slider, one sentence each."""
    lowest, highest = ends(evaluation)
    base = evaluation.multipliers.index(0)
    places = [place for place in (highest, lowest) if place != base]
    scorers = [response for response in evaluation.responses.values() if response.role == "scorer"]
    judges = [response for response in evaluation.responses.values() if response.role == "judge" and not response.is_share]
    found: list[str] = []
    for scorer in scorers:
        for place in places:
            weight, gain = _weight(evaluation.multipliers[place]), along(scorer, place, base)
            if gain.low <= 0:
                found.append(f"At weight {weight} the training score {scorer.name} does not clearly move the way the weight says.")
                continue
            confirmed = {judge.name: along(judge, place, base) for judge in judges}
            against = [name for name, change in confirmed.items() if change.high < 0]
            weak = [name for name, change in confirmed.items() if name not in against and change.value < JUDGE_SHARE * gain.value]
            if against:
                found.append(f"At weight {weight} the training score follows and {_names(against)} goes against it: it may be gamed.")
            if weak and len(weak) + len(against) == len(judges):
                found.append(
                    f"At weight {weight} {_names(weak)} confirms less than {JUDGE_SHARE:.0%} of the training score's change "
                    f"({gain.value:.2f} standard deviations)."
                )
    found += [f"{response.name} does not rise from every weight to the next." for response in [*scorers, *judges] if not response.monotone]
    for response in evaluation.responses.values():
        for place in places if response.is_share else ():
            loss = response.means[base].value - response.means[place].value
            if loss > CAPTION_LOSS:
                found.append(f"{response.name} falls by {loss:.0%} of the pictures at weight {_weight(evaluation.multipliers[place])}.")
    statistics = evaluation.statistics
    for place in places:
        weight = _weight(evaluation.multipliers[place])
        if statistics.clipped[place] - statistics.clipped[base] > CLIPPING_RISE:
            found.append(
                f"At weight {weight} {statistics.clipped[place]:.0%} of the pixel values are clipped to black or white "
                f"({statistics.clipped[base]:.0%} without the slider)."
            )
        if statistics.pixel_diversity[place] < DIVERSITY_FLOOR:
            found.append(f"At weight {weight} seeds of one prompt differ only {statistics.pixel_diversity[place]:.0%} as much as without.")
        if statistics.saturation and statistics.saturation[place] > SATURATION_CEILING:
            found.append(f"At weight {weight} the colours are {statistics.saturation[place]:.1f} times as strong as without the slider.")
        if statistics.nyquist and statistics.nyquist[place] > NYQUIST_CEILING:
            found.append(
                f"At weight {weight} the finest detail is {statistics.nyquist[place]:.1f} times as strong as without the slider: a grid or "
                "noise, the usual trace of a gamed score."
            )
    if evaluation.num_pairs < FEW_PAIRS:
        found.append(f"Only {evaluation.num_pairs} pairs of prompt and seed were measured: the intervals are wide.")
    return found


def text_table(evaluation: SliderEvaluation) -> str:
    """The measurement for a terminal, a line a multiplier; then what there is to warn of.

    Gains are in within-prompt standard deviations with 95 % intervals (yes-or-no judges: shares of pictures); diversity, colours and
    fine detail are times the base model's.
    """
    statistics = evaluation.statistics
    columns = [["", "weight", *map(_weight, evaluation.multipliers)]]
    for response in evaluation.responses.values():
        if response.is_share or response.std == 0:
            cells = [f"{mean.value:.3g} [{mean.low:.3g}, {mean.high:.3g}]" for mean in response.means]
            columns.append([response.name, "mean", *cells])
        else:
            cells = [f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]" for gain in response.gains_std]
            columns.append([response.name, f"{role_words(response)}, std", *cells])
    columns.append(["drift", "pixel RMS", *(f"{value:.3f}" for value in statistics.pixel_drift)])
    columns.append(["", "clipped", *(f"{value:.1%}" for value in statistics.clipped)])
    columns.append(["", "diversity", *(f"{value:.2f}" for value in statistics.pixel_diversity)])
    for name, values in (("colours", statistics.saturation), ("fine detail", statistics.nyquist)):
        if values:
            columns.append(["", name, *(f"{value:.2f}" for value in values)])
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in zip(*columns, strict=True)]
    title = f"{evaluation.name}: {len(evaluation.prompts)} prompts, {evaluation.num_pairs} pairs of prompt and seed"
    warnings = [f"warning: {line}" for line in warnings_of(evaluation)]
    return "\n".join([title, *lines[:2], "-" * len(lines[0]), *lines[2:], *warnings])


def along(response: Response, place: int, base: int) -> Interval:
    """The gain in standard deviations in the direction of the multiplier's sign: above 0 is as it should be."""
    gain = response.gains_std[place]
    return gain if place > base else Interval(-gain.value, -gain.high, -gain.low)


def role_words(response: Response) -> str:
    return "training score" if response.role == "scorer" else "independent judge"


def _gain_words(response: Response, place: int) -> str:
    gain = response.gains_std[place]
    if not gain.low * gain.high > 0:
        return "does not clearly move"
    low, high = sorted((abs(gain.low), abs(gain.high)))
    return f"{'rises' if gain.value > 0 else 'falls'} by {abs(gain.value):.2f} standard deviations (95 % interval {low:.2f} to {high:.2f})"


def _names(names: Sequence[str]) -> str:
    return " and ".join(names)


def _weight(multiplier: float) -> str:
    """In ASCII: a Windows console may not have the real minus sign."""
    return f"{multiplier:+g}" if multiplier else "0"
