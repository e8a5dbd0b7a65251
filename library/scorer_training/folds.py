"""How long to train on few ratings, and what comes of it: repeated K folds.

A tenth of sixty pictures says nothing about a scorer. So the pictures are parted into folds, a scorer is trained on all folds but one for
each of them, and the predictions for the pictures that each did not see are put together: one for every picture. The scorer of the file
is then trained on all of them, for as many steps as the folds did best with. All train side by side, so that they stop together.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from library.scorer_training.run import ScorerRun
from library.scorer_training.stages import Chosen, Stage
from library.scorer_training.trainer import PATIENCE
from library.scorer_training.validation import Predictions, SigmaTable, selection_value, table_of
from library.scorers.base import BackboneScorer
from library.scorers.worth import worth_in
from library.training.interrupts import Interrupts
from library.training.runtime import any_process
from library.training.tracking import progress_bar

logger = logging.getLogger(__name__)

REPEATS = 2  # partitions of the pictures
MEASURED_EVERY = 50  # steps: few pictures are learned in a few hundred


def choose_steps(
    make_run: Callable[[BackboneScorer, Stage], ScorerRun], scorer: BackboneScorer, stage: Stage, interrupts: Interrupts
) -> Chosen:
    """Train on folds of the first task's pictures until `PATIENCE` measurements in a row were no better than the best before them.

    Args:
        make_run: of a scorer and a stage; the scorers are copies of the one that is given, which stays as it is.

    Raises:
        UserError: too many losses that are not finite.
        SystemExit: interrupted; there is no state of folds.
    """
    score, others = stage.tasks[0], stage.tasks[1:]
    assert score.folds is not None
    frozen: dict[int, Any] = {
        id(weight): weight for weight in scorer.parameters() if not weight.requires_grad
    }  # one copy is enough for all
    runs = [
        [
            make_run(copy.deepcopy(scorer, dict(frozen)), dataclasses.replace(stage, name=f"fold {repeat}.{fold}", tasks=(task, *others)))
            for fold, task in enumerate(score.folds(repeat))
        ]
        for repeat in range(REPEATS)
    ]
    folds = len(runs[0])
    best: tuple[float, int, SigmaTable] = (-torch.inf, 0, [])
    accelerator, every = runs[0][0].accelerator, min(MEASURED_EVERY, runs[0][0].settings.validate_every_n_steps)
    with progress_bar(total=stage.steps, desc=f"{REPEATS} x {folds} folds", disable=not accelerator.is_main_process) as progress:
        for done in range(every, stage.steps + every, every):
            for run in (run for own in runs for run in own):
                while run.done < min(done, stage.steps):
                    run.step()
                    if any_process(run.finite.too_many, accelerator):
                        raise run.finite.complaint(" and no scorer was written")
                    if any_process(bool(interrupts), accelerator):
                        logger.info("stopped in the folds, of which there is no state: the same command begins anew")
                        raise SystemExit(interrupts.exit_code)
            table = mean_table([table_of(_pooled(own), score.criterion, score.head) for own in runs])
            value = selection_value(table, score.criterion.selection)
            if value > best[0] or not best[2]:
                best = (value, min(done, stage.steps), table)
            progress.update(min(every, stage.steps - progress.n))
            if done - best[1] >= PATIENCE * every:
                break
    num_pictures = sum(len(run.stage.tasks[0].validation) for run in runs[0])
    worth = worth_in(best[2], num_pictures, in_folds=True)
    logger.info("%d x %d folds did best after %d steps", REPEATS, folds, best[1])
    return Chosen(best[1], (folds, REPEATS), {score.name: best[2]}, worth)


def _pooled(runs: Sequence[ScorerRun]) -> Predictions:
    """Outputs and targets of all pictures, each of the run that was not trained on it."""
    found: list[Predictions] = []
    for run in runs:
        with run.averaged():
            found.append(run.predictions(run.stage.tasks[0]))
    return {sigma: (torch.cat([own[sigma][0] for own in found]), torch.cat([own[sigma][1] for own in found])) for sigma in found[0]}


def mean_table(tables: Sequence[SigmaTable]) -> SigmaTable:
    """The mean of each metric at each noise level."""
    return [{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} for rows in zip(*tables, strict=True)]
