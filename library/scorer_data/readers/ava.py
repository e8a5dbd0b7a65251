"""AVA (Murray et al., CVPR 2012): 255,500 photographs, each with some 200 votes from 1 to 10, from contests of dpchallenge.com."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.scorer_data.readers.base import READERS, BadValue, Reader, ReaderOptions, Source, mean_vote, score_in_range, ten_votes
from library.scorer_data.readers.files import PictureFiles, own_folder
from library.scorer_data.readers.rows import read_rows
from library.scorer_data.records import RatedImage, Records, Skipped, SkipReport

COLUMNS = 15  # of AVA.txt: index, image, counts of the votes 1 to 10, two semantic tags, contest
LIST_FOLDERS = (".", "aesthetics_image_lists", "..", "../aesthetics_image_lists")
PYIQA_SPLITS: Mapping[str, str] = {"": "official split", "official": "official split", "ilgnet": "ilgnet split"}


@dataclass(frozen=True)
class _Photograph:
    where: str
    name: str
    votes: tuple[float, ...]
    tag_ids: tuple[str, ...]
    split: str | None


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
        tally = SkipReport()
        photographs = _pyiqa(source, options.split) if source.suffix.lower() == ".csv" else _ava_txt(source, options.split, tally)
        for photograph in photographs:
            if isinstance(photograph, Skipped):
                yield photograph
                continue
            try:
                yield RatedImage(
                    picture=files.find(photograph.name),
                    name=photograph.name,
                    where=photograph.where,
                    score=score_in_range(mean_vote(photograph.votes), options),
                    votes=photograph.votes,
                    tags=tuple(names.get(number, number) for number in dict.fromkeys(photograph.tag_ids) if number != "0"),
                    split=photograph.split,
                )
            except BadValue as error:
                yield error.at(photograph.where)
        yield from tally.skipped()


def _ava_txt(path: Path, split: str, tally: SkipReport) -> Iterator[_Photograph | Skipped]:
    splits, only_listed = _lists(path.parent, split)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line, text in enumerate(file, start=1):
            parts = text.split()
            where = f"{path}, line {line}"
            if not parts:
                continue
            if len(parts) != COLUMNS or not parts[1].isdecimal():
                kind = "line is not one of AVA.txt"
                yield BadValue(kind, f"this line has {len(parts)} columns; a line of AVA.txt has {COLUMNS}, the second an image ID").at(
                    where
                )
                continue
            if only_listed and parts[1] not in splits:
                tally.add(Skipped(f"{where}: picture {parts[1]} is not in the lists of split {split}", "picture is not in the split"))
                continue
            try:
                yield _Photograph(where, f"{parts[1]}.jpg", ten_votes(parts[2:12]), tuple(parts[12:14]), splits.get(parts[1]))
            except BadValue as error:
                yield error.at(where)


def _pyiqa(path: Path, split: str) -> Iterator[_Photograph | Skipped]:
    if split not in (*PYIQA_SPLITS, "none"):
        raise UserError(f"split is {split!r}; for pyiqa's table of AVA it can be official, ilgnet or none")
    column = PYIQA_SPLITS.get(split)
    for row in read_rows(path, [["img_name"], ["c1"], ["c10"], *([[column]] if column and split else [])]):
        if isinstance(row, Skipped):
            yield row
            continue
        try:
            yield _Photograph(
                row.where,
                str(row.get("img_name")),
                ten_votes([row.get(f"c{rating}") for rating in range(1, 11)]),
                tuple(str(row.get(f"semantic_tag{number}") or "0") for number in (1, 2)),
                {"1": "val", "2": "test"}.get(str(row.get(column)).strip()) if column else None,
            )
        except BadValue as error:
            yield error.at(row.where)


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
