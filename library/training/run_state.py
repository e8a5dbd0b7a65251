"""From a saved state back into a run: which state, whether it is of this run, and every part of it into its place."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from library.errors import UserError
from library.settings.shared import RunFilesConfig
from library.training.checkpoints import load_state, newest_state, restore_rng_state, rng_state, save_state
from library.training.hub_files import fetch_state

logger = logging.getLogger(__name__)

AUTO = Path("auto")
SETTINGS = "settings"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run after `step` updates. A script's own kind adds what else it counts, as int or bool.

    Attributes:
        shared: what a run that goes on from here must have in common with it.
        rng: of the global generators.
        parts: the state of every part that has one, and what kind of thing it is.
    """

    step: int
    shared: Mapping[str, Any]
    rng: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]]
    trained = "something"
    """What a script trains, in words."""

    @classmethod
    def of(cls, parts: Mapping[str, Any], **counts: Any) -> Self:
        """The state of the parts, by their state_dict, and of the generators as they are now."""
        states = {name: {"kind": type(part).__name__, "state": part.state_dict()} for name, part in parts.items()}
        return cls(parts=states, rng=rng_state(), **counts)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises UserError for a state that is damaged, lacks something or cannot be."""
        content = load_state(folder)
        if (trained := content.get("trained", cls.trained)) != cls.trained:
            raise UserError(f"{folder} is a state of the training of {trained}, and this trains {cls.trained}: resume from one of its own")
        kinds = {name: kind if kind in (int, bool) else dict for name, kind in get_type_hints(cls).items()}
        wrong = [name for name, kind in kinds.items() if type(content.get(name)) is not kind]
        wrong += [name for name, kind in kinds.items() if kind is int and name not in wrong and content[name] < 0]
        if wrong:
            raise UserError(f"{folder} has no usable {' and '.join(wrong)}, so no run can go on from it: resume from another state")
        return cls(**{name: content[name] for name in kinds})

    def save(self, folder: Path) -> None:
        """Write it; see `library.training.checkpoints.save_state`."""
        save_state(folder, {"trained": self.trained, **{field.name: getattr(self, field.name) for field in fields(self)}})

    def restore(self, parts: Mapping[str, Any], folder: Path) -> None:
        """Put each part, and the generators, into this state.

        Raises:
            UserError: it was saved by a run with other settings.
        """
        for name, part in parts.items():
            advice = f"the {name} in {folder} does not fit this run's; resume with the settings of the run that was saved"
            saved = self.parts.get(name)
            if not isinstance(saved, Mapping) or saved.get("kind") != type(part).__name__ or "state" not in saved:
                raise UserError(advice)
            try:
                part.load_state_dict(saved["state"])
            except UserError:
                raise
            except Exception as error:  # whatever a part makes of a state that is not its own
                raise UserError(advice) from error
        try:
            restore_rng_state(dict(self.rng))
        except Exception as error:
            raise UserError(f"the random generators in {folder} are none: resume from another state") from error

    def check_shared(self, own: Mapping[str, Any], folder: Path, *, with_changes: bool) -> None:
        """Refuse a run that differs from the saved one in what they must share; `with_changes` logs it instead.

        What differs in the other settings, which are under SETTINGS in what is shared, is named in one warning.
        """
        names = [name for name in {**self.shared, **own} if name != SETTINGS and repr(self.shared.get(name)) != repr(own.get(name))]
        changes = [f"{name} is {own.get(name)!r} and was {self.shared.get(name)!r}" for name in names]
        if changes and not with_changes:
            raise UserError(
                f"{folder} was saved by another run: {', '.join(changes)}; give what it had, or --resume_with_changes to go on all the same"
            )
        for change in changes:
            logger.warning("resumed with a change: %s", change)
        saved, now = self.shared.get(SETTINGS), own.get(SETTINGS, {})
        others = [name for name in now if isinstance(saved, dict) and name not in own and saved.get(name, now[name]) != now[name]]
        if others and isinstance(saved, dict):
            listed = ", ".join(f"{name} is {now[name]} and was {saved[name]}" for name in others)
            logger.warning("%s is of a run with other settings, and this one's hold from here on: %s", folder, listed)


def find_state(saving: RunFilesConfig) -> Path | None:
    """The folder to resume from; None to begin.

    Raises:
        UserError: `resume` is auto and every state of the run is broken, or it is on the hub and cannot be fetched.
    """
    if saving.resume is not None and saving.resume_from_huggingface:
        return fetch_state(saving)
    if saving.resume != AUTO:
        return saving.resume
    folder = newest_state(saving.output_dir, saving.output_name)
    logger.info("resume auto: %s", f"no state of {saving.output_name} yet, training begins" if folder is None else folder)
    return folder
