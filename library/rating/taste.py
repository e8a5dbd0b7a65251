"""The running scorer: what a person's answers say of every picture, learned anew in well under a second.

A Gaussian process on features of pictures (`library.rating.features`): a picture has one hidden worth, stars are ordered levels of it
(cumulative logits, McCullagh 1980), and a choice between two pictures is Bradley and Terry's with ties after Davidson (1970), so stars and
pairs speak of one scale. Learned by Newton's method and Laplace's approximation (Rasmussen and Williams 2006, chapter 3), which also says
how sure it is: the ensemble of all scorers that the answers leave possible. How noisy the person is and which features count is what makes
the answers most probable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, softmax

from library.rating.space import FeatureSpace

NOISES = (0.15, 0.3, 0.6, 1.2)  # logistic scale of an answer's error; worths have a standard deviation of 1
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the first kernel
LESS_PROBABLE = 3.0  # than the most probable assumption, in log evidence, beyond which one is dropped
NEWTON_STEPS, TOLERANCE = 15, 1e-3
LOGISTIC_VARIANCE = math.pi**2 / 3
JITTER = 1e-6


@dataclass(frozen=True)
class Answers:
    """What was answered, by the numbers of pictures.

    Attributes:
        rated, stars: pictures [N] and their levels [N] from 1. levels: how many there are.
        first, second, preference: pairs [M], and 1 where the first is better, 0 the second, 0.5 for a tie.
    """

    rated: np.ndarray
    stars: np.ndarray
    first: np.ndarray
    second: np.ndarray
    preference: np.ndarray
    levels: int = 5

    @staticmethod
    def of(stars: Sequence[tuple[int, float]] = (), pairs: Sequence[tuple[int, int, float]] = (), levels: int = 5) -> Answers:
        rated, values = np.array(stars, dtype=float).reshape(-1, 2).T
        first, second, preference = np.array(pairs, dtype=float).reshape(-1, 3).T
        return Answers(rated.astype(int), values, first.astype(int), second.astype(int), preference, levels)

    def __len__(self) -> int:
        return len(self.rated) + len(self.first)

    def part(self, stars: np.ndarray, pairs: np.ndarray) -> Answers:
        """Those at these places, or where these are true."""
        return Answers(self.rated[stars], self.stars[stars], self.first[pairs], self.second[pairs], self.preference[pairs], self.levels)


@dataclass(frozen=True)
class Assumption:
    """What a scorer assumes. mix: number of one of MIXES. noise: one of NOISES. weight: how probable it is, among the others."""

    mix: int
    noise: float
    weight: float = 1.0


@dataclass(frozen=True)
class _Fit:
    """One assumption's scorer: means are K alpha, and covariances shrink by K precision K."""

    choice: Assumption
    evidence: float
    alpha: np.ndarray
    precision: np.ndarray


class Taste:
    """A scorer that has learned some answers: the average of the scorers of several assumptions, each as probable as the answers make it.

    Args:
        space: where the pictures lie.
        answers: to learn. None at all leave every picture's worth at 0, with a standard deviation of 1.
        choices: assumptions that were weighed already; None weighs them.
        near: those of a moment ago: only they and their neighbours are tried, which is quicker.
    """

    def __init__(
        self,
        space: FeatureSpace,
        answers: Answers,
        choices: Sequence[Assumption] | None = None,
        *,
        near: Sequence[Assumption] | None = None,
    ) -> None:
        self.answers, self._space = answers, space
        self.known = np.unique(np.concatenate([answers.rated, answers.first, answers.second])).astype(int)
        blocks = space.kernels(self.known, self.known)
        if choices is not None:
            self._fits = [self._fit(blocks, choice) for choice in choices]
        elif not len(answers):
            self._fits = [self._fit(blocks, Assumption(mix, NOISES[1], 1 / len(MIXES))) for mix in range(len(MIXES))]
        else:
            fits = [self._fit(blocks, choice) for choice in _neighbours(near)]
            best = max(fit.evidence for fit in fits)
            fits = [fit for fit in fits if fit.evidence > best - LESS_PROBABLE]
            weights = softmax([fit.evidence for fit in fits])
            self._fits = [replace(fit, choice=replace(fit.choice, weight=float(weight))) for fit, weight in zip(fits, weights, strict=True)]

    @property
    def choices(self) -> tuple[Assumption, ...]:
        """The assumptions that the answers leave probable."""
        return tuple(fit.choice for fit in self._fits)

    @property
    def size(self) -> int:
        """How many pictures it can say something about."""
        return self._space.size

    @property
    def noise(self) -> float:
        """Logistic scale of an answer's error, in units of worth; its standard deviation is 1.8 times that."""
        return sum(choice.weight * choice.noise for choice in self.choices)

    def means(self, rows: np.ndarray) -> np.ndarray:
        """Worth of pictures [N]; higher is better. Of all, it has about mean 0 and standard deviation 1."""
        return sum((fit.choice.weight * mean for fit, mean in self._means(rows)), np.zeros(len(rows)))

    def covariance(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Of the worths of pictures [N] and [M], as the answers leave them [N, M]; what the assumptions disagree on is part of it."""
        total = np.zeros((len(rows), len(columns)))
        own, other = self.means(rows), self.means(columns)
        near_rows, near_columns = self._space.kernels(rows, self.known), self._space.kernels(self.known, columns)
        between = self._space.kernels(rows, columns)
        for (fit, mean), (_, mean_of_columns) in zip(self._means(rows), self._means(columns), strict=True):
            shrunk = _mixed(near_rows, fit.choice) @ fit.precision @ _mixed(near_columns, fit.choice)
            total += fit.choice.weight * (_mixed(between, fit.choice) - shrunk + np.outer(mean - own, mean_of_columns - other))
        return total

    def deviations(self, rows: np.ndarray) -> np.ndarray:
        """How unsure each picture's worth is [N], a standard deviation: 0 to about 1."""
        near, own, total = self._space.kernels(rows, self.known), self.means(rows), np.zeros(len(rows))
        for fit, mean in self._means(rows):
            to_known = _mixed(near, fit.choice)
            total += fit.choice.weight * (1 - ((to_known @ fit.precision) * to_known).sum(1) + (mean - own) ** 2)
        return np.sqrt(total.clip(1e-9))

    def pair_weight(self, leads: np.ndarray) -> np.ndarray:
        """What a choice between two pictures tells of their difference: an inverse variance [N], highest where the lead is 0."""
        scale = self.noise * math.sqrt(2)
        return _pair_terms(leads / scale, np.full(len(leads), 0.5), _tie_odds(self.answers))[2] / scale**2

    def _means(self, rows: np.ndarray) -> list[tuple[_Fit, np.ndarray]]:
        near = self._space.kernels(rows, self.known)
        return [(fit, _mixed(near, fit.choice) @ fit.alpha) for fit in self._fits]

    def _fit(self, blocks: Sequence[np.ndarray], choice: Assumption) -> _Fit:
        known, answers, count = self.known, self.answers, len(self.known)
        if not count:
            return _Fit(choice, 0.0, np.zeros(0), np.zeros((0, 0)))
        prior = _mixed(blocks, choice) + JITTER * np.eye(count)
        rated, first, second = (np.searchsorted(known, places) for places in (answers.rated, answers.first, answers.second))
        thresholds = _thresholds(answers, choice.noise)
        alpha, worth = np.zeros(count), np.zeros(count)
        objective, log_likelihood = -math.inf, 0.0
        curvature = np.zeros((count, count))
        for _ in range(NEWTON_STEPS):
            log_likelihood, slope, curvature = _likelihood(worth, answers, (rated, first, second), thresholds, choice.noise)
            now = log_likelihood - alpha @ worth / 2
            if now - objective < TOLERANCE:
                break
            objective = now
            alpha = np.linalg.solve(np.eye(count) + curvature @ prior, curvature @ worth + slope)
            worth = prior @ alpha
        system = np.eye(count) + curvature @ prior
        evidence = log_likelihood - alpha @ worth / 2 - np.linalg.slogdet(system)[1] / 2
        return _Fit(choice, float(evidence), alpha, np.linalg.solve(system, curvature))


def _neighbours(near: Sequence[Assumption] | None) -> Iterator[Assumption]:
    """All assumptions, or those at most one step from some."""
    for mix, (step, noise) in itertools.product(range(len(MIXES)), enumerate(NOISES)):
        if near is None or any(abs(mix - old.mix) + abs(step - NOISES.index(old.noise)) <= 1 for old in near):
            yield Assumption(mix, noise)


def _mixed(blocks: Sequence[np.ndarray], choice: Assumption) -> np.ndarray:
    share = MIXES[choice.mix]
    return share * blocks[0] + (1 - share) * blocks[1]


def _thresholds(answers: Answers, noise: float) -> np.ndarray:
    """Where levels end [levels + 1], from how often each was given; the outermost are beyond everything."""
    from scipy.stats import norm

    counts = np.array([(answers.stars == level).sum() for level in range(1, answers.levels + 1)]) + 0.5 / answers.levels
    below = np.cumsum(counts)[:-1] / counts.sum()
    return np.concatenate([[-1e6], norm.ppf(below) * math.sqrt(1 + LOGISTIC_VARIANCE * noise**2), [1e6]])


def _tie_odds(answers: Answers) -> float:
    """Log odds of a tie against each side, between two pictures of the same worth."""
    ties = (answers.preference == 0.5).sum() + 0.25
    return math.log(2 * ties / (len(answers.first) + 1 - ties))


def _pair_terms(leads: np.ndarray, preference: np.ndarray, tie_odds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log likelihood, its slope and its curvature, in the lead [M]."""
    logits = np.stack([leads / 2, np.full(len(leads), tie_odds), -leads / 2])
    won, tied, lost = softmax(logits, axis=0)
    said = np.select([preference == 1, preference == 0], [won, lost], tied)
    expected = (won - lost) / 2
    return np.log(said.clip(1e-300)), (preference - 0.5) - expected, (won + lost) / 4 - expected**2


def _likelihood(
    worth: np.ndarray, answers: Answers, places: tuple[np.ndarray, np.ndarray, np.ndarray], thresholds: np.ndarray, noise: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log likelihood of all answers, its slope [n] and minus its curvature [n, n]."""
    rated, first, second = places
    levels = answers.stars.astype(int)
    upper, lower = (expit((thresholds[level] - worth[rated]) / noise) for level in (levels, levels - 1))
    slope, curvature = np.zeros(len(worth)), np.zeros((len(worth), len(worth)))
    np.add.at(slope, rated, (upper + lower - 1) / noise)
    np.add.at(curvature, (rated, rated), (upper * (1 - upper) + lower * (1 - lower)) / noise**2)
    scale = noise * math.sqrt(2)  # both pictures' errors
    log_pair, pair_slope, pair_curvature = _pair_terms((worth[first] - worth[second]) / scale, answers.preference, _tie_odds(answers))
    for own, sign in ((first, 1), (second, -1)):
        np.add.at(slope, own, sign * pair_slope / scale)
        for other, other_sign in ((first, 1), (second, -1)):
            np.add.at(curvature, (own, other), sign * other_sign * pair_curvature / scale**2)
    return float(np.log((upper - lower).clip(1e-300)).sum() + log_pair.sum()), slope, curvature
