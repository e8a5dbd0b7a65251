"""What is warned of: from records that are made up."""

from dataclasses import replace
from typing import Any

import pytest

from library.measuring.warnings import final_warnings, find_warnings, no_effect
from library.objectives.rewards import Goal, Limit
from tests.helpers.records import record_of
from tests.helpers.scorers import ChannelScorer, scorer_for
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def scorer() -> ChannelScorer:
    scorer = scorer_for(tiny_model(), mean=5.0, std=2.0)
    assert isinstance(scorer, ChannelScorer)
    return scorer


def test_a_healthy_slider_is_not_warned_of() -> None:
    assert final_warnings(record_of((2.0, 2.0), {"a": (1.8, 1.6)}, {"obeyed": (0.96, 1.0, 0.92)})) == []


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"score": (1.8, 1.0), "judges": {"taste": (-0.4, 0.9)}}, "gamed", "and a judge the other way: +1.8 against -0.4 standard"),
        ({"score": (1.0, 1.8), "judges": {"taste": (0.9, -0.4)}}, "gamed", "At weight -1 the training score moves the way"),
        ({"score": (2.0, 2.0), "judges": {"taste": (0.5, 2.0)}}, "unconfirmed", "gained 2.0 standard deviations and the judges only 0.5"),
        ({"score": (2.0, 0.0)}, "one-sided -1", "moves by 2.0 standard deviations at weight +1 and not at weight -1"),
        ({"shares": {"obeyed": (1.0, 1.0, 0.75)}}, "share obeyed", "At weight +1 obeyed holds for 25% of the pictures less"),
        ({"num_prompts": 2}, "few pairs", "Only 8 pairs of prompt and seed were measured: units and gains are uncertain"),
        ({"statistics": {"clipped": 0.2}}, "clipping", "20% of the pixel values are clipped to black or white (1% without the slider)"),
        ({"statistics": {"saturation": (1.0, 1.8)}}, "saturation", "At weight +1 the colours are 1.8 times as strong"),
        ({"statistics": {"nyquist": (3.0, 1.0)}}, "nyquist pixels", "At weight -1 the finest detail in the pixels is 3.0 times"),
        ({"statistics": {"latent_nyquist": 3.0}}, "nyquist latents", "the finest detail in the latents is 3.0 times"),
        ({"statistics": {"pixel_diversity": 0.4}}, "diversity", "seeds of one prompt differ only 40%"),
        ({"statistics": {"latent_diversity": 0.6}}, "diversity", "seeds of one prompt differ only 60%"),
    ],
)
def test_what_is_warned_of(settings: dict[str, Any], key: str, words: str) -> None:
    (warning,) = find_warnings(record_of(**settings))
    assert warning.key == key and words in warning.text


def test_a_held_score_that_moves(scorer: ChannelScorer) -> None:
    record = record_of(others={scorer.name: (0.1, 0.3)})
    (warning,) = find_warnings(record, [Goal(scorer=scorer, limit=Limit("hold", 0.2))])
    assert warning.kind == "held" and "At weight -1 the score ChannelScorer, which is to be held within 0.2" in warning.text
    assert find_warnings(record, [Goal(scorer=scorer, limit=Limit("hold", 0.4))]) == []


@pytest.mark.parametrize(("limit", "words"), [(Limit("max", 9.0), "is above 9, its limit"), (Limit("min", 1.0), "is below 1, its limit")])
def test_a_limit_that_is_passed(scorer: ChannelScorer, limit: Limit, words: str) -> None:
    """The scorer's mean is 5 and its standard deviation 2, so that 9 and 1 are 2 standard deviations away."""
    (warning,) = find_warnings(record_of(others={scorer.name: (2.0, 2.0)}), [Goal(scorer=scorer, limit=limit)])
    assert warning.kind == "beyond" and words in warning.text
    assert find_warnings(record_of(others={scorer.name: (0.0, 0.0)}), [Goal(scorer=scorer, limit=limit)]) == []


def test_judges_that_may_as_well_have_stood_still_do_not_accuse() -> None:
    """-0.1 with a spread of 2: the interval holds 0."""
    found = find_warnings(record_of((1.8, 1.8), {"taste": (-0.1, 1.5)}, spread=2.0))
    assert "gamed" not in {warning.kind for warning in found}


def test_what_has_hardly_begun_to_move_accuses_nobody() -> None:
    assert "gamed" not in {warning.kind for warning in find_warnings(record_of((0.05, 0.05), {"taste": (-0.04, 0.04)}, spread=0.0))}


def test_a_side_effect_is_not_expected_to_rise() -> None:
    record = record_of((2.0, 2.0), {"edges": (0.1, -0.1)}, spread=0.0)
    turned = [replace(response, role="stay") if response.name == "edges" else response for response in record.responses.values()]
    assert final_warnings(replace(record, responses={response.name: response for response in turned})) == []


def test_without_pixels_there_are_still_warnings() -> None:
    record = record_of()
    for name in ("clipped", "saturation", "nyquist", "pixel_diversity"):
        del record.statistics[name]  # pyright: ignore[reportIndexIssue]
    assert find_warnings(record) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score": (1.2, 0.0)}, "At weight -1 the training score bright does not clearly move"),
        ({"judges": {"taste": (0.6, -0.5)}}, "taste does not rise from every weight to the next"),
    ],
)
def test_what_only_a_finished_slider_is_warned_of(settings: dict[str, Any], words: str) -> None:
    record = record_of(score_name="bright", **settings)
    assert any(words in str(warning) for warning in final_warnings(record))
    assert not any(words in str(warning) for warning in find_warnings(record))


def test_every_training_score_is_looked_at() -> None:
    record = record_of(None, {"taste": (2.0, 2.0)}, others={"one": (2.0, 2.0), "two": (-2.0, -2.0)})
    assert [warning.key for warning in final_warnings(record)] == ["unclear two +1", "unclear two -1", "not monotone two"]


@pytest.mark.parametrize(("drift", "reason"), [(0.002, "raise learning_rate, or network_alpha"), (0.2, "not to where the score is higher")])
def test_a_flat_signal_is_explained(drift: float, reason: str) -> None:
    flat = no_effect(record_of((0.02, -0.03), spread=0.0, statistics={"latent_drift": drift}), 0.5)
    assert flat is not None and reason in flat.text and "does not move (+0.02 at +1 and +0.03 at -1" in flat.text
    assert no_effect(record_of((0.3, 0.05)), 0.5) is None and no_effect(record_of(None, {"a": (0.0, 0.0)}), 0.5) is None
