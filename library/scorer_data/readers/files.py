"""Finding picture files: one listing of each folder instead of a question for each file."""

import glob
import os
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from library.errors import UserError
from library.scorer_data.readers.base import BadValue
from library.scorer_data.records import FilePicture, Skipped, SkipReport

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif")


class PictureFiles:
    """The files under a folder.

    A folder is listed once, when the first of its files is asked for, and costs 9 bytes a file from then on: a hash of its
    name, and whether it was found before. (Should two names have one hash, a chance of 1 in 10^7 for a million files, a missing
    file can look present; reading it fails later, and is reported then.)

    Args:
        folder: what names are relative to.
        once: whether a file that is found twice is a mistake.

    Raises:
        UserError: if there is no such folder.
    """

    def __init__(self, folder: Path, *, once: bool = True) -> None:
        if not folder.is_dir():
            raise UserError(f"image_dir {folder} is not a folder; give the folder that the paths are relative to")
        self.folder, self.once = folder, once
        self._root = os.path.abspath(folder)
        self._listings: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of each folder: sorted hashes [N] int64, found before [N] bool

    def find(self, name: str) -> FilePicture:
        """The picture of that name, which may be a path with either slash. Raises BadValue if there is none, or if it was found before."""
        picture = self.find_or_none(name)
        if picture is None:
            if name.startswith(("http://", "https://")):
                raise BadValue("path is a web address", f"{name} is a web address; download the pictures and give their paths")
            raise BadValue("picture is missing", f"there is no picture {os.path.join(self.folder, name)}")
        return picture

    def find_or_none(self, name: str) -> FilePicture | None:
        """As `find`, but None if there is none. A name without the ending of a picture may be found with one: an ID is enough."""
        name = name.replace("\\", "/")
        path = os.path.normpath(os.path.join(self._root, name))
        if not os.path.isabs(name) and not path.startswith(os.path.join(self._root, "")):
            raise BadValue("path leaves image_dir", f"{name} is outside of {self.folder}; write a path below it, or a whole one")
        folder, file = os.path.split(path)
        hashes, found = self._listing(folder)
        if not len(hashes):
            return None
        for form in _forms(file):
            code = _code(form)
            place = int(np.searchsorted(hashes, code))
            if place < len(hashes) and hashes[place] == code:
                if self.once and found[place]:
                    raise BadValue("picture is listed twice", f"picture {name} is listed before; list each picture once")
                found[place] = True
                return FilePicture(os.path.join(folder, form))
        return None

    def _listing(self, folder: str) -> tuple[np.ndarray, np.ndarray]:
        if folder not in self._listings:
            try:
                real = os.path.realpath(folder)  # a folder that is linked to is the same folder
            except ValueError:  # a character that no path has
                return np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
            if real not in self._listings:
                try:
                    with os.scandir(real) as entries:
                        hashes = np.sort(np.fromiter((_code(entry.name) for entry in entries if entry.is_file()), dtype=np.int64))
                except (OSError, ValueError):
                    hashes = np.empty(0, dtype=np.int64)
                self._listings[real] = (hashes, np.zeros(len(hashes), dtype=bool))
            self._listings[folder] = self._listings[real]
        return self._listings[folder]


def _forms(file: str) -> Iterator[str]:
    """The names under which a file may stand: an archive made on macOS has decomposed accents, a list made elsewhere has not."""
    forms = [file] if file.isascii() else list(dict.fromkeys((file, *(unicodedata.normalize(form, file) for form in ("NFC", "NFD")))))
    yield from forms
    if os.path.splitext(file)[1].lower() not in PICTURE_SUFFIXES:
        yield from (form + suffix for suffix in PICTURE_SUFFIXES for form in forms)


def _code(name: str) -> int:
    return hash(os.path.normcase(name))


def source_files(path: Path, suffixes: Collection[str]) -> list[Path]:
    """The file itself, the files of a folder with one of the suffixes, or those of a pattern with * and ?; sorted by name.

    Raises UserError if there is none.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file() and not file.name.startswith(".")]
    else:
        found = [Path(name) for name in glob.glob(str(path))]
    if not found:
        raise UserError(f"there is nothing to read at {path}; give a file, or a folder of files that end in {' or '.join(suffixes)}")
    return sorted(found)


def own_folder(path: Path) -> Path:
    """The folder that a source is, or is in."""
    return path if path.is_dir() else path.parent


def subfolders(folder: Path) -> list[str]:
    """Their names, sorted, without hidden ones and those that archivers leave behind."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__")))


def pictures_below(folder: Path, tally: SkipReport, *, deep: bool = True) -> Iterator[str]:
    """The pictures in a folder, and with `deep` in the folders in it: paths relative to it with forward slashes, in order.

    Hidden files are passed over; others that are no pictures, and names that are not UTF-8, are counted in `tally`.
    """
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if deep and not name.startswith((".", "__")))
        prefix = "" if root == str(folder) else f"{os.path.relpath(root, folder)}/".replace("\\", "/")
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix not in PICTURE_SUFFIXES:
                tally.add(Skipped(f"{root}: {name!r} is no picture; pictures end in {', '.join(PICTURE_SUFFIXES)}", "file is no picture"))
            elif not is_utf8(name):
                tally.add(Skipped(f"{root}: the name {name!r} is not text in UTF-8; rename it", "name is not UTF-8"))
            else:
                yield prefix + name


def is_utf8(text: str) -> bool:
    """Whether a text that was read with surrogateescape was UTF-8."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)
