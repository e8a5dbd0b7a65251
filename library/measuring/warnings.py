"""What a person should know of a slider before trusting it: every warning, each of a kind, made from one evaluation record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from library.measuring.record import FIRM_GAIN, REWARD, EvaluationRecord
from library.measuring.statistics import Response
from library.objectives.rewards import Goal

FLAT_GAIN = 0.1  # within-prompt standard deviations: less is no effect
STRONG_GAIN = 1.0  # within-prompt standard deviations: a weight that does nothing stands out where the other one gains as much
JUDGE_SHARE = 0.5  # of the training score's gain that the judges are to confirm
SHARE_LOSS = 0.10  # of the pictures: so much a yes-or-no judge may fall
BEYOND_RISE = 0.10  # of the pictures: so many more may pass the limit of a score
CLIPPING_RISE = 0.05  # of the pixel values: so many more may be clipped
DIVERSITY_FLOOR = 0.7  # of the base model's RMS distance between seeds
SATURATION_CEILING = 1.5  # times the base model's mean chroma
NYQUIST_CEILING = 2.0  # times the base model's share of the highest frequencies
SIDE_EFFECT = 0.2  # within-prompt standard deviations: so far a judge that is to stay may move
HARDLY_MOVED = 0.01  # of the distance between two seeds
FEW_PAIRS = 16  # of prompt and seed
# Kinds that are flaws whatever the score is about; stronger colours, for one, may be what was wanted.
FLAWS = ("share", "held", "beyond", "clipping", "nyquist", "diversity")


@dataclass(frozen=True)
class SliderWarning:
    """Something to know of a slider.

    Attributes:
        kind: gamed, unconfirmed, one-sided, share, side effect, held, beyond, clipping, saturation, nyquist, diversity, few pairs, flat; of
            a finished slider also nothing, unclear, not monotone.
        subject: what it is about among others of its kind: a score, a statistic, a weight.
        text: a sentence.
    """

    kind: str
    subject: str
    text: str

    @property
    def key(self) -> str:
        """Two warnings of one key say the same thing."""
        return f"{self.kind} {self.subject}".strip()

    def __str__(self) -> str:
        return self.text


def find_warnings(record: EvaluationRecord, goals: Sequence[Goal] = ()) -> list[SliderWarning]:
    """What is wrong with a slider, in training or after it.

    Args:
        goals: of the training; the scores that have limits among them are looked at.
    """
    found = [warning for score in record.training_scores for warning in _gaming(record, score)]
    for judge in record.share_judges:
        lost, place = max((judge.means[record.base].value - judge.means[place].value, place) for place in record.ends)
        if lost > SHARE_LOSS:
            text = f"{_at(record, place)} {judge.name} holds for {lost:.0%} of the pictures less than without the slider: what was"
            found.append(SliderWarning("share", judge.name, f"{text} asked for gets lost."))
    for judge in record.side_effects:
        moved, place = max((abs(record.gain(judge.name, place).value), place) for place in record.ends)
        gain = record.gain(judge.name, place)
        if moved > SIDE_EFFECT and gain.low * gain.high > 0:
            text = f"{_at(record, place)} {judge.name}, which is to stay, has moved by {moved:.2f} standard deviations."
            found.append(SliderWarning("side effect", judge.name, text))
    if record.num_pairs < FEW_PAIRS:
        text = f"Only {record.num_pairs} pairs of prompt and seed were measured: units and gains are uncertain; give more prompts."
        found.append(SliderWarning("few pairs", "", text))
    return [*found, *_limits(record, goals), *_picture_flaws(record)]


def final_warnings(record: EvaluationRecord) -> list[SliderWarning]:
    """`find_warnings` and what is wrong with a finished slider only."""
    found = find_warnings(record)
    if record.relative_drift < HARDLY_MOVED:
        drift = record.relative_drift
        hardly = f"hardly changes anything: the pictures move by {drift:.2%} of the distance between two seeds"
        does = hardly if drift else "changes nothing: its pictures are the base model's"
        text = f"This LoRA {does}. It is empty, far too weak, or was made for another model."
        return [*found, SliderWarning("nothing", "", text)]
    for score in record.training_scores:
        for place in record.ends:
            if record.gain(score.name, place).low <= 0:
                text = f"{_at(record, place)} the training score {score.name} does not clearly move the way the weight says."
                found.append(SliderWarning("unclear", f"{score.name} {record.multipliers[place]:+g}", text))
    for response in record.scaled:
        if response.role != "stay" and not response.monotone:
            text = f"{response.name} does not rise from every weight to the next."
            found.append(SliderWarning("not monotone", response.name, text))
    return found


def is_sound(record: EvaluationRecord, place: int) -> bool:
    """Whether judges and pictures hold at a multiplier: no judge clearly falls, what was asked for is kept, nothing burns out."""
    if place == record.base:
        return True
    lost = any(judge.means[record.base].value - judge.means[place].value > SHARE_LOSS for judge in record.share_judges)
    clipped = record.statistics.get("clipped")
    burnt = clipped is not None and clipped[place] - clipped[record.base] > CLIPPING_RISE
    return not lost and not burnt and not any(record.gain(judge.name, place).high < 0 for judge in record.judges)


def no_effect(record: EvaluationRecord, network_scale: float) -> SliderWarning | None:
    """That the training score moves at neither weight, and the likely reason; None where it moves.

    Args:
        network_scale: alpha / dim, what the network's output is multiplied with.
    """
    gains = [(record.score_gain(place), record.multipliers[place]) for place in record.ends]
    if not all(abs(gain) <= FLAT_GAIN for gain, _ in gains):  # NaN is no gain that is known
        return None
    words = " and ".join(f"{math.copysign(1, weight) * gain:+.2f} at {weight:+g}" for gain, weight in gains)
    moved = record.relative_drift
    if moved < HARDLY_MOVED:
        advice = (
            f"the pictures have moved by only {moved:.1%} of the distance between two seeds: raise learning_rate, or network_alpha (the "
            f"network's output is multiplied with alpha / dim = {network_scale:.3g})"
        )
    else:
        advice = (
            f"the pictures have moved by {moved:.0%} of the distance between two seeds, but not to where the score is higher: look at the "
            "scorer's gradient with check_reward, or train longer if the gain grows from one measurement to the next"
        )
    return SliderWarning("flat", "", f"The training score does not move ({words}, in standard deviations); {advice}.")


def _gaming(record: EvaluationRecord, score: Response) -> list[SliderWarning]:
    """A training score against the judges, and each weight against the other; the first of a kind is enough."""
    found: dict[str, SliderWarning] = {}
    named = "" if score.name == REWARD else f" {score.name}"
    for place in record.ends:
        gain, judged = record.gain(score.name, place), record.judge_gain(place)
        falls = {judge: record.gain(judge.name, place) for judge in record.judges}
        falling = [judge for judge, change in falls.items() if change.high < 0 and change.value < -FLAT_GAIN]
        if gain.low > 0 and gain.value > FLAT_GAIN and falling:
            worst, name = min((record.gain(judge.name, place).value, judge.name) for judge in falling)
            text = (
                f"{_at(record, place)} the training score{named} moves the way the weight says and a judge the other way: "
                f"{gain.value:+.1f} against {worst:+.1f} standard deviations ({name}). The score is gamed: use an earlier checkpoint, "
                "raise preserve_weight, or train the scorer on more pictures."
            )
            found.setdefault("gamed", SliderWarning("gamed", named.strip(), text))
        elif gain.low > 0 and gain.value >= FIRM_GAIN and judged < JUDGE_SHARE * gain.value:
            text = (
                f"{_at(record, place)} the training score{named} gained {gain.value:.1f} standard deviations and the judges only "
                f"{judged:.1f}, less than {JUDGE_SHARE:.0%} of it: look at the pictures, part of the gain may be gamed."
            )
            found.setdefault("unconfirmed", SliderWarning("unconfirmed", named.strip(), text))
        for other in record.ends:
            strong = record.gain(score.name, other).value
            if other != place and strong >= STRONG_GAIN and gain.value < FLAT_GAIN * strong:
                weights = [f"weight {record.multipliers[one]:+g}" for one in (other, place)]
                text = (
                    f"The training score{named} moves by {strong:.1f} standard deviations at {weights[0]} and not at {weights[1]} "
                    f"({gain.value:+.1f}, above 0 would be right): the slider works on one side only."
                )
                found[weights[1]] = SliderWarning("one-sided", f"{named} {record.multipliers[place]:+g}".strip(), text)
    return list(found.values())


def _limits(record: EvaluationRecord, goals: Sequence[Goal]) -> list[SliderWarning]:
    """Scores of the training, in the scorers' standard deviations, that are to stay or not to pass a value."""
    found = []
    for goal in goals:
        if goal.limit is None:
            continue
        response = record.responses[goal.name]
        if goal.held:
            moved, place = max((abs(response.gains[place].value), place) for place in record.ends)
            if moved > goal.limit.value:
                text = (
                    f"{_at(record, place)} the score {goal.name}, which is to be held within {goal.limit.value:g} of its standard "
                    f"deviations, has moved by {moved:.2f}."
                )
                found.append(SliderWarning("held", goal.name, text))
            continue
        side, word = (1, "above") if goal.limit.kind == "max" else (-1, "below")
        beyond = (side * (response.values - float(goal.standardise(goal.limit.value))) > 0).mean((0, 1))  # [M]
        share, place = max((float(beyond[place]), place) for place in record.ends)
        if share - beyond[record.base] > BEYOND_RISE:
            text = (
                f"{_at(record, place)} the score {goal.name} of {share:.0%} of the pictures is {word} {goal.limit.value:g}, its limit "
                f"({beyond[record.base]:.0%} without the slider)."
            )
            found.append(SliderWarning("beyond", goal.name, text))
    return found


def _picture_flaws(record: EvaluationRecord) -> list[SliderWarning]:
    """What a gamed score leaves in the pictures, at the worse weight."""

    def ends(name: str) -> list[tuple[float, int]]:
        return [(record.statistics[name][place], place) for place in record.ends] if name in record.statistics else []

    found = []
    for clipped, place in sorted(ends("clipped"))[-1:]:
        base = record.statistics["clipped"][record.base]
        if clipped - base > CLIPPING_RISE:
            text = f"{_at(record, place)} {clipped:.0%} of the pixel values are clipped to black or white ({base:.0%} without the slider)."
            found.append(SliderWarning("clipping", "", text))
    for saturation, place in sorted(ends("saturation"))[-1:]:
        if saturation > SATURATION_CEILING:
            text = f"{_at(record, place)} the colours are {saturation:.1f} times as strong as without the slider; if that is not what the"
            found.append(SliderWarning("saturation", "", f"{text} score is about, it is gamed."))
    for name, what in (("nyquist", "pixels"), ("latent_nyquist", "latents")):
        for share, place in sorted(ends(name))[-1:]:
            if share > NYQUIST_CEILING:
                text = f"{_at(record, place)} the finest detail in the {what} is {share:.1f} times as strong as without the slider: a"
                found.append(SliderWarning("nyquist", what, f"{text} grid or noise, the usual trace of a gamed score; view them in full."))
    kept, place = min([*ends("latent_diversity"), *ends("pixel_diversity")])
    if kept < DIVERSITY_FLOOR:
        text = f"{_at(record, place)} seeds of one prompt differ only {kept:.0%} as much as without the slider."
        found.append(SliderWarning("diversity", "", text))
    return found


def _at(record: EvaluationRecord, place: int) -> str:
    return f"At weight {record.multipliers[place]:+g}"
