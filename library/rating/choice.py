"""What to ask next: the pictures whose answers teach most about all the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from library.rating.taste import LOGISTIC_VARIANCE, Taste

RANDOM_SHARE = 1 / 3  # of the questions is drawn by chance, so that held-out figures speak of all pictures and not of the chosen ones
CANDIDATES, REFERENCE = 300, 300  # pictures or pairs that are compared, and those that an answer is to teach about
PARTNERS = 600  # pairs that are looked at


@dataclass(frozen=True)
class Question:
    """Pictures to show, by number: one, or two to choose from. reason: "random" or "chosen"."""

    pictures: tuple[int, ...]
    reason: str


def choose(
    taste: Taste,
    fresh: np.ndarray,
    size: int,
    count: int,
    *,
    pairs: bool,
    rng: np.random.Generator,
    at_random: bool = False,
) -> list[Question]:
    """Up to `count` questions.

    A chosen picture is one whose answer lowers the variance of all pictures' worths most (Cohn et al. 1996): where the scorers that are
    still possible disagree, and where many pictures are alike. Of pairs, those of near worth tell more.

    Args:
        fresh: numbers of the pictures that were not asked about yet. size: of all pictures.
        at_random: choose nothing, as long as too little is known for it.
    """
    per_question = 2 if pairs else 1
    order = rng.permutation(fresh)
    questions: list[Question] = []
    chosen = 0
    # the share is kept in every batch, so that an interval is never left to luck
    for draw in rng.permutation(count):
        if len(order) >= per_question and (at_random or draw < RANDOM_SHARE * count):
            questions.append(Question(tuple(map(int, order[:per_question])), "random"))
            order = order[per_question:]
        else:
            chosen += 1
    if chosen and len(order) >= per_question:
        reference = rng.choice(size, min(size, REFERENCE), replace=False)
        teach = _teaching_pairs if pairs else _teaching_pictures
        for pictures in teach(taste, order, reference, chosen, rng):
            questions.insert(int(rng.integers(len(questions) + 1)), Question(pictures, "chosen"))
    return questions


def _teaching_pictures(
    taste: Taste, order: np.ndarray, reference: np.ndarray, count: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    candidates = order[:CANDIDATES]
    among = taste.covariance(candidates, candidates)
    places = _greedy(among, taste.covariance(candidates, reference), np.full(len(candidates), LOGISTIC_VARIANCE * taste.noise**2), count)
    return [(int(candidates[place]),) for place in places]


def _teaching_pairs(taste: Taste, order: np.ndarray, reference: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    candidates = order[: CANDIDATES // 2]
    draws = rng.integers(len(candidates), size=(PARTNERS, 2))
    first, second = draws[draws[:, 0] != draws[:, 1]].T
    worth, among = taste.means(candidates), taste.covariance(candidates, candidates)
    to_all = taste.covariance(candidates, reference)
    noise = 1 / taste.pair_weight(worth[first] - worth[second]).clip(1e-9)
    between = among[first] - among[second]  # [pairs, candidates]
    pair_covariance = between[:, first] - between[:, second]
    # a picture takes part in one of the pairs of a batch
    places = _greedy(pair_covariance, to_all[first] - to_all[second], noise, count, groups=np.stack([first, second], 1))
    return [(int(candidates[first[place]]), int(candidates[second[place]])) for place in places]


def _greedy(among: np.ndarray, to_all: np.ndarray, noise: np.ndarray, count: int, groups: np.ndarray | None = None) -> list[int]:
    """One after the other, the candidate whose answer lowers the variance of the reference most, as if those before were answered.

    Args:
        among: covariance of the candidates [C, C]. to_all: with the reference [C, R]. noise: variance of an answer [C].
        groups: what each candidate uses up [C, G].
    """
    among, to_all, free, places = among.copy(), to_all.copy(), np.ones(len(among), dtype=bool), []
    for _ in range(min(count, len(among))):
        lowered = (to_all**2).sum(1) / (among.diagonal() + noise).clip(1e-12)
        place = int(np.where(free, lowered, -1.0).argmax())
        if not free[place]:
            break
        places.append(place)
        free[place] = False
        if groups is not None:
            free &= ~np.isin(groups, groups[place]).any(1)
        own, total = among[place].copy(), among[place, place] + noise[place]
        to_all -= np.outer(own, to_all[place]) / total
        among -= np.outer(own, own) / total
    return places
