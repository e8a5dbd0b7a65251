"""The training of a scorer from its first step, or from a state, to its best weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.scorer_training.config import OutputConfig
from library.scorer_training.run import ScorerRun
from library.scorer_training.validation import SigmaTable, format_table
from library.scorers.io import save_scorer
from library.scorers.worth import worth_from, worth_in
from library.training.interrupts import Interrupts
from library.training.run_files import RunFiles, due
from library.training.run_state import RunState, find_state
from library.training.runtime import any_process
from library.training.tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

PATIENCE = 5  # validations that are not better than the best before them, after which training stops


@dataclass(frozen=True, kw_only=True)
class ScorerState(RunState):
    """A scorer's training after `step` steps, those of a pretraining included.

    Attributes:
        pretraining: whether it is in its pretraining.
        record: what the file will say of what was before: the pretraining, the folds.
    """

    pretraining: bool
    record: Mapping[str, Any]
    trained = "a scorer"


class ScorerFiles(RunFiles):
    """Writes what a scorer's training leaves behind.

    Attributes:
        shared: what a run that goes on from a state must have in common with it.
    """

    endings = RunFiles.endings + r"|-backbone\.safetensors"

    def __init__(self, saving: OutputConfig) -> None:
        super().__init__(saving)
        self.shared: Mapping[str, Any] = {}

    @property
    def backbone_path(self) -> Path:
        return self.saving.output_dir / f"{self.saving.output_name}-backbone.safetensors"

    def load_state(self) -> tuple[Path, ScorerState] | None:
        """The state that `resume` says; None to begin. Raises UserError if it is another run's, or damaged."""
        saving = self.saving
        folder = find_state(saving)
        if folder is None:
            return None
        self.owns_names = True
        state = ScorerState.load(folder)
        state.check_shared(self.shared, folder, with_changes=saving.resume_with_changes)
        return folder, state

    def save_scorer(self, run: ScorerRun, record: Mapping[str, Any], step: int | None = None) -> Path:
        """Write the scorer as it is now, with its scale; step None: the result. Raises UserError for one that scores all alike."""
        mean, std = run.reference_scale(run.stage.tasks[0])
        if (marks := run.stage.tasks[0].marks_worth) and (worth := worth_from(record.get("worth"), "")):
            record = {**record, "worth": worth.through(marks).to_dict()}
        spec = dataclasses.replace(run.scorer.spec, mean=mean, std=std, training=dict(record))
        path = self.weights_path(step)
        if run.accelerator.is_main_process:
            self.keep_earlier()
            run.scorer.spec = spec
            save_scorer(path, run.scorer)
            self.uploads.send(path, wait=step is None)
            if step is not None:
                self.prune_weights(step)
        return path


class ScorerTrainer:
    """Trains scorers on one machine's settings.

    Args:
        interrupts: one that is received ends the training after the step, with a state.
    """

    def __init__(self, accelerator: Accelerator, tracker: Tracker, files: ScorerFiles, interrupts: Interrupts) -> None:
        self.accelerator, self.tracker, self.files, self.interrupts = accelerator, tracker, files, interrupts

    def fit(self, run: ScorerRun, before: Mapping[str, Any], resumed: tuple[Path, ScorerState] | None = None) -> dict[str, Any]:
        """Train a scorer, leave it with its best averaged weights, and return the record of the stage as JSON values.

        It ends before its last step when `PATIENCE` validations in a row were no better than the best before them. Of a stage whose length
        folds have chosen, the last weights are the best, and the folds have measured them.

        Args:
            before: the record of what was before this stage.
            resumed: the state of this stage to go on from, and its folder.

        Raises:
            UserError: too many losses that are not finite, or nothing left to train.
            SystemExit: interrupted; state and scorer are saved.
        """
        stage, saving = run.stage, self.files.saving
        if resumed is not None:
            folder, saved = resumed
            saved.restore({"run": run}, folder)
            run.done = saved.step - stage.first_step
            if run.done > stage.end:
                raise UserError(f"{folder} was saved after step {run.done} of {stage.end} of the {stage.name}; raise max_train_steps")
        progress = self.tracker.progress(stage.end, run.done, stage.name, (*(f"loss/{task.name}" for task in stage.tasks[:2]), "best"))
        ended = run.best.validations_since >= PATIENCE
        while run.done < stage.end and not ended:
            values = run.step()
            done, step = run.done, stage.first_step + run.done
            if any_process(run.finite.too_many or (done == stage.end and run.finite.none_finite), self.accelerator):
                raise run.finite.complaint(self._save_best(run, before))
            validates = stage.chosen is None and (done % run.settings.validate_every_n_steps == 0 or done == stage.end)
            saves = due(step, saving.save_every_n_steps)
            stopping = any_process(bool(self.interrupts), self.accelerator)
            if not (validates or saves or stopping or done == stage.end):
                run.draw()  # while the device works
            if validates:
                run.validate()
            metrics = {f"loss/{name}": value for name, value in values.items()} | {"lr": run.balance.learning_rate()}
            self.tracker.log(metrics | ({} if stage.chosen else {"best": run.best.value}), step - 1)
            progress.update()
            ended = validates and done < stage.end and any_process(run.best.validations_since >= PATIENCE, self.accelerator)
            if stopping:
                self.files.uploads.stop()
            if saves or (stopping and done < stage.end):
                self._save_step(run, before, with_state=saving.save_state or stopping)
            if stopping and done < stage.end:
                logger.info("stopped after step %d; the same command with --resume auto goes on from there", step)
                raise SystemExit(self.interrupts.exit_code)
        progress.close()
        if ended:
            logger.info(
                "%s ends after step %d: %d validations in a row were no better than that of step %d",
                stage.name,
                run.done,
                PATIENCE,
                run.best.step,
            )
        if (saving.save_state_on_train_end or saving.save_state) and not stage.pretraining:
            self._save_state(run, before, final=True)
        if stage.chosen is None:
            run.best.restore(run.scorer)
            step, tables = run.best.step, run.best.tables
        else:
            run.keep_average()
            step, tables = run.done, {**stage.chosen.tables, **run.tables()}
        self.accelerator.print("\n".join(f"{name}, best at step {step}:\n{format_table(table)}" for name, table in tables.items()))
        return self._record(run, step, tables)

    def _save_step(self, run: ScorerRun, before: Mapping[str, Any], *, with_state: bool) -> None:
        """The averaged weights as a scorer, with what they are worth; and the state, first, for it is not to be lost."""
        step = run.stage.first_step + run.done
        if with_state:
            self._save_state(run, before)
        if run.stage.pretraining:
            return
        with run.averaged():
            try:
                path = self.files.save_scorer(run, {**before, **self._record(run, run.done, run.tables())}, step)
                logger.info("scorer of step %d saved: %s", step, path)
            except UserError as error:
                logger.warning("no scorer of step %d was written: %s", step, error)

    def _save_state(self, run: ScorerRun, before: Mapping[str, Any], *, final: bool = False) -> None:
        step = run.stage.first_step + run.done
        if self.accelerator.is_main_process:
            shared, pretraining = dict(self.files.shared), run.stage.pretraining
            state = ScorerState.of({"run": run}, step=step, shared=shared, pretraining=pretraining, record=dict(before))
            logger.info("state saved: %s", self.files.save_state(state, step, final=final))

    def _save_best(self, run: ScorerRun, before: Mapping[str, Any]) -> str:
        """After losses that were not finite: write the best scorer so far -> what was written, in words."""
        step = run.best.step
        if not step or run.stage.pretraining:
            return " and no scorer was written"
        run.best.restore(run.scorer)
        path = self.files.save_scorer(run, {**before, **self._record(run, step, run.best.tables)}, run.stage.first_step + step)
        return f" and the scorer of step {step}, the best one until then, was saved as {path}"

    @staticmethod
    def _record(run: ScorerRun, step: int, tables: Mapping[str, SigmaTable]) -> dict[str, Any]:
        stage = run.stage
        record = {
            "steps": run.done,
            "best_step": step,
            "optimizer": stage.optimizer.optimizer_type,
            "learning_rate": stage.optimizer.learning_rate,
            "tasks": {task.name: task.describe() for task in stage.tasks},
            "validation_by_task": dict(tables),
        }
        if stage.pretraining:
            return record
        own = stage.tasks[0].name
        worth = stage.chosen.worth if stage.chosen and own in tables else worth_in(tables.get(own), len(stage.tasks[0].validation))
        return {**record, "validation": tables.get(own), "worth": worth and worth.to_dict()}
