"""The running scorer: it finds an opinion in stars and in pairs, says honestly how well, and asks what teaches."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from library.measuring.statistics import Interval
from library.rating import choice
from library.rating import taste as taste_module
from library.rating.agreement import ceiling_of, concordance, rank_correlation, share_interval, star_agreement
from library.rating.choice import choose
from library.rating.live import REST, Gallery, LiveOpinion
from library.rating.progress import Progress, find_drift, measure_progress, progress_words, where_it_points
from library.rating.space import FeatureSpace
from library.rating.store import Project, Rating, StoredPicture
from library.rating.taste import Answers, Assumption, Taste

COUNT = 240


def world(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [P, D] and a true worth [P] that two of them decide."""
    features = np.random.default_rng(seed).normal(size=(COUNT, 30)).astype(np.float32)
    worth = features[:, 1] + 0.5 * features[:, 2]
    return features, (worth - worth.mean()) / worth.std()


def star(worth: float, rng: np.random.Generator, noise: float = 0.4) -> float:
    return float(np.clip(np.round(1.2 * (worth + noise * rng.normal()) + 3), 1, 5))


def stars_of(worth: np.ndarray, rows: np.ndarray, seed: int = 1) -> list[tuple[int, float]]:
    rng = np.random.default_rng(seed)
    return [(int(row), star(worth[row], rng)) for row in rows]


def pairs_of(worth: np.ndarray, rows: np.ndarray) -> list[tuple[int, int, float]]:
    return [(int(a), int(b), 0.5 if abs(worth[a] - worth[b]) < 0.2 else float(worth[a] > worth[b])) for a, b in rows.reshape(-1, 2)]


def test_stars_pairs_and_both_are_learned_on_one_scale() -> None:
    features, worth = world()
    space, rest = FeatureSpace(features), np.arange(120, COUNT)
    from_stars = Taste(space, Answers.of(stars_of(worth, np.arange(60))))
    from_pairs = Taste(space, Answers.of(pairs=pairs_of(worth, np.arange(120))))
    both = Taste(space, Answers.of(stars_of(worth, np.arange(60)), pairs_of(worth, np.arange(60, 120))))
    found = [rank_correlation(taste.means(rest), worth[rest]) for taste in (from_stars, from_pairs, both)]
    assert min(found) > 0.85
    assert found[2] > found[0]


def test_the_likelihood_has_the_slope_and_curvature_that_it_says() -> None:
    answers = Answers.of([(0, 1), (1, 3), (2, 5), (0, 2)], [(1, 2, 1.0), (0, 2, 0.5), (2, 1, 0.0)])
    places = (answers.rated, answers.first, answers.second)
    thresholds = taste_module._thresholds(answers, 0.5)

    def likelihood(worth: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        return taste_module._likelihood(worth, answers, places, thresholds, 0.5)

    at = np.array([0.3, -0.2, 0.9])
    _, slope, curvature = likelihood(at)
    np.testing.assert_allclose(slope, approx_fprime(at, lambda worth: likelihood(worth)[0], 1e-6), atol=1e-4)
    rows = [approx_fprime(at, lambda worth, row=row: -likelihood(worth)[1][row], 1e-6) for row in range(3)]
    np.testing.assert_allclose(curvature, np.stack(rows), atol=1e-4)


def test_it_is_surer_where_it_was_told_more() -> None:
    features, worth = world()
    taste = Taste(FeatureSpace(features), Answers.of(stars_of(worth, np.arange(40))))
    rows = np.arange(COUNT)
    assert taste.deviations(rows[:40]).mean() < taste.deviations(rows[40:]).mean()
    np.testing.assert_allclose(taste.deviations(rows[:9]) ** 2, taste.covariance(rows[:9], rows[:9]).diagonal(), atol=1e-6)
    assert Taste(FeatureSpace(features), Answers.of()).means(rows).tolist() == [0.0] * COUNT


@pytest.mark.parametrize("pairs", [False, True])
def test_questions_are_chosen_and_drawn(pairs: bool) -> None:
    features, worth = world()
    taste = Taste(FeatureSpace(features), Answers.of(stars_of(worth, np.arange(20))))
    found = choose(taste, np.arange(20, COUNT), COUNT, 90, pairs=pairs, rng=np.random.default_rng(0))
    reasons = [question.reason for question in found]
    assert 18 <= reasons.count("random") <= 42 and reasons.count("chosen") > 40
    fresh = [row for question in found if question.reason == "random" for row in question.pictures]
    assert len(set(fresh)) == len(fresh) and min(fresh) >= 20


def test_the_chosen_answers_leave_less_unknown_than_any_by_chance() -> None:
    """Compared with Gaussian conditioning, written out: what is left of the variance of all after answers of this noise."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 5)) * np.array([3, 2, 1, 0.5, 0.2])
    covariance, noise = rows @ rows.T, 0.5

    def left(places: list[int]) -> float:
        own = covariance[np.ix_(places, places)] + noise * np.eye(len(places))
        return float((covariance - covariance[:, places] @ np.linalg.solve(own, covariance[places])).trace())

    best = choice._greedy(covariance, covariance, np.full(60, noise), 4)
    assert left(best[:1]) == pytest.approx(min(left([place]) for place in range(60)))
    assert left(best) < min(left(list(rng.choice(60, 4, replace=False))) for _ in range(200))


def progress_of(stars: list[tuple[int, float]], space: FeatureSpace, repeats: np.ndarray | None = None) -> Progress:
    answers = Answers.of(stars)
    return measure_progress(
        space,
        answers,
        Taste(space, answers).choices,
        at_random=np.ones(len(stars), dtype=bool),
        ahead=np.full(len(stars), np.nan),
        repeats=np.zeros((0, 2)) if repeats is None else repeats,
    )


@pytest.mark.parametrize(
    ("stars", "pairs", "pairs_by_chance", "measure"),
    [(30, 30, 15, "rank correlation"), (15, 30, 30, "accuracy"), (30, 9, 9, "rank correlation"), (9, 30, 30, "accuracy")],
)
def test_of_stars_and_pairs_each_is_measured_where_there_are_enough(stars: int, pairs: int, pairs_by_chance: int, measure: str) -> None:
    features, worth = world()
    order = np.random.default_rng(1).permutation(COUNT)
    space, answers = FeatureSpace(features), Answers.of(stars_of(worth, order[:stars]), pairs_of(worth, order[-2 * pairs :]))
    at_random = np.arange(stars + pairs) < stars + pairs_by_chance
    none = {"ahead": np.full(len(answers), np.nan), "repeats": np.zeros((0, 2))}
    found = measure_progress(space, answers, Taste(space, answers).choices, at_random=at_random, **none)
    assert found.measure == measure and found.pair_accuracy is not None and found.pair_accuracy.value > 0.7
    assert found.held_out is not None and found.held_out == (found.pair_accuracy if measure == "accuracy" else found.correlation)
    assert found.pair_accuracy.low < found.pair_accuracy.value  # although it may have been right each time
    assert (found.correlation is None) == (stars < 10) and (found.correlation is None or found.correlation.value > 0.4)


def test_a_share_of_pairs_is_read_as_the_correlation_that_it_comes_from() -> None:
    first, second = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], size=4000).T
    share = float(((first[::2] > first[1::2]) == (second[::2] > second[1::2])).mean())
    known = Progress(answers=60, measure="accuracy", held_out=Interval(share, 0.5, 1.0)).rank_correlation
    assert known.to_list() == pytest.approx([0.7, 0.0, 1.0], abs=0.03)
    held = Interval(0.8, 0.6, 0.9)
    assert Progress(answers=60, measure="rank correlation", held_out=held).rank_correlation == held


def test_a_stretched_interval_stays_within_what_is_possible() -> None:
    held = Interval(0.8, 0.6, 0.95)
    assert held.stretched(1.5, -1, 1).to_list() == pytest.approx([0.8, 0.5, 1.0])
    assert held.stretched(1, -1, 1) == held


def test_held_out_figures_agree_with_new_answers() -> None:
    features, worth = world()
    space = FeatureSpace(features)
    inside = 0
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(COUNT)
        told = stars_of(worth, order[:60], seed)
        held = progress_of(told, space).held_out
        rest = stars_of(worth, order[60:], seed + 100)
        true = rank_correlation(Taste(space, Answers.of(told)).means(order[60:]), np.array([value for _, value in rest]))
        inside += held is not None and held.low <= true <= held.high
    assert inside >= 3


def test_answers_by_chance_are_not_learned_and_it_says_so() -> None:
    features, _ = world()
    rng = np.random.default_rng(3)
    told = [(row, float(rng.integers(1, 6))) for row in range(80)]
    repeats = rng.integers(1, 6, size=(8, 2)).astype(float)
    progress = progress_of(told, FeatureSpace(features), repeats)
    assert progress.status == "not learned" and "contradict each other" in progress.words
    steady = progress_of(told, FeatureSpace(features), repeats[:, [0, 0]])
    assert "cannot be seen in the latents" in steady.words


def test_the_ceiling_follows_from_what_was_asked_twice() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=4000)
    first, second = (true + 0.5 * rng.normal(size=4000) for _ in range(2))
    agreement = star_agreement(first, second, float(np.concatenate([first, second]).var()))
    assert agreement.value == pytest.approx(np.corrcoef(first, second)[0, 1], abs=0.02)
    assert ceiling_of(agreement, pairs=False).value == pytest.approx(np.corrcoef(true, first)[0, 1], abs=0.02)
    wrong = rng.random((2, 4000)) < 0.1
    same = share_interval(float((wrong[0] == wrong[1]).mean()), len(wrong[0]))
    assert same.low < same.value < same.high
    assert ceiling_of(same, pairs=True).value == pytest.approx(0.9, abs=0.02)


def test_words_say_how_many_more() -> None:
    rising = tuple((size, 0.9 - 2 / size**0.5, 0.02) for size in (20, 30, 40, 60))
    more = where_it_points(rising, 60, 0.64, None)
    assert more is not None and 1000 < more + 60 <= (2 / 0.05) ** 2 + 10
    assert where_it_points(tuple((size, 0.8, 0.02) for size in (20, 30, 40)), 40, 0.8, None) == 0
    common = {"answers": 60, "measure": "rank correlation", "held_out": Interval(0.74, 0.6, 0.85)}
    assert progress_words(Progress(**common, more=40)) == ("more", "About 40 more would help: it predicts you to 0.74.")
    enough = Progress(**common, agreement=Interval(0.66, 0.4, 0.8), ceiling=Interval(0.81, 0.6, 0.9), more=40)
    assert progress_words(enough) == ("enough", "Enough: you agree with yourself to 0.66 and it predicts you to 0.74.")
    assert progress_words(Progress(**common | {"held_out": Interval(0.3, 0.1, 0.5)}, more=0))[0] == "more"
    assert progress_words(Progress(answers=19, measure="accuracy"))[1].startswith("After 1 more answer it")


def test_a_person_who_tires_is_told() -> None:
    rng = np.random.default_rng(0)
    predicted, times = rng.normal(size=80), np.arange(80.0)
    stars = predicted + 3 + 0.3 * rng.normal(size=80)
    assert find_drift(times, stars, predicted) == ""
    assert "fewer to" in find_drift(times, stars - np.linspace(0, 1.5, 80), predicted)
    assert concordance(predicted, stars) > 0.8 and concordance(predicted, np.full(80, 3.0)) == 0.5


def test_a_live_opinion_asks_learns_and_measures(tmp_path) -> None:
    features, worth = world()
    project = Project(tmp_path)
    project.add_pictures(
        StoredPicture(hash=str(row), file=f"{row}.png", shown=f"{row}.png", prompt="ab"[row % 2], width=8, height=8, features=features[row])
        for row in range(COUNT)
    )
    gallery = Gallery(project)
    assert gallery.refresh() and not gallery.refresh()
    live = LiveOpinion(project, gallery, project.add_opinion("beauty"), seed=0)
    rng = np.random.default_rng(0)
    while len(live.ratings) < 60:
        if live.due():
            live.learn()
        [first], [second] = live.ask(1), live.ask(1)
        assert first.pictures != second.pictures and live.reason_of(first.token) == first.reason  # nobody else is asked the same
        for asked in (first, second):
            [picture] = asked.pictures
            live.answer([Rating(token=asked.token, mode="stars", first=picture, value=star(worth[picture - 1], rng), reason=asked.reason)])
    assert 2 <= sum(rating.reason == "repeat" for rating in live.ratings) <= 5
    live.measure()
    assert live.progress.repeats >= 2 and live.progress.held_out is not None and live.progress.held_out.value > 0.4
    assert rank_correlation(live.worths()[0], worth) > 0.8
    assert all(live._picture(asked.pictures[0]).prompt == "a" for asked in live.ask(5, prompt="a") if asked.reason == "random")
    token = live.ratings[-1].token
    assert live.undo(token) is not None and live.undo(token) is None and len(live.ratings) == 59
    assert not live.measure_due()
    live._changed -= REST  # the person rests: now one answer is enough
    assert live.measure_due() and live.due()
    live.learn()
    live.measure()
    assert live.progress.answers == 59 - sum(rating.mode == "skip" for rating in live.ratings) and not live.measure_due()
    assert Taste(gallery.space, Answers.of(), [Assumption(0, 0.3)]).size == COUNT
