"""How well the running scorer knows a person, what it cannot know, whether more ratings would help, and that in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from library.measuring.statistics import Interval
from library.rating.agreement import bootstrapped, ceiling_of, concordance, pair_accuracy, rank_correlation, share_interval, star_agreement
from library.rating.space import FeatureSpace
from library.rating.taste import Answers, Assumption, Taste
from library.scorers.worth import OF_FOLDS

FEWEST = 20  # answers before anything is said about how well they are predicted
FEWEST_BY_CHANCE = 10  # of them, that were asked at random
FOLDS = 10
CURVE_SIZES = (10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480)
CURVE_DRAWS = 8
FEWEST_REPEATS = 4
NEAR_ENOUGH = 0.9  # of the ceiling
WORTH_MORE = 0.05  # of rank correlation or accuracy, that is still to be won
MOST_MORE = 200  # ratings that are promised to help; beyond, the curve says too little


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the page shows of an opinion's running scorer.

    Attributes:
        answers: how many were given, repeats included.
        measure: "rank correlation" of stars, or "accuracy" of pairs, of which more were asked at random (`mostly_pairs`).
        held_out: of answers that were asked at random, each predicted by a scorer that had not learned it; None if they are too few.
        correlation: the rank correlation of stars; None if they are too few.
        pair_accuracy: of two pictures, how often it knows which one the person likes better; chance is 0.5. Of pairs that were compared;
            if those are too few, of two pictures with different stars.
        ahead: the same measure over what the scorer said before each answer came.
        ceiling: the highest that `held_out` could be, as the person agrees with themselves; None while that is not known.
        agreement: how far the person agrees with themselves: correlation of two ratings of a picture, or share of pairs answered alike.
        repeats: how many were asked twice.
        curve: (answers, value, standard error) of scorers that learned fewer.
        more: how many more would help, 0 for none; None if that cannot be said.
        status: "start", "more", "enough" or "not learned". words: the same as sentences.
        drift: how the person changed while rating, in words; "" if nothing was seen.
    """

    answers: int
    measure: str
    held_out: Interval | None = None
    correlation: Interval | None = None
    pair_accuracy: Interval | None = None
    ahead: Interval | None = None
    ceiling: Interval | None = None
    agreement: Interval | None = None
    repeats: int = 0
    curve: tuple[tuple[int, float, float], ...] = ()
    more: int | None = None
    status: str = "start"
    words: str = ""
    drift: str = ""

    @property
    def rank_correlation(self) -> Interval:
        """`held_out`; of pairs by Greiner's relation: where a share a of normal variables is in the same order, they correlate by
        sin(pi (a - 1/2)). From -1 to 1 around 0 where nothing was measured."""
        if self.held_out is None:
            return Interval(0.0, -1.0, 1.0)
        if self.measure != "accuracy":
            return self.held_out
        return Interval(*(math.sin(math.pi * (share - 0.5)) for share in (self.held_out.value, self.held_out.low, self.held_out.high)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            name: value.to_list() if isinstance(value, Interval) else value
            for name, value in ((name, getattr(self, name)) for name in asdict(self))
        }


def held_out_leads(
    space: FeatureSpace, answers: Answers, choices: Sequence[Assumption], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What scorers that had not learned them say: of each rated picture its worth [N], of each pair the first's lead [M].

    All ratings of one picture are left out together.
    """
    worth, leads = np.zeros(len(answers.rated)), np.zeros(len(answers.first))
    names, own = np.unique(answers.rated, return_inverse=True)
    folds = rng.permutation(len(names)) % FOLDS
    fold_of_star, fold_of_pair = folds[own] if len(names) else np.zeros(0, int), rng.permutation(len(leads)) % FOLDS
    for fold in range(FOLDS):
        stars, pairs = fold_of_star == fold, fold_of_pair == fold
        if stars.any() or pairs.any():
            taste = Taste(space, answers.part(~stars, ~pairs), choices)
            worth[stars] = taste.means(answers.rated[stars])
            leads[pairs] = taste.means(answers.first[pairs]) - taste.means(answers.second[pairs])
    return worth, leads


def learning_curve(
    space: FeatureSpace, answers: Answers, at_random: np.ndarray, choices: Sequence[Assumption], rng: np.random.Generator
) -> tuple[tuple[int, float, float], ...]:
    """How well scorers that learned n answers predict others that were asked at random: (n, mean, standard error).

    Args:
        at_random: of the answers, stars before pairs, which were.
    """
    points, count, stars = [], len(answers), len(answers.rated)
    for size in (size for size in CURVE_SIZES if size <= 0.8 * count):
        values = []
        for _ in range(CURVE_DRAWS):
            learned = np.zeros(count, dtype=bool)
            learned[rng.choice(count, size, replace=False)] = True
            taste = Taste(space, answers.part(learned[:stars], learned[stars:]), choices)
            asked = answers.part((~learned & at_random)[:stars], (~learned & at_random)[stars:])
            if len(asked.rated) >= 6:
                values.append(rank_correlation(taste.means(asked.rated), asked.stars))
            elif len(asked.first) >= 6:
                leads = taste.means(asked.first) - taste.means(asked.second)
                values.append(pair_accuracy(leads, asked.preference))
        if len(values) > 1:
            points.append((size, float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))))
    return tuple(points)


def where_it_points(curve: Sequence[tuple[int, float, float]], answers: int, now: float, ceiling: float | None) -> int | None:
    """How many more answers the curve a - b / sqrt(n) asks for until less than `WORTH_MORE` is left; None if it does not rise plainly."""
    if len(curve) < 3:
        return None
    sizes, values, _ = np.array(curve).T
    slope, top = np.polyfit(-1 / np.sqrt(sizes), values, 1, w=np.sqrt(sizes))
    top = min(top, 1.0 if ceiling is None else ceiling)
    left = top - max(now, top - slope / math.sqrt(answers))
    if slope <= 0 or left < WORTH_MORE:
        return 0
    target = (slope / WORTH_MORE) ** 2
    return max(10, int(math.ceil((target - answers) / 10) * 10)) if target > answers else 0


def progress_words(progress: Progress) -> tuple[str, str]:
    """The status and its words."""
    held, more, ceiling, agreement = progress.held_out, progress.more, progress.ceiling, progress.agreement
    if held is None:
        left = max(1, FEWEST - progress.answers)
        return "start", f"After {left} more answer{'s' if left > 1 else ''} it can say how well it knows you."
    chance = 0.5 if progress.measure == "accuracy" else 0.0
    knows = f"it predicts you to {held.value:.2f}"
    itself = "" if agreement is None else f"you agree with yourself to {agreement.value:.2f}"
    if progress.answers >= 40 and held.low <= chance and held.value < chance + 0.2:
        if agreement is not None and agreement.value < 0.4 + chance / 2:
            return "not learned", f"It does not learn this: your answers contradict each other ({itself})."
        if agreement is not None:
            return "not learned", f"It does not learn this: {itself}, but what you rate cannot be seen in the latents."
        return "not learned", "It does not learn this so far: your answers contradict each other, or do not depend on what can be seen."
    within = f" The most that could be reached is {ceiling.value:.2f}, because {itself}." if ceiling is not None else ""
    if ceiling is not None and held.value >= NEAR_ENOUGH * ceiling.value and progress.answers >= 30:
        return "enough", f"Enough: {itself} and {knows}."
    if more == 0 and progress.answers >= 30 and held.value < chance + (1 - chance) / 2:
        return "more", f"So far {knows}, and its curve is flat: pairs, or a narrower question, may teach it more than many answers.{within}"
    if more == 0 and progress.answers >= 30:
        return "enough", f"Enough: {knows}, and more answers would hardly help.{within}"
    if more is not None and 0 < more <= MOST_MORE:
        return "more", f"About {more} more would help: {knows}.{within}"
    return "more", f"More answers help: {knows}.{within}"


def mostly_pairs(answers: Answers, at_random: np.ndarray) -> bool:
    """Whether more pairs than stars were asked at random, so that more is known of how well they are predicted."""
    stars = len(answers.rated)
    return (at_random[stars:].sum(), len(answers.first)) > (at_random[:stars].sum(), stars)


def measure_progress(
    space: FeatureSpace,
    answers: Answers,
    choices: Sequence[Assumption],
    *,
    at_random: np.ndarray,
    ahead: np.ndarray,
    repeats: np.ndarray,
    drift: str = "",
    seed: int = 0,
) -> Progress:
    """All of it.

    Args:
        at_random: of the answers, stars before pairs, which were asked at random and not for the second time.
        ahead: what was predicted of each before it came; NaN where nothing was.
        repeats: the two answers to what was asked twice [R, 2]: preferences where `mostly_pairs`, else stars.
    """
    rng, stars, count = np.random.default_rng(seed), len(answers.rated), len(answers)
    pairs, is_star = mostly_pairs(answers, at_random), np.arange(count) < stars
    own = at_random & (is_star != pairs)
    basis = {"answers": count, "measure": "accuracy" if pairs else "rank correlation", "repeats": len(repeats), "drift": drift}
    if own.sum() < FEWEST_BY_CHANCE or count < FEWEST:
        progress = Progress(**basis)
        status, words = progress_words(progress)
        return Progress(**basis, status=status, words=words)
    worth, leads = held_out_leads(space, answers, choices, rng)
    said = np.concatenate([worth, leads])
    truth = np.concatenate([answers.stars, answers.preference])

    def of_stars(measured: Callable[..., float], least: float) -> Interval | None:
        asked = is_star & at_random
        found = bootstrapped(measured, said[asked], truth[asked], rng=rng) if asked.sum() >= FEWEST_BY_CHANCE else None
        return found and found.stretched(OF_FOLDS, least, 1.0)

    def of_pairs() -> Interval | None:
        asked = ~is_star & at_random
        found = share_interval(pair_accuracy(said[asked], truth[asked]), (truth[asked] != 0.5).sum())
        return found.stretched(OF_FOLDS, 0.0, 1.0) if asked.sum() >= FEWEST_BY_CHANCE else None

    correlation, accuracy = of_stars(rank_correlation, -1.0), of_pairs()
    held_out, statistic = (accuracy, pair_accuracy) if pairs else (correlation, rank_correlation)
    assert held_out is not None, "they are enough"
    predicted = own & np.isfinite(ahead)
    agreement = ceiling = None
    if len(repeats) >= FEWEST_REPEATS:
        spread = float(answers.stars.var()) if stars else 0.0
        if pairs or spread > 0:
            agreement = (
                share_interval(float((repeats[:, 0] == repeats[:, 1]).mean()), len(repeats))
                if pairs
                else star_agreement(repeats[:, 0], repeats[:, 1], spread)
            )
            ceiling = ceiling_of(agreement, pairs=pairs)
    curve = learning_curve(space, answers, own, choices, rng)
    found = basis | {
        "held_out": held_out,
        "correlation": correlation,
        "pair_accuracy": accuracy or of_stars(concordance, 0.0),
        "ahead": bootstrapped(statistic, ahead[predicted], truth[predicted], rng=rng) if predicted.sum() >= 8 else None,
        "agreement": agreement,
        "ceiling": ceiling,
        "curve": curve,
        "more": where_it_points(curve, count, held_out.value, None if ceiling is None else ceiling.value),
    }
    status, words = progress_words(Progress(**found))
    return Progress(**found, status=status, words=words)


def find_drift(times: np.ndarray, stars: np.ndarray, predicted: np.ndarray, pause: float = 1800.0) -> str:
    """Whether the person gives more or fewer stars as a session goes on than the pictures explain, in words; "" if not plainly.

    Args:
        times, stars, predicted: of every rating [N] that was predicted before it came; a pause of so many seconds begins a new session.
    """
    if len(times) < 30:
        return ""
    session = np.concatenate([[0], np.cumsum(np.diff(times) > pause)])
    now = session == session[-1]
    if now.sum() < 30:
        return ""
    place = np.arange(now.sum()) / now.sum()
    seen, given = np.stack([np.ones(now.sum()), predicted[now]], 1), stars[now].astype(float)
    rest = given - seen @ np.linalg.lstsq(seen, given, rcond=None)[0]
    slope, _ = np.polyfit(place, rest, 1)
    error = rest.std() / math.sqrt(len(rest)) / place.std()
    if abs(slope) < 3 * error or abs(slope) < 0.3:
        return ""
    return (
        f"Over this session you gave about {abs(slope):.1f} stars {'more' if slope > 0 else 'fewer'} to pictures alike; a pause may help."
    )
