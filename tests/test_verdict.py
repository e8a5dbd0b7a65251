"""What is said of a slider: from scores that are made up."""

import numpy as np
import pytest

from library.measuring.measurement import REWARD, BasePictures, Measured
from library.measuring.observation import Bound, Observation, hack_index, observe
from library.measuring.verdict import Watch, complaints
from library.slider_training.keep_best import merit

P, S = 6, 4
HEALTHY = {
    "drift": 0.2,
    "latent_statistics": 0.1,
    "eps_distance": 0.1,
    "perceptual_distance": 0.1,
    "latent_diversity": 0.95,
    "diversity": 0.9,
    "latent_nyquist": 1.1,
    "nyquist": 1.1,
    "saturation": 1.1,
    "clipped": 0.02,
    "edges": 1.1,
}


def seen(
    step: int = 50,
    *,
    score: tuple[float, float] | None = (1.0, 1.0),
    judges: dict[str, tuple[float, float]] | None = None,
    shares: dict[str, tuple[float, float, float]] | None = None,
    spread: float = 0.1,
    directions: np.ndarray | None = None,
    held: dict[str, tuple[float, float, float]] | None = None,
    bounds: dict[str, Bound] | None = None,
    **statistics: float,
) -> Observation:
    """An observation in which scores gain as told at +1 and at -1 (above 0 is the right way), in within-prompt standard deviations.

    Args:
        shares: of yes-or-no judges: at -1, 0 and +1.
        spread: of the gain over pictures.
        held: scores that are to stay: their gains, in their own units, and the limit.
        bounds: of the reward.
        statistics: at both signs, where they are not `HEALTHY`.
    """
    rng = np.random.default_rng(0)
    base, up, down = {}, {}, {}
    wanted = np.ones(P) if directions is None else directions
    for name, gains in {**({REWARD: score} if score else {}), **(judges or {})}.items():
        values = rng.standard_normal((P, S))
        unit = np.sqrt(values.var(axis=1, ddof=1).mean())
        noise = [spread * rng.standard_normal((P, S)) for _ in gains]
        noise = [part - part.mean() for part in noise]
        base[name] = values
        up[name] = values + (gains[0] + noise[0]) * unit * wanted[:, None]
        down[name] = values - (gains[1] + noise[1]) * unit * wanted[:, None]
    for name, (at_down, at_base, at_up) in (shares or {}).items():
        for table, share in ((down, at_down), (base, at_base), (up, at_up)):
            table[name] = (np.arange(P * S) < round(share * P * S)).astype(float).reshape(P, S)
    for name, (gain_up, gain_down, _) in (held or {}).items():
        base[name] = rng.standard_normal((P, S))
        up[name], down[name] = base[name] + gain_up, base[name] - gain_down
    base_statistics = {"latent_diversity": 1.0, "clipped": 0.01}
    return observe(
        step,
        BasePictures(scores=base, statistics=base_statistics, latents=(), shown=(), eps=()),
        Measured(scores=up, statistics=HEALTHY | statistics),
        Measured(scores=down, statistics=HEALTHY | statistics),
        [*(judges or {}), *(shares or {})],
        wanted,
        {name: limit for name, (_, _, limit) in (held or {}).items()},
        bounds,
    )


def watch(**settings) -> Watch:
    return Watch(**{"early_stop_gain": None, "patience": None, "max_drift": None, "network_scale": 0.5, **settings})


# ---- the observation ----


@pytest.mark.parametrize(
    ("score", "judge", "index"),
    [
        (2.0, 2.0, 0.0),  # confirmed
        (2.0, 1.0, 0.5),
        (2.0, 0.0, 1.0),  # the judges see nothing of it
        (2.0, -2.0, 2.0),  # they lose what the score gains
        (1.0, 2.0, -1.0),
        (0.0, 0.0, 0.0),  # the start
        (0.0, -0.5, 1.0),  # finite where the score does not move
        (-1.0, -1.0, 0.0),
    ],
)
def test_hack_index(score: float, judge: float, index: float) -> None:
    assert hack_index(score, judge) == pytest.approx(index)


def test_what_judges_gain_on_pictures_that_were_lost_is_no_gain() -> None:
    assert hack_index(2.0, 4.0, 0.25) == pytest.approx(0.5)
    assert hack_index(2.0, -1.0, 0.25) == pytest.approx(1.5)  # a loss stays one
    whole = {"score": (2.0, 2.0), "judges": {"a": (3.0, 2.0)}}
    assert seen(**whole).hack_index == pytest.approx(0)
    lost = seen(**whole, shares={"obeyed": (1.0, 0.8, 0.2), "sharp": (1.0, 1.0, 0.9)})  # 0.2 of 0.8 at +1; more than before counts as all
    assert lost.hack_index_at(1) == pytest.approx((2 - 0.25 * 3) / 2, abs=0.05) and lost.hack_index_at(-1) == pytest.approx(0)


def test_gains_are_in_standard_deviations_and_in_the_wanted_direction() -> None:
    directions = np.array([1.0, -1.0] * 3)
    observation = seen(score=(1.5, 0.5), judges={"a": (1.0, 0.2), "b": (0.0, -0.4)}, directions=directions)
    assert (observation.score_gain(1).value, observation.score_gain(-1).value) == (pytest.approx(1.5), pytest.approx(0.5))
    assert (observation.judge_gain(1), observation.judge_gain(-1)) == (pytest.approx(0.5), pytest.approx(-0.1))
    assert observation.mean_judge_gain == pytest.approx(0.2)
    assert observation.hack_index == pytest.approx((0.5 + 0.1) / 0.5)  # the worse sign
    interval = observation.score_gain(-1)
    assert interval.low < interval.value < interval.high


def test_the_metrics_are_flat_numbers() -> None:
    metrics = seen(score=(1.5, 0.5), judges={"a": (1.0, 0.2)}, shares={"obeyed": (0.75, 1.0, 0.5)}).metrics()
    expected = {
        "gain_at_+1": 1.5,
        "gain_at_-1": -0.5,  # as measured: a weight of -1 lowers the score
        "judge/a/gain_at_+1": 1.0,
        "judge/a/gain_at_-1": -0.2,
        "judge/obeyed/share_at_+1": 0.5,
        "judge/obeyed/share_at_-1": 0.75,
        "judge/obeyed/share_of_base": 1.0,
        "hack_index": 0.7,  # at -1: 0.75 of the judge's 0.2 is left of the score's 0.5
        "saturation_at_+1": 1.1,
        "eps_distance_at_-1": 0.1,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["gain_at_-1_low"] < -0.5 < metrics["gain_at_-1_high"]
    assert all(isinstance(value, float) for value in metrics.values())


def test_without_judges_there_is_no_index() -> None:
    assert seen().hack_index is None and "hack_index" not in seen().metrics()
    assert seen(shares={"obeyed": (1.0, 1.0, 1.0)}).hack_index is None  # a yes-or-no judge confirms nothing
    no_score = seen(score=None, judges={"a": (1.0, 1.0)})
    assert no_score.hack_index is None and complaints(no_score) == {}


# ---- warnings ----


def test_a_healthy_slider_has_nothing_to_complain_of() -> None:
    assert complaints(seen(score=(2.0, 2.0), judges={"a": (1.8, 1.6)}, shares={"obeyed": (0.96, 1.0, 0.92)})) == {}


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"score": (1.8, 1.0), "judges": {"taste": (-0.4, 0.9)}}, "gamed", "rises while the judges fall: +1.8 against -0.4 standard"),
        ({"score": (1.0, 1.8), "judges": {"taste": (0.9, -0.4)}}, "gamed", "in the direction of weight -1"),
        ({"score": (2.0, 2.0), "judges": {"taste": (0.5, 2.0)}}, "unconfirmed", "gained 2.0 standard deviations and the judges only 0.5"),
        ({"score": (2.0, 0.0)}, "dead-1", "weight +1 moves the training score by 2.0 standard deviations and weight -1 does not"),
        ({"shares": {"obeyed": (1.0, 1.0, 0.75)}}, "share of obeyed", "obeyed holds for 25% of the pictures less"),
        ({"held": {"size": (0.1, 0.3, 0.2)}}, "held size", "at weight -1 the score size, which is to be held within 0.2"),
        (
            {"score": (2.0, 2.0), "bounds": {REWARD: Bound(1, 2.0, "above 7.5")}},
            f"beyond {REWARD}",
            "% of the pictures is above 7.5, its limit",
        ),
        ({"score": (2.0, 2.0), "bounds": {REWARD: Bound(-1, -2.0, "below 4")}}, f"beyond {REWARD}", "at weight -1 the score reward of"),
        ({"clipped": 0.2}, "clipping", "20% of the pixel values are clipped to black or white (1% without the slider)"),
        ({"saturation": 1.8}, "saturation", "1.8 times as strong"),
        ({"nyquist": 3.0}, "nyquist", "the finest detail in the pixels is 3.0 times"),
        ({"latent_nyquist": 3.0}, "latent_nyquist", "the finest detail in the latents is 3.0 times"),
        ({"diversity": 0.4}, "diversity", "seeds of one prompt differ only 40%"),
        ({"latent_diversity": 0.6}, "diversity", "seeds of one prompt differ only 60%"),
    ],
)
def test_what_is_complained_of(settings: dict, key: str, words: str) -> None:
    found = complaints(seen(**settings))
    assert list(found) == [key]
    assert words in found[key] and found[key].startswith("step 50: ")


def test_judges_that_may_as_well_have_stood_still_do_not_accuse() -> None:
    """-0.1 with a spread of 2: the interval holds 0."""
    assert "gamed" not in complaints(seen(score=(1.8, 1.8), judges={"taste": (-0.1, 1.5)}, spread=2.0))


def test_every_warning_is_said_once_and_after_a_resume_not_again() -> None:
    first = watch()
    assert len(first.judge(seen(nyquist=3.0)).warnings) == 1
    again = first.judge(seen(100, nyquist=3.0, saturation=2.0)).warnings
    assert len(again) == 1 and "colours" in again[0]
    resumed = watch()
    resumed.load_state_dict(first.state_dict())
    assert resumed.judge(seen(150, nyquist=3.0, saturation=2.0)).warnings == ()


@pytest.mark.parametrize(
    ("eps", "reason"), [(0.002, "raise learning_rate, or network_alpha"), (0.2, "but not to where the score is higher")]
)
def test_a_flat_signal_is_explained(eps: float, reason: str) -> None:
    watching = watch()
    assert watching.judge(seen(0, score=(0.0, 0.0), eps_distance=0.0)).warnings == ()
    said = [watching.judge(seen(step, score=(0.02, -0.03), eps_distance=eps)).warnings for step in (50, 100, 150)]
    assert said[:2] == [(), ()]
    assert reason in said[2][0] and "does not move (+0.02 at +1 and +0.03 at -1" in said[2][0]


def test_a_gain_that_comes_in_time_is_not_flat() -> None:
    watching = watch()
    for step in (50, 100):
        watching.judge(seen(step, score=(0.02, 0.03)))
    assert watching.judge(seen(150, score=(0.3, 0.05))).warnings == ()


# ---- when to stop ----


def test_stop_when_strong_enough() -> None:
    assert watch(early_stop_gain=2.0).judge(seen(score=(2.5, 1.9))).stop is None
    assert "strong enough" in (watch(early_stop_gain=2.0).judge(seen(score=(2.5, 2.1))).stop or "")


def test_stop_when_the_latents_drift_too_far() -> None:
    assert watch(max_drift=0.5).judge(seen(drift=0.4)).stop is None
    assert "0.60 (RMS)" in (watch(max_drift=0.5).judge(seen(drift=0.6)).stop or "")


def stops(path: list[tuple[float, float]], patience: int | None = 2) -> list[bool]:
    """Whether to stop after each of (score, judge)."""
    watching = watch(patience=patience)
    return [
        watching.judge(seen(50 * number, score=(score, score), judges={"taste": (judge, judge)})).stop is not None
        for number, (score, judge) in enumerate(path)
    ]


def test_stop_when_the_judges_keep_falling_while_the_score_rises() -> None:
    assert stops([(0, 0), (0.5, 0.5), (1, 0.8), (1.5, 0.6), (2, 0.4)]) == [False, False, False, False, True]


def test_patience_is_for_judges_that_recover() -> None:
    assert not any(stops([(0, 0), (0.5, 0.5), (1, 0.3), (1.5, 0.7), (2, 0.6)]))


def test_a_score_that_falls_too_is_not_gamed() -> None:
    assert not any(stops([(0, 0), (1, 0.8), (0.8, 0.6), (0.7, 0.5), (0.6, 0.4)]))


def test_without_patience_nothing_stops() -> None:
    assert not any(stops([(0, 0), (0.5, 0.5), (1, 0.3), (1.5, 0.2), (2, -0.4)], patience=None))


def test_judges_that_only_wobble_do_not_stop() -> None:
    assert not any(stops([(0, 0), (1, 0.8), (1.1, 0.78), (1.2, 0.79), (1.3, 0.77)]))


# ---- which step is best ----


def test_with_judges_the_training_score_does_not_count() -> None:
    honest = seen(score=(1.0, 1.0), judges={"taste": (0.9, 0.9)})
    gamed = seen(score=(5.0, 5.0), judges={"taste": (0.5, 0.5)})
    assert merit(honest, 2.0) == pytest.approx(0.9) and merit(gamed, 2.0) == pytest.approx(0.5)


def test_without_judges_gain_beyond_the_goal_counts_for_nothing_and_drift_against() -> None:
    assert merit(seen(score=(1.5, 1.5), drift=0.3), 2.0) == pytest.approx(1.2)
    assert merit(seen(score=(2.5, 2.5), drift=0.5), 2.0) == pytest.approx(1.5)
    assert merit(seen(score=(4.0, 4.0), drift=0.9), 2.0) == pytest.approx(1.1)
    assert merit(seen(score=(4.0, 4.0), drift=0.9), None) == pytest.approx(1.1)


def test_a_flaw_halves_the_merit_and_does_not_make_nothing_better() -> None:
    sound, flawed = seen(score=(1.6, 1.6), drift=0.1), seen(score=(2.0, 2.0), drift=0.1, nyquist=4.0)
    assert merit(flawed, 2.0) == pytest.approx(1.9 / 2)
    assert merit(flawed, 2.0) < merit(sound, 2.0)
    assert merit(flawed, 2.0) > merit(seen(score=(0.2, 0.2), drift=0.02), 2.0)
    assert merit(seen(score=(2.0, 2.0), drift=0.1, saturation=2.0), 2.0) == pytest.approx(1.9)  # colour may be what was wanted
    lost = seen(judges={"taste": (-0.2, -0.2)}, shares={"obeyed": (1.0, 1.0, 0.5)})
    assert merit(lost, 2.0) == pytest.approx(-0.4)


def test_without_score_and_judges_no_step_is_better() -> None:
    assert np.isnan(merit(seen(score=None), 2.0))
