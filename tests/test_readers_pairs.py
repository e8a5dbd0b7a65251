"""Pairs in tables of one's own, and HPDv2. (Pick-a-Pic is in test_readers_parquet.)"""

import json
from pathlib import Path

import pytest

from library.errors import UserError
from library.scorer_data.readers.base import BadValue
from library.scorer_data.readers.pairs import preference_value
from library.scorer_data.records import FilePicture
from tests.helpers.rated_files import add_pictures, counts, read, read_pairs, write


@pytest.mark.parametrize(
    ("label", "preference"),
    [("1", 1), (" A", 1), ("first", 1), (1.0, 1), ("0", 0), ("b", 0), ("Second", 0), (0, 0), ("0.5", 0.5), ("tie", 0.5), (".50", 0.5)],
)
def test_a_preference_is_written_in_several_ways(label: object, preference: float) -> None:
    assert preference_value(label) == preference


@pytest.mark.parametrize("label", ["", "2", "c", None, "nan", -1])
def test_what_is_no_preference(label: object) -> None:
    with pytest.raises(BadValue, match="is not 1"):
        preference_value(label)


def test_a_table_of_pairs(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["a.png", "b.png", "sub/c.png"])
    text = "path_a,path_b,label,prompt,weight,split\na.png,b.png,a,cats,2,\nb.png,sub\\c.png,0.5,,,test\n"
    bad = "a.png,a.png,1,,,\na.png,none.png,1,,,\na.png,b.png,x,,,\n,b.png,1,,,\n"
    pairs, skipped = read_pairs(write(tmp_path / "x.csv", text + bad))
    assert [(pair.preference, pair.prompt, pair.weight, pair.split) for pair in pairs] == [(1, "cats", 2, None), (0.5, "", 1, "test")]
    assert pairs[1].first == FilePicture(tmp_path / "b.png") and pairs[1].second == FilePicture(tmp_path / "sub" / "c.png")
    assert pairs[1].name == "b.png | sub/c.png" and pairs[1].where.endswith("x.csv, line 3")
    assert counts(skipped) == {"both pictures are the same": 1, "picture is missing": 1, "label is no preference": 1, "path is empty": 1}
    with pytest.raises(UserError, match="has no column 'label'"):
        read_pairs(write(tmp_path / "y.csv", "path_a,path_b\n"), "pairs")
    with pytest.raises(UserError, match="gives pair, but score is to be learned"):
        read(tmp_path / "x.csv")


def test_a_comparison_in_label_studio(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["a.png", "b.png"])
    result = [{"from_name": "pw", "type": "pairwise", "value": {"selected": "right"}}]
    data = {"prompt": "cats", "image1": "/data/upload/1/cb044c20-a.png", "image2": "/data/upload/1/ab044c21-b.png"}
    path = write(tmp_path / "x.json", json.dumps([{"id": 1, "data": data, "annotations": [{"result": result}]}]))
    [pair], skipped = read_pairs(path)
    assert (pair.name, pair.preference, pair.prompt) == ("a.png | b.png", 0, "cats") and skipped == []


@pytest.mark.parametrize("name", ["validation.csv", "validation.jsonl"])
def test_an_export_of_pick_a_pic(tmp_path: Path, name: str) -> None:
    add_pictures(tmp_path, ["u0.jpg", "u1.png"])
    uids = {"image_0_uid": "u0", "image_1_uid": "u1"}
    rows = [
        {"caption": "a cat", "has_label": True, **uids, "label_0": 0.0, "label_1": 1.0, "ranking_id": 11},
        {
            "caption": "a cat",
            "has_label": False,
            "image_0_uid": "u0",
            "image_1_uid": "u1",
            "label_0": 0.5,
            "label_1": 0.5,
            "ranking_id": 12,
        },
    ]
    if name.endswith(".csv"):
        text = "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
    else:
        text = "\n".join(map(json.dumps, rows))
    [pair], skipped = read_pairs(write(tmp_path / name, text))
    assert (pair.name, pair.preference, pair.prompt, pair.split) == ("11", 0, "a cat", "val")
    assert counts(skipped) == {"pair has no label": 1}


def test_the_training_pairs_of_hpdv2(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["train/00001.jpg", "train/00002.jpg"])
    items = [
        {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["00001.jpg", "00002.jpg"], "user_hash": "x"},
        {"human_preference": [0, 1], "prompt": "a cat", "file_path": ["00001.jpg", "00002.jpg"]},
        {"human_preference": [1], "prompt": "a cat", "file_path": ["00001.jpg", "00002.jpg"]},
        {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["00001.jpg", "gone.jpg"]},
        {"human_preference": 1, "prompt": "a cat", "file_path": 2},
        {"prompt": "a cat"},
    ]
    pairs, skipped = read_pairs(write(tmp_path / "train.json", json.dumps(items)))
    assert [(pair.preference, pair.prompt, pair.split) for pair in pairs] == [(1, "a cat", None), (0, "a cat", None)]
    assert counts(skipped) == {
        "pictures and preferences are not as many": 1,
        "picture is missing": 1,
        "row is not one of HPDv2": 1,
        "row has no file_path": 1,
    }


def test_the_rankings_of_hpdv2_are_all_their_pairs(tmp_path: Path) -> None:
    names = ["0.jpg", "1.jpg", "2.jpg"]
    add_pictures(tmp_path / "test", names)
    items = [{"prompt": "x", "image_path": names, "rank": [1, 0, 1], "raw_annotations": [{"rank": [1, 0, 2]}]}]
    pairs, skipped = read_pairs(write(tmp_path / "test.json", json.dumps(items)))
    assert [(pair.name, pair.preference) for pair in pairs] == [("0.jpg | 1.jpg", 0), ("0.jpg | 2.jpg", 0.5), ("1.jpg | 2.jpg", 1)]
    assert {pair.split for pair in pairs} == {"test"} and skipped == []
