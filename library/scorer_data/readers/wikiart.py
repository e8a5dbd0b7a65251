"""WikiArt as ArtGAN's authors packed it (Tan et al., 2016): 81,444 paintings, in one folder for each of 27 styles."""

import re
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from library.errors import UserError
from library.scorer_data.readers.base import READERS, BadValue, Reader, ReaderOptions, Source, label_text, score_in_range
from library.scorer_data.readers.files import PictureFiles, own_folder
from library.scorer_data.readers.folders import pictures_in_folders
from library.scorer_data.readers.rows import Row, RowIterator, read_rows, records_of
from library.scorer_data.records import RatedImage, Records, Skipped, SkipReport

TASKS = ("style", "artist", "genre")
STYLES = ("Abstract_Expressionism", "Color_Field_Painting", "Naive_Art_Primitivism", "Post_Impressionism", "Ukiyo_e")  # some of the 27
# claude-monet_water-lilies-1919-3, carl-larsson_portrait-of-alma-1887(1), someone_untitled-1960-61: the last number of four digits
_YEAR = re.compile(r"-(1\d{3}|20[0-2]\d)(?:-\d{1,2})?(?:\(\d+\))?$")


@READERS.register("wikiart")
class WikiArt(Reader):
    """Style_Name/artist_title-year.jpg: the folder of the style folders, or one of the lists that go with it.

    The lists: a folder with style_train.csv and style_val.csv ("path,class number" without a header) and style_class.txt ("number name"),
    or the same for artist and genre, or one of these files; or classes.csv (filename, artist, genre, description, ..., subset).
    The score is the year, which is the last in the name of the file; paintings without one are left out.

    Options: image_dir, score_column ("year", which is the only one), score_range;
    label: "style" (default), "artist" or "genre", which only the lists have.
    """

    targets = ("score", "label")
    known = ("image_dir", "score_column", "score_range")
    own = MappingProxyType({"label": TASKS})

    @staticmethod
    def recognises(source: Source) -> bool:
        lists = tuple(f"{task}_" for task in TASKS)
        return (
            {"filename", "artist", "genre"} <= source.columns
            or (source.path.suffix.lower() == ".csv" and source.path.name.lower().startswith(lists))
            or any(name.startswith("style_train") for name in source.files)
            or not set(STYLES).isdisjoint(source.folders)
        )

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        if options.score_column not in ("", "year"):
            raise UserError(f"score_column is {options.score_column!r}; of WikiArt it can be year, which stands in the names of the files")
        task = options.extra.get("label", "style")
        files = PictureFiles(options.image_dir or own_folder(path))

        def painting(row: Row) -> RatedImage:
            name = row.get("path")
            score = score_in_range(year_of(name), options) if options.target == "score" else None
            label = label_text(row.get("label")) if options.target == "label" else None
            return RatedImage(picture=files.find(name), name=name, where=row.where, score=score, label=label, split=row.get("split"))

        yield from records_of(_paintings(path, task), painting)


def year_of(name: str) -> int:
    """The year in the name of a painting's file. Raises BadValue if it has none."""
    match = _YEAR.search(PurePosixPath(name).stem)
    if match is None:
        raise BadValue("name has no year", f"the name {name!r} does not end in a year")
    return int(match.group(1))


def _paintings(path: Path, task: str) -> RowIterator:
    """Rows with path, label and split."""
    if path.is_file():
        if "filename" in path.open(encoding="utf-8-sig", errors="replace").readline():
            yield from _classes_csv(path, task)
        else:
            yield from _list(path, task, None)
        return
    lists = [(file, split) for split in ("train", "val") for file in sorted(path.glob(f"{task}_{split}*")) if file.is_file()]
    for file, split in lists:
        yield from _list(file, task, split)
    if not lists:
        if task == "genre":
            raise UserError(f"label is genre, but there is no genre_train.csv in {path}; folders have style and artist only")
        tally = SkipReport()
        for split, folder, name in pictures_in_folders(path, tally):
            yield Row(
                f"{path}/{name}",
                {"path": name, "label": folder if task == "style" else PurePosixPath(name).name.split("_")[0], "split": split},
            )
        yield from tally.skipped()


def _list(path: Path, task: str, split: str | None) -> RowIterator:
    classes = {}
    for file in sorted(path.parent.glob(f"{task}_class*")):
        pairs = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8-sig").splitlines())
        classes |= {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, start=1):
            name, comma, number = text.strip().rpartition(",")
            where = f"{path}, line {line}"
            if comma:
                label = classes.get(number.strip(), number.strip())
                yield Row(where, {"path": name.strip('" '), "label": label, "split": split})
            elif number:
                yield Skipped(f"{where}: this is not a path, a comma and the number of a class", "row cannot be read")


def _classes_csv(path: Path, task: str) -> RowIterator:
    for row in read_rows(path, [["filename"]]):
        if isinstance(row, Row):
            name = str(row.get("filename")).replace("\\", "/")
            label = {"style": name.split("/")[0], "artist": row.get("artist"), "genre": row.get("genre")}[task]
            row = Row(row.where, {"path": name, "label": label, "split": {"train": "train", "test": "test"}.get(str(row.get("subset")))})
        yield row
