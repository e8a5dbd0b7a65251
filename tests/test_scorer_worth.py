"""What a scorer is worth is said with its interval, from what its file says."""

import math

import numpy as np
import pytest
from scipy import stats

from library.objectives.rewards import Goal, Reward, ScorerEnsemble
from library.scorers.worth import Worth, worth_from, worth_in, worth_of
from tests.helpers.tiny_leco_run import tiny_scorer
from tests.helpers.tiny_models import tiny_model


def training(correlation: float, pictures: int) -> dict:
    table = [{"sigma": sigma, "srcc": correlation - sigma / 10} for sigma in (1.0, 0.0)]
    worth = worth_in(table, pictures)
    assert worth is not None
    return {"worth": worth.to_dict()}


def test_the_interval_holds_the_true_rank_correlation() -> None:
    """Of 400 samples of 40 pictures, in 95 % +- 3 %."""
    rng, held = np.random.default_rng(0), 0
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # of a normal distribution with correlation 0.6
    for _ in range(400):
        first, noise = rng.normal(size=(2, 40))
        found = stats.spearmanr(first, 0.6 * first + 0.8 * noise).statistic
        low, high = Worth("a", float(found), 40).interval
        held += low <= truth <= high
    assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_four_pictures_say_nothing() -> None:
    worth = worth_of(tiny_scorer(tiny_model().vae_fingerprint(), training=training(-0.8, 4)).spec, "cosy")
    assert worth is not None and worth.doubtful
    assert str(worth) == (
        "scorer cosy: rank correlation -0.80 (-1.00 to 1.00) on 4 pictures that it never saw: too few to tell whether it learned anything, "
        "rate more pictures"
    )


def test_a_good_scorer_of_many_pictures_is_not_in_doubt() -> None:
    worth = worth_of(tiny_scorer(tiny_model().vae_fingerprint(), training=training(0.83, 300)).spec, "cosy")
    assert worth is not None and not worth.doubtful and worth.interval == pytest.approx((0.79, 0.87), abs=0.01)


def test_of_an_ensemble_every_member_says_it_and_of_a_file_that_says_nothing_none() -> None:
    vae = tiny_model().vae_fingerprint()
    members = [tiny_scorer(vae, training=training(0.5, 50)), tiny_scorer(vae, training=training(0.7, 50)), tiny_scorer(vae)]
    reward = Reward([Goal(scorer=ScorerEnsemble(members))])
    assert [worth.correlation for worth in reward.worth] == [0.5, 0.7]
    assert worth_of(tiny_scorer(vae, training={"worth": [3]}).spec, "a") is None
    assert worth_in([{"sigma": 0.0, "top1": 0.5}], 50) is None  # a criterion without a rank correlation


def test_a_scorer_of_another_ones_marks_is_worth_what_that_one_is_at_most() -> None:
    """Not how well it follows the marks. And so it is: hidden worth, what one scorer says of it, and what a second one makes of that."""
    own = Worth("a", 0.9, 30).through((0.8, 0.2, 0.9))
    assert own.correlation == pytest.approx(0.72) and own.interval == pytest.approx((0.18, 0.81)) and own.doubtful
    assert worth_from(own.to_dict(), "a") == own
    assert str(own) == (
        "scorer a: rank correlation 0.72 (0.18 to 0.81) with ratings that were not learned from: what it says is in doubt, "
        "rate more pictures"
    )
    assert Worth("a", -0.5, 30).through((0.8, 0.6, 0.9)).interval == (0.0, 0.0)
    truth, *noise = np.random.default_rng(0).normal(size=(3, 20_000))
    first = truth + 0.7 * noise[0]
    second = first + 0.8 * noise[1]

    def correlation(one: np.ndarray, other: np.ndarray) -> float:
        return float(stats.spearmanr(one, other).statistic)

    said = Worth("a", correlation(first, second), 30).through([correlation(truth, first)] * 3)
    assert said.correlation == pytest.approx(correlation(truth, second), abs=0.02)


def test_the_interval_of_folds_is_wider_also_when_it_is_read_back() -> None:
    folds, plain = Worth("a", 0.5, 60, in_folds=True), Worth("a", 0.5, 60)
    widths = [math.atanh(worth.interval[1]) - math.atanh(worth.interval[0]) for worth in (folds, plain)]
    assert widths[0] == pytest.approx(1.4 * widths[1])
    assert worth_from(folds.to_dict(), "a") == folds and worth_from(plain.to_dict(), "a") == plain
