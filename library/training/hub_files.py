"""Saved files to the Hugging Face hub, and a state from there: sd-scripts' settings of these names."""

from __future__ import annotations

import logging
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.models.hub import reason_of
from library.settings.shared import HUB_ID, RunFilesConfig

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_STATE = re.compile(rf"(?P<repo_id>{HUB_ID})/(?P<folder>[^:]+)(:(?P<revision>[^:]+)(:(?P<repo_type>model|dataset|space))?)?")


class Uploads:
    """Sends saved files to `huggingface_repo_id`, if there is one. What does not arrive costs a line of the log."""

    def __init__(self, saving: RunFilesConfig) -> None:
        self.saving = saving if saving.huggingface_repo_id else None

    @cached_property
    def _hub(self) -> HfApi:
        from huggingface_hub import HfApi

        assert self.saving is not None
        return HfApi(token=self.saving.huggingface_token)

    def check(self) -> None:
        """Find before the training that the hub cannot be reached, or that it does not know the token. Raises UserError."""
        if self.saving is None:
            return
        try:
            self._hub.whoami()
        except Exception as error:  # of the hub and of whatever HTTP client its package uses
            raise UserError(
                f"nothing can be put into {self.saving.huggingface_repo_id} ({reason_of(error, self.saving.huggingface_token)}); give "
                "huggingface_token, or leave huggingface_repo_id out"
            ) from None

    def send(self, path: Path, *, wait: bool = False) -> None:
        """Put a file or a folder there under its own name, after those before it; with async_upload in the background, unless `wait`."""
        if self.saving is not None:
            sent = self._hub.run_as_future(self._send, self.saving, path)
            if wait or not self.saving.async_upload:
                sent.result()

    def stop(self) -> None:
        """Send nothing any more: an interrupted run may have seconds left, and the disk comes first."""
        self.saving = None

    def _send(self, saving: RunFilesConfig, path: Path) -> None:
        assert saving.huggingface_repo_id is not None
        place = {"repo_id": saving.huggingface_repo_id, "repo_type": saving.huggingface_repo_type}
        target = "/".join(filter(None, [(saving.huggingface_path_in_repo or "").strip("/"), path.name]))
        try:
            self._hub.create_repo(**place, private=saving.huggingface_repo_visibility != "public", exist_ok=True)
            if path.is_dir():
                self._hub.upload_folder(**place, folder_path=path, path_in_repo=target)
            else:
                self._hub.upload_file(**place, path_or_fileobj=path, path_in_repo=target)
        except Exception as error:
            reason = reason_of(error, saving.huggingface_token)
            logger.error("%s was not put into %s (%s); the run goes on", path, saving.huggingface_repo_id, reason)
        else:
            logger.info("%s is in %s as %s", path, saving.huggingface_repo_id, target)


def fetch_state(saving: RunFilesConfig) -> Path:
    """A state on the hub -> its folder in the hub's cache. Raises UserError: `resume` names none, or it cannot be fetched."""
    from huggingface_hub import HfApi

    assert saving.resume is not None
    match = _STATE.fullmatch(saving.resume.as_posix())
    if match is None:
        raise UserError(
            f"resume is {saving.resume}, but with resume_from_huggingface it must be OWNER/NAME/FOLDER, or OWNER/NAME/FOLDER:REVISION:TYPE"
        )
    repo_id, folder, revision, repo_type = match.group("repo_id", "folder", "revision", "repo_type")
    try:
        home = HfApi(token=saving.huggingface_token).snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, allow_patterns=[f"{folder}/*"]
        )
    except Exception as error:
        raise UserError(f"resume: {folder} cannot be fetched from {repo_id} ({reason_of(error, saving.huggingface_token)})") from None
    return Path(home, folder)
