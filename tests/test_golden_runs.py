"""Short seeded trainings of both scripts whose numbers are stored: a refactor does not move them."""

from pathlib import Path

import pytest

from tests.helpers.golden_run import RUNS, golden_file, golden_numbers
from tests.helpers.golden_scorer import GOLDEN_FILE, golden_losses


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_golden_runs(name: str, tmp_path: Path) -> None:
    """Some steps from fixed seeds. The tolerance absorbs other CPUs; `python -m tests.helpers.golden_run NAME` writes a file anew."""
    expected = golden_file(name)
    assert len(expected) == 2 * RUNS[name][1]["max_train_steps"]
    assert golden_numbers(name, tmp_path) == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_the_scorers_golden_run(tmp_path: Path) -> None:
    """20 steps with the defaults. Vector units round in another order: latents in fp16 then differ by their last bit, losses by 3e-4."""
    expected = [float(line) for line in GOLDEN_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert golden_losses(tmp_path) == pytest.approx(expected, rel=2e-3)
