"""The files of a training run, whichever it is: one run a name, its states, and what a killed one left."""

import logging
import re
from contextlib import AbstractContextManager
from pathlib import Path

from library.atomic_files import remove_unfinished
from library.settings.shared import RunFilesConfig
from library.training.checkpoints import prune_steps, state_path, weights_path
from library.training.hub_files import Uploads
from library.training.output_files import check_outputs, keep_earlier, only_process
from library.training.run_state import RunState

logger = logging.getLogger(__name__)


class RunFiles:
    """Under sd-scripts' file names: NAME.safetensors, NAME-step00000100.safetensors, NAME-step00000100-state, NAME-state.

    The numbers of every step are in NAME.metrics.jsonl.

    Attributes:
        owns_names: whether what is there under the run's names is its own: to be set where it goes on from a state. Else `keep_earlier`
            renames it.
    """

    endings = r"\.safetensors|-state|\.metrics\.jsonl"
    """Of a run's files behind NAME or NAME-stepXXXXXXXX, as a regular expression."""

    def __init__(self, saving: RunFilesConfig) -> None:
        self.saving = saving
        self.owns_names = saving.overwrite
        self.uploads = Uploads(saving)

    def check_outputs(self, space: int = 0) -> None:
        """Find at the start what would keep the run from saving, or that there are no `space` bytes free. Raises UserError."""
        folder, name, step = self.saving.output_dir, self.saving.output_name, 10**8 - 1
        states = [state_path(folder, name, step), state_path(folder, name)]  # an interrupted run writes one that was not asked for
        files = [self.weights_path(), self.weights_path(step), self.metrics_path, folder / f".{name}.lock"]
        check_outputs(*files, folders=states, space=space)

    def num_on_the_way(self, num_steps: int) -> int:
        """How many of the files that are saved on the way there are at most at one time."""
        every, last = self.saving.save_every_n_steps, self.saving.save_last_n_steps
        if every is None:
            return 0
        return num_steps // every if last is None else min(num_steps // every, last // every + 1)

    def keep_earlier(self) -> None:
        """Before the first file is written: rename what an earlier run of this name left."""
        if not self.owns_names:
            for path in keep_earlier(self.saving.output_dir, self.saving.output_name, rf"{self._names}({self.endings})"):
                logger.info("an earlier run's file is kept as %s", path)
        self.owns_names = True

    def weights_path(self, step: int | None = None) -> Path:
        """Of the result, or of what is saved on the way."""
        return weights_path(self.saving.output_dir, self.saving.output_name, step)

    @property
    def metrics_path(self) -> Path:
        """The numbers of every step."""
        return self.weights_path().with_suffix(".metrics.jsonl")

    def only_run(self) -> AbstractContextManager[None]:
        """Hold this run's name for the block. Entering raises UserError if another process holds it."""
        folder, name = self.saving.output_dir, self.saving.output_name
        return only_process(folder / f".{name}.lock", f"{name} in {folder} is trained")

    def remove_unfinished(self) -> None:
        """Delete what a killed run of this name was writing: hidden files and states that never took their names."""
        remove_unfinished(self.saving.output_dir, rf"{self._names}({self.endings})")

    def save_state(self, state: RunState, step: int, *, final: bool = False) -> Path:
        """Write a training state, and delete the states that are too old."""
        saving = self.saving
        path = state_path(saving.output_dir, saving.output_name, None if final else step)
        self.keep_earlier()
        state.save(path)
        if saving.save_state_to_huggingface:
            self.uploads.send(path, wait=final)
        last_n_steps = saving.save_last_n_steps if saving.save_last_n_steps_state is None else saving.save_last_n_steps_state
        if not final and last_n_steps is not None:
            prune_steps(saving.output_dir, saving.output_name, step=step, last_n_steps=last_n_steps, states=True)
        return path

    def prune_weights(self, step: int) -> None:
        """Delete the weights that save_last_n_steps says are too old."""
        saving = self.saving
        if saving.save_last_n_steps is not None:
            prune_steps(saving.output_dir, saving.output_name, step=step, last_n_steps=saving.save_last_n_steps)

    @property
    def _names(self) -> str:
        return re.escape(self.saving.output_name) + r"(-step\d{8})?"


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every n steps happens after update number `step` (1, 2, ...)."""
    return every is not None and step % every == 0
