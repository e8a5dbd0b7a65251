"""Tables in parquet, and pictures that are in their cells."""

import io
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from library.errors import UserError
from library.scorer_data.readers.parquet import ParquetPicture
from tests.helpers.rated_files import add_pictures, counts, read, read_pairs, write


def encoded(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (grey,) * 3).save(file, "PNG")
    return file.getvalue()


def grey_of(picture: ParquetPicture) -> int:
    pixel = Image.open(picture.open()).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel[0]


def test_rows_as_in_a_csv(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    table = {
        "Path": ["a.png", "b.png", "c.png", "d.png"],
        "score": [1.5, float("nan"), None, 4.0],
        "tags": [["x"], [], None, ["y", "z"]],
        "votes": [[1] * 10, None, [1, 2], [0] * 9 + [2]],
        "label": [1.0, None, 3.0, 4.0],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet", row_group_size=2)
    images, skipped = read(tmp_path / "x.parquet")
    assert [(image.name, image.score) for image in images] == [("a.png", 1.5), ("d.png", 4.0)]
    assert [record.reason.split(", ")[1][:5] for record in skipped] == ["row 2", "row 3"]
    assert [image.tags for image in read(tmp_path / "x.parquet", target="tags")[0]] == [("x",), (), ("y", "z")]
    assert [image.votes for image in read(tmp_path / "x.parquet", target="votes")[0]] == [(1,) * 10, (0,) * 9 + (2,)]
    assert [image.label for image in read(tmp_path / "x.parquet", target="label")[0]] == ["1", "3", "4"]


def test_pictures_and_names_of_classes_as_the_library_datasets_stores_them(tmp_path: Path) -> None:
    """huggan/wikiart and the like: image {bytes, path}, and classes by number, named in the schema."""
    features = {"image": {"_type": "Image"}, "style": {"names": ["Baroque", "Cubism"], "_type": "ClassLabel"}}
    schema = pyarrow.schema(
        [("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])), ("style", pyarrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"image": {"bytes": encoded(grey), "path": None}, "style": grey % 2} for grey in range(5)] + [{"image": None, "style": 7}]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), tmp_path / "x.parquet", row_group_size=2)
    images, [skipped] = read(tmp_path / "x.parquet", target="label", label_column="style")
    assert [image.label for image in images] == ["Baroque", "Cubism", "Baroque", "Cubism", "Baroque"]
    assert "row 6: label is empty" in skipped.reason
    pictures = [image.picture for image in images]
    assert [grey_of(picture) for picture in reversed(pictures) if isinstance(picture, ParquetPicture)] == [4, 3, 2, 1, 0]
    assert len({picture.key for picture in pictures}) == len(set(pictures)) == len({image.name for image in images}) == 5
    with pytest.raises(OSError, match="is empty"):
        ParquetPicture(tmp_path / "x.parquet", 2, 1, "image.bytes").open()


def test_a_changed_file_is_read_anew_and_a_shorter_one_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"image": [encoded(1), encoded(2)]}), path)
    picture = ParquetPicture(path, 0, 1, "image")
    assert grey_of(picture) == 2
    parquet.write_table(pyarrow.table({"image": [encoded(3)]}), path)
    with pytest.raises(OSError, match="cannot be read"):
        picture.open()
    assert grey_of(ParquetPicture(path, 0, 0, "image")) == 3
    write(path, "no parquet")
    with pytest.raises(OSError, match="cannot be read"):
        picture.open()


PICK_A_PIC = {
    "caption": ["a cat", "a cat", "a dog", "a dog"],
    "has_label": [True, True, False, True],
    "image_0_uid": ["u0", "u2", "u4", "u6"],
    "image_1_uid": ["u1", "u3", "u5", "u6"],
    "label_0": [1.0, 0.5, None, 0.0],
    "label_1": [0.0, 0.5, None, 1.0],
    "ranking_id": [11, 12, 13, 14],
    "user_id": [1, 2, 3, 4],
}


def test_pick_a_pic(tmp_path: Path) -> None:
    cells = {f"jpg_{side}": [encoded(10 * side + row) for row in range(4)] for side in (0, 1)}
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation_unique-00000-of-00001.parquet"):
        parquet.write_table(pyarrow.table({**PICK_A_PIC, **cells}), tmp_path / name, row_group_size=3)
    pairs, skipped = read_pairs(tmp_path)
    assert [(pair.preference, pair.prompt, pair.name) for pair in pairs[:2]] == [(1.0, "a cat", "11"), (0.5, "a cat", "12")]
    assert [pair.split for pair in pairs] == [None, None, None, None, "val", "val"]
    assert counts(skipped) == {"pair has no label": 3, "both pictures are the same": 3}
    second = pairs[1]
    assert isinstance(second.first, ParquetPicture) and isinstance(second.second, ParquetPicture)
    assert (grey_of(second.first), grey_of(second.second)) == (1, 11)


def test_pick_a_pic_without_pictures_finds_them_by_their_uid(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(PICK_A_PIC), tmp_path / "train.parquet")
    add_pictures(tmp_path / "images", ["u0.jpg", "u1.png"])
    [pair], skipped = read_pairs(tmp_path / "train.parquet", image_dir=tmp_path / "images")
    assert pair.first.key.endswith("u0.jpg") and pair.second.key.endswith("u1.png")
    assert {record.kind: record.count for record in skipped} == {
        "picture is missing": 1,
        "pair has no label": 1,
        "both pictures are the same": 1,
    }


def test_pictures_of_a_relative_source_have_the_same_key_wherever_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table({"image": [encoded(1)], "score": [1.0]}), tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    [image], _ = read(Path("x.parquet"))
    assert image.picture.key == f"{tmp_path}/x.parquet#image[0,0]"


def test_a_file_that_is_no_parquet_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", "path,score\n")
    with pytest.raises(UserError, match="is not a parquet file"):
        read(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(path)
