"""Pictures sorted into folders: one a class, as ImageNet has it, or one a score."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from library.errors import UserError
from library.scorer_data.readers.base import READERS, SPLIT_NAMES, BadValue, Reader, ReaderOptions, Source, number, score_in_range
from library.scorer_data.readers.files import pictures_below, subfolders
from library.scorer_data.records import FilePicture, RatedImage, Records, Skipped, SkipReport


@READERS.register("folders")
class ClassFolders(Reader):
    """CLASS/picture.jpg, or train/CLASS/picture.jpg beside val/ and test/; what is deeper belongs to its class. The label is CLASS.

    Without a folder val (or valid, validation) the pictures of train are parted into training and validation by the run.
    """

    targets = ("label",)
    is_general = True

    @staticmethod
    def recognises(source: Source) -> bool:
        return bool(source.folders) and not source.is_table and not ScoreFolders.recognises(source)

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        return _read(
            path, lambda picture, name, folder, split: RatedImage(picture=picture, name=name, where=picture.key, label=folder, split=split)
        )


@READERS.register("score_folders")
class ScoreFolders(Reader):
    """SCORE/picture.jpg, where the folder's name is a number such as 01, 10 or -2.5; folders may be in train/, val/ and test/, as above.

    Options: score_range.
    """

    targets = ("score",)
    known = ("score_range",)
    is_general = True

    @staticmethod
    def recognises(source: Source) -> bool:
        names = source.folders
        return bool(names) and not source.is_table and all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names)

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        def record(picture: FilePicture, name: str, folder: str, split: str | None) -> RatedImage:
            score = score_in_range(number(folder, "the folder's name"), options)
            return RatedImage(picture=picture, name=name, where=picture.key, score=score, split=split)

        return _read(path, record)


def _read(path: Path, record: Callable[[FilePicture, str, str, str | None], RatedImage]) -> Records:
    tally = SkipReport()
    root = path.absolute()
    for split, folder, name in pictures_in_folders(root, tally):
        try:
            yield record(FilePicture(root / name), name, folder, split)
        except BadValue as error:
            tally.add(error.at(str(path / name)))
    yield from tally.skipped()


def pictures_in_folders(root: Path, tally: SkipReport) -> Iterator[tuple[str | None, str, str]]:
    """(split, folder, path relative to `root`) of every picture. Raises UserError if `root` has no folders."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give the folder that holds the folders of pictures")
    top = subfolders(root)
    if not top:
        raise UserError(f"{root} has no folders in it; each is one class or score and holds its pictures")
    splits = {name: SPLIT_NAMES[name.lower()] for name in top if name.lower() in SPLIT_NAMES}
    if "train" not in splits.values():
        yield from _pictures(root, "", None, tally)
        return
    has_validation = "val" in splits.values()
    for name in top:
        if name in splits:
            yield from _pictures(root, f"{name}/", splits[name] if has_validation or splits[name] != "train" else None, tally)
        else:
            tally.add(Skipped(f"{root}: folder {name!r} stands beside train and is not val or test", "folder is no split"))


def _pictures(root: Path, prefix: str, split: str | None, tally: SkipReport) -> Iterator[tuple[str | None, str, str]]:
    for name in pictures_below(root / prefix, tally, deep=False):
        tally.add(Skipped(f"{root / prefix / name} is in no folder of a class or score", "picture is in no folder"))
    for folder in subfolders(root / prefix):
        for name in pictures_below(root / prefix / folder, tally):
            yield split, folder, f"{prefix}{folder}/{name}"
