"""Scores of picture files by another program: as a command says them, or as they stand in its table."""

from __future__ import annotations

import contextlib
import csv
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from library.errors import UserError
from library.scorer_data.records import FilePicture, RatedImage, Skipped
from library.scorers.raters import NO_SCORE, UNREADABLE, RaterResult, ReportProgress, outcome_of

IMAGE_PLACE = "{image}"


class CommandRater:
    """A program of the user's, run without a shell.

    With {image} in it, it is run once for each picture, {image} stands for the picture's path, and the last line that it prints is the
    score. Without, it is run once, reads the paths from its standard input, one a line, and prints a score for each, one a line; a line
    that is no number is a picture that it could not score.

    Args:
        command: as in a shell, with quotes where a word has spaces in it.
        timeout: seconds for a picture; a program that is run once has so many for each of them.

    Raises:
        UserError: there is no such program.
    """

    def __init__(self, command: str, *, timeout: float = 60.0) -> None:
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise UserError(f"command {command!r} cannot be read: {error}; close its quotes") from error
        if not self.words or shutil.which(self.words[0]) is None:
            raise UserError(f"command {command!r}: there is no program {(self.words or [''])[0]!r}; give its path")
        program = self.words[1] if len(self.words) > 1 and Path(self.words[1]).is_file() else self.words[0]  # an interpreter has a script
        self.command, self.timeout, self.name = command, timeout, PurePath(program).stem
        self.once_a_picture = any(IMAGE_PLACE in word for word in self.words)

    def rate(self, images: Sequence[RatedImage], progress: ReportProgress = lambda count: None) -> list[RaterResult]:
        if not self.once_a_picture:
            return self._rate_together(images, progress)
        outcomes = []
        for image in images:
            outcomes.append(self._rate_one(image))
            progress(1)
        return outcomes

    def _rate_one(self, image: RatedImage) -> RaterResult:
        try:
            with _as_file(image) as path:
                words = [word.replace(IMAGE_PLACE, path) for word in self.words]
                done = subprocess.run(words, capture_output=True, text=True, timeout=self.timeout, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return Skipped(f"picture {image.name}: {self.name} took longer than {self.timeout:g} s", "command took too long")
        except OSError as error:
            return Skipped(f"picture {image.name} cannot be read: {error.strerror or error}", UNREADABLE)
        if done.returncode:
            reason = f"{self.name} ended with code {done.returncode}: {_last_line(done.stderr)}"
            return Skipped(f"picture {image.name}: {reason}", "command failed")
        lines = done.stdout.split("\n") if done.stdout.strip() else [""]
        return _parse([line for line in lines if line.strip()][-1:] or [""], [image], self.name)[0]

    def _rate_together(self, images: Sequence[RatedImage], progress: ReportProgress) -> list[RaterResult]:
        with contextlib.ExitStack() as files:
            paths = [files.enter_context(_as_file(image)) for image in images]
            limit = self.timeout * max(1, len(images))
            try:
                done = subprocess.run(
                    self.words, input="".join(f"{path}\n" for path in paths), capture_output=True, text=True, timeout=limit
                )
            except subprocess.TimeoutExpired as error:
                raise UserError(f"command {self.command!r} took longer than {limit:g} s; raise command_timeout") from error
        if done.returncode:
            raise UserError(f"command {self.command!r} ended with code {done.returncode}: {_last_line(done.stderr)}")
        lines = done.stdout.splitlines()
        if len(lines) != len(images):
            raise UserError(
                f"command {self.command!r} printed {len(lines)} lines for {len(images)} pictures; it must print one number for each, "
                f"or take one picture at a time by {IMAGE_PLACE}"
            )
        progress(len(images))
        return _parse(lines, images, self.name)


class TableRater:
    """What another program has written: a CSV with the columns path and score, or as they are called.

    Paths are relative to the CSV's folder, or as the pictures' source has them.

    Raises:
        UserError: there is no such file, or it has not these columns.
    """

    def __init__(self, file: Path, *, path_column: str = "path", score_column: str = "score") -> None:
        self.name, self.file = file.stem, file
        try:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream)
                for column in (path_column, score_column):
                    if (count := (reader.fieldnames or []).count(column)) != 1:
                        found = f"{count or 'no'} column{'s' if count else ''} {column!r}"
                        raise UserError(f"{file} has {found}; it has {', '.join(reader.fieldnames or ()) or 'none'}")
                rows = [(str(row[path_column] or ""), str(row[score_column] or "")) for row in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"scores_csv {file} cannot be read: {error}") from error
        self._by_name: Mapping[str, str] = {path.replace("\\", "/"): score for path, score in rows}
        self._by_path: Mapping[str, str] = {str((file.parent / path).resolve()): score for path, score in rows}

    def rate(self, images: Sequence[RatedImage], progress: ReportProgress = lambda count: None) -> list[RaterResult]:
        outcomes = []
        for image in images:
            text = self._by_path.get(str(image.picture.path.resolve())) if isinstance(image.picture, FilePicture) else None
            text = self._by_name.get(image.name) if text is None else text
            missing = Skipped(f"picture {image.name} is not in {self.file}", "picture is not in scores_csv")
            outcomes.append(missing if text is None else _parse([text], [image], self.name)[0])
            progress(1)
        return outcomes


@contextlib.contextmanager
def _as_file(image: RatedImage) -> Iterator[str]:
    """The path of a picture; of one within another file, that of a copy."""
    if isinstance(image.picture, FilePicture):
        yield image.picture.key
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePath(image.name).name or "picture")
        with image.picture.open() as stream:
            path.write_bytes(stream.read())
        yield str(path)


def _parse(lines: Sequence[str], images: Sequence[RatedImage], name: str) -> list[RaterResult]:
    outcomes: list[RaterResult] = []
    for line, image in zip(lines, images, strict=True):
        try:
            outcomes.append(outcome_of(float(line), image, name))
        except ValueError:
            reason = f"picture {image.name}: {name} said {line.strip()[:60]!r}, which is no number"
            outcomes.append(Skipped(reason, NO_SCORE))
    return outcomes


def _last_line(text: str) -> str:
    """What a program says at the end, such as the error below a traceback."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
