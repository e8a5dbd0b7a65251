"""What the metrics of a run say of a slider that is not alive, whether or not anything is measured."""

import logging
import math
from collections import Counter
from collections.abc import Mapping

logger = logging.getLogger(__name__)

PATIENCE = 20  # updates in a row
EXPLODED = 1.0  # RMS that the prediction is moved by, which is of that size itself


class VitalSigns:
    """Warns once of each: a score that pushes nowhere, a LoRA that does nothing, one that tears the prediction apart."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()
        self._warned: set[str] = set()

    def update(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of update number `step` (1, 2, ...), as they are logged; those that a run does not have say nothing."""
        values = {name.rpartition("/")[2]: value for name, value in metrics.items()}
        pushed, drift, norm = (values.get(name, math.nan) for name in ("pushed", "eps_drift", "grad_norm"))
        self._check(
            "the score pushes no sample: it is constant, or has no gradient here, or its limits let all of it rest; see --check_reward",
            pushed == 0 and step <= PATIENCE,
            step,
        )
        self._check(
            "the slider does nothing at all: no gradient reaches its weights; look at learning_rate, network_args and the scorer",
            drift == 0 and norm == 0,
            step,
        )
        self._check(
            f"the slider moves the prediction by more than {EXPLODED:g} (RMS), which is as much as it is: pictures fall apart; lower "
            "learning_rate, or raise preserve_weight",
            drift > EXPLODED,
            step,
        )

    def _check(self, problem: str, holds: bool, step: int) -> None:
        self._in_a_row[problem] = self._in_a_row[problem] + 1 if holds else 0
        if self._in_a_row[problem] == PATIENCE and problem not in self._warned:
            logger.warning("step %d: %s", step, problem)
            self._warned.add(problem)
