"""WebDataset shards: tar files in which the members of one name, such as 0001.jpg, 0001.json and 0001.cls, are one sample.

Pictures stay where they are: a record says where in the shard its picture's bytes begin. No package is needed.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from library.errors import UserError
from library.scorer_data.readers.base import READERS, BadValue, Reader, ReaderOptions, Source
from library.scorer_data.readers.files import PICTURE_SUFFIXES, source_files
from library.scorer_data.readers.rows import Row
from library.scorer_data.readers.tables import Columns, rated_image
from library.scorer_data.records import Records, Skipped, SlicePicture

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST_TEXT = 1 << 24  # bytes
_TEXTS = (".json", ".cls", ".txt")
Sample = dict[str, tarfile.TarInfo]  # by suffix, from the first dot on


@READERS.register("webdataset")
class WebDataset(Reader):
    """A tar file, a folder of them, or a pattern with * or {000000..000009}. The tars must not be compressed.

    A sample is a picture and .json (the fields that the columns of a table have), .cls (the label) and .txt (the prompt), of which only
    what is to be learned is needed. A field within another is named with a dot: score_column = "ratings.mean".

    Options: score_column, score_range, label_column, tags_column, prompt_column, weight_column, split_column: the names of the fields.
    """

    targets = ("score", "label", "votes", "tags")
    known = ("score_column", "score_range")
    own = MappingProxyType({f"{name}_column": str for name in ("label", "tags", "prompt", "weight", "split")})

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.path.suffix.lower() == ".tar" or any(name.endswith(".tar") for name in source.files)

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        columns = Columns.of(options)
        for shard in _shards(path.absolute()):
            if not shard.is_file():
                yield Skipped(f"there is no shard {shard}", "shard is missing")
                continue
            try:
                with tarfile.open(shard, "r:") as tar:
                    for key, sample in _samples(tar):
                        yield _record(shard, tar, key, sample, columns, options)
            except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
                advice = "unpack it if it is compressed: pictures are read from where they stand in the tar"
                yield Skipped(f"shard {shard} cannot be read on ({error}); {advice}", "shard cannot be read")


def _shards(path: Path) -> list[Path]:
    """Raises UserError if there is none."""
    names = [str(path)]
    while match := _BRACES.search(names[0]):
        first, last = match.groups()
        numbers = [f"{value:0{len(first)}d}" for value in range(int(first), int(last) + 1)]
        names = [name.replace(match.group(), number) for name in names for number in numbers]
        if not names:
            raise UserError(f"{path} stands for no shards: {match.group()} counts down")
    if len(names) == 1:
        return source_files(Path(names[0]), (".tar",))
    shards = [Path(name) for name in names]
    if not any(shard.is_file() for shard in shards):
        raise UserError(f"there is none of the {len(shards)} shards {path}")
    return shards


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, Sample]]:
    """Neighbouring members that have one name up to the first dot."""
    current, sample = "", {}
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # tarfile keeps them all, and a shard may have a million
        folder, slash, name = member.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        if not member.isfile() or not stem:
            continue
        key = f"{folder}{slash}{stem}"
        if key != current and sample:
            yield current, sample
            sample = {}
        current = key
        sample.setdefault(f"{dot}{suffix.lower()}", member)
    if sample:
        yield current, sample


def _record(shard: Path, tar: tarfile.TarFile, key: str, sample: Sample, columns: Columns, options: ReaderOptions):
    where = f"{shard}, sample {key}"
    try:
        member = next((sample[suffix] for suffix in PICTURE_SUFFIXES if suffix in sample), None)
        if member is None:
            raise BadValue("sample has no picture", f"there is no picture; it has {', '.join(sample)}")
        if member.offset_data + member.size > shard.stat().st_size:
            raise BadValue("picture is cut off", f"{member.name} is longer than the shard")
        texts = {suffix: _text(tar, sample[suffix]) for suffix in _TEXTS if suffix in sample}
        values = json.loads(texts[".json"]) if ".json" in texts else {}
        if not isinstance(values, dict):
            raise BadValue("sample's .json is no object")
        values = {name.lower(): value for name, value in _flat(values).items()}
        values.setdefault(columns.label, texts.get(".cls"))
        values.setdefault(columns.prompt[0], texts.get(".txt", "").strip())
        picture = SlicePicture(shard, member.offset_data, member.size, member.name)
        return rated_image(Row(where, values), picture, f"{shard.name}/{member.name}", columns, options)
    except BadValue as error:
        return error.at(where)
    except (ValueError, RecursionError) as error:
        return Skipped(f"{where}: its .json or .txt cannot be read: {error}", "sample's text cannot be read")


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > _LONGEST_TEXT:
        raise ValueError(f"{member.name} has {member.size:,} bytes")
    file = tar.extractfile(member)
    return "" if file is None else file.read().decode("utf-8-sig")


def _flat(values: dict) -> dict:
    """With the fields of the objects in it beside its own, as "outer.inner"."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": content for inner, content in _flat(value).items()}
        else:
            flat[name] = value
    return flat
