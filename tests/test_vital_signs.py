"""What a run says of a slider that is not alive, though nothing is measured."""

import pytest

from library.slider_training.vital_signs import PATIENCE, VitalSigns

WELL = {"loss": 0.1, "pushed": 1.0, "eps_drift": 0.1, "grad_norm": 0.5}


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (WELL | {"pushed": 0.0}, "the score pushes no sample"),
        (WELL | {"eps_drift": 0.0, "grad_norm": 0.0}, "the slider does nothing"),
        ({"score/eps_drift": 1.5}, "pictures fall apart"),
        (WELL, None),
        ({"loss": float("nan"), "eps_drift": float("nan")}, None),
        (WELL | {"eps_drift": 0.0}, None),
    ],
)
def test_what_is_wrong_all_along_is_told_once(metrics: dict[str, float], says: str | None, caplog: pytest.LogCaptureFixture) -> None:
    signs = VitalSigns()
    for step in range(1, 3 * PATIENCE):
        signs.update(metrics, step)
    assert len(caplog.records) == (says is not None)
    assert says is None or says in caplog.text and f"step {PATIENCE}:" in caplog.text


def test_what_is_wrong_for_a_moment_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    signs = VitalSigns()
    for step in range(1, 4 * PATIENCE):
        signs.update(WELL | ({"eps_drift": 2.0, "pushed": 0.0} if step % PATIENCE else {}), step)
    for step in range(100, 200):  # a slider that is strong enough is pushed no farther
        signs.update(WELL | {"pushed": 0.0}, step)
    assert not caplog.records
