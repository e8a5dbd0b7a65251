"""AVA (Murray et al., CVPR 2012): 255,500 photographs, each with some 200 votes from 1 to 10, from contests of dpchallenge.com."""

from collections.abc import Mapping
from pathlib import Path

from library.errors import UserError
from library.scorer_data.readers.base import READERS, VOTES, Reader, ReaderOptions, Source, mean_vote, score_in_range, ten_votes
from library.scorer_data.readers.files import PictureFiles, own_folder
from library.scorer_data.readers.rows import Row, RowIterator, read_rows, records_of
from library.scorer_data.records import RatedImage, Records, Skipped

# of AVA.txt, as pyiqa calls them
NAMES = ("index", "img_name", *(f"c{rating}" for rating in range(1, VOTES + 1)), "semantic_tag1", "semantic_tag2", "contest")
COLUMNS = len(NAMES)
LIST_FOLDERS = (".", "aesthetics_image_lists", "..", "../aesthetics_image_lists")
PYIQA_SPLITS: Mapping[str, str] = {"": "official split", "official": "official split", "ilgnet": "ilgnet split"}


@READERS.register("ava")
class Ava(Reader):
    """AVA.txt, or the folder that it is in, or the table that pyiqa makes of it (img_name, MOS, c1 ... c10, ...).

    The score is the mean of the votes. Pictures are IMAGE_ID.jpg in `image_dir`, or if that is not set in `images` or `image` beside the
    source, or beside it themselves. The names of tags are in tags.txt ("ID Name"); without it tags are named by their number.

    Option split, for AVA.txt:
        not set: the pictures of generic_test are for testing, if that list is found; all others are open.
        generic_ls, generic_ss, or a category: only the pictures of generic_ls_train ... or of CATEGORY_train, and those of generic_test or
        CATEGORY_test for testing.
        none: all are open.
    For pyiqa's table it is official (not set), ilgnet or none. Open pictures are parted into training and validation by the run.
    """

    targets = ("score", "votes", "tags")
    known = ("image_dir", "score_range", "split")

    @staticmethod
    def recognises(source: Source) -> bool:
        has_votes = {"img_name", "c1", "c10"} <= source.columns
        return has_votes or "AVA.txt" in source.files or len(source.first_words) == COLUMNS

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        source = path / "AVA.txt" if path.is_dir() else path
        if not source.is_file():
            raise UserError(f"there is no {source}; give AVA.txt, the folder that it is in, or pyiqa's table of AVA")
        folder = own_folder(source)
        nearby = [folder / name for name in ("images", "image") if (folder / name).is_dir()]
        files = PictureFiles(options.image_dir or next(iter(nearby), folder))
        names = _tag_names(folder)

        def photograph(row: Row) -> RatedImage:
            name, votes = str(row.get("img_name")), ten_votes([row.get(f"c{rating}") for rating in range(1, VOTES + 1)])
            numbers = dict.fromkeys(str(row.get(f"semantic_tag{number}") or "0") for number in (1, 2))
            return RatedImage(
                picture=files.find(name),
                name=name,
                where=row.where,
                score=score_in_range(mean_vote(votes), options),
                votes=votes,
                tags=tuple(names.get(number, number) for number in numbers if number != "0"),
                split=row.get("split"),
            )

        rows = _pyiqa(source, options.split) if source.suffix.lower() == ".csv" else _ava_txt(source, options.split)
        yield from records_of(rows, photograph)


def _ava_txt(path: Path, split: str) -> RowIterator:
    """Its lines under pyiqa's names, with their split."""
    splits, only_listed = _lists(path.parent, split)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line, text in enumerate(file, start=1):
            parts = text.split()
            where = f"{path}, line {line}"
            if len(parts) == COLUMNS and parts[1].isdecimal():
                if only_listed and parts[1] not in splits:
                    yield Skipped(f"{where}: picture {parts[1]} is not in the lists of split {split}", "picture is not in the split")
                else:
                    yield Row(where, {**dict(zip(NAMES, parts, strict=True)), "img_name": f"{parts[1]}.jpg", "split": splits.get(parts[1])})
            elif parts:
                kind = "line is not one of AVA.txt"
                yield Skipped(f"{where}: this line has {len(parts)} columns; one of AVA.txt has {COLUMNS}, the second an image ID", kind)


def _pyiqa(path: Path, split: str) -> RowIterator:
    if split not in (*PYIQA_SPLITS, "none"):
        raise UserError(f"split is {split!r}; for pyiqa's table of AVA it can be official, ilgnet or none")
    column = PYIQA_SPLITS.get(split)
    for row in read_rows(path, [["img_name"], ["c1"], ["c10"], *([[column]] if column and split else [])]):
        if isinstance(row, Row):
            own = {"1": "val", "2": "test"}.get(str(row.get(column)).strip()) if column else None
            row = Row(row.where, {**row.values, "split": own})
        yield row


def _lists(folder: Path, split: str) -> tuple[dict[str, str | None], bool]:
    """The split of each picture ID, and whether all others are left out."""
    if split == "none":
        return {}, False
    train = f"{split}_train"
    test = "generic_test" if split in ("", "generic_ls", "generic_ss") else f"{split}_test"
    splits: dict[str, str | None] = {}
    for name, part in ((train, None), (test, "test")) if split else ((test, "test"),):
        file = next((found for place in LIST_FOLDERS for found in sorted((folder / place).glob(f"{name}.*")) if found.is_file()), None)
        if file is None:
            if not split:
                return {}, False
            raise UserError(f"split is {split!r}, but there is no list {name}.jpgl beside AVA.txt, nor in aesthetics_image_lists")
        splits.update(dict.fromkeys(file.read_text(encoding="utf-8-sig").split(), part))
    return splits, bool(split)


def _tag_names(folder: Path) -> dict[str, str]:
    for place in (folder, folder.parent):
        if (place / "tags.txt").is_file():
            lines = (line.split(maxsplit=1) for line in (place / "tags.txt").read_text(encoding="utf-8-sig").splitlines())
            return {parts[0]: parts[1].strip() for parts in lines if len(parts) == 2}
    return {}
