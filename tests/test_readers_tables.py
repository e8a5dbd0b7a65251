"""Tables of one's own: what people's files look like, and what is said about the bad rows."""

import json
import logging
from pathlib import Path

import pytest

from library.errors import UserError
from library.scorer_data.records import FilePicture
from tests.helpers.rated_files import add_pictures, counts, read, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_pictures(tmp_path, ["a.png", "b.png", "sub dir/ü.png"])
    return tmp_path


CSV = 'path,score,prompt,weight,split\na.png,1.5,"a cat, sitting",2,train\nsub dir\\ü.png, -3 ,,,Validation\n'
TSV = "Path\tScore\textra\na.png\t1.5\tx\nsub dir/ü.png\t-3\ty\n"
JSONL = '{"path": "a.png", "score": 1.5}\n\n{"path": "sub dir/ü.png", "score": "-3", "prompt": null}\n'
LIST = '[\n {"path": "a.png", "score": 1.5, "tags": ["]"]},\n {"path": "sub dir/ü.png", "score": -3}]\n'
SEMICOLONS = "path;score\na.png;1.5\nsub dir/ü.png;-3\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", CSV),
        ("x.CSV", "\ufeff" + CSV),
        ("x.csv", CSV.replace("\n", "\r\n")),
        ("x.csv", SEMICOLONS),
        ("x.tsv", TSV),
        ("x.jsonl", JSONL),
        ("x.jsonl", "\ufeff" + JSONL),
        ("x.json", JSONL),
        ("x.jsonl", JSONL.replace("}\n\n{", "} {")),
        ("x.json", LIST),
        ("x.json", "\ufeff" + LIST),
    ],
)
def test_every_format_reads_paths_and_scores(folder: Path, name: str, text: str) -> None:
    images, skipped = read(write(folder / name, text))
    assert skipped == []
    assert [image.score for image in images] == [1.5, -3.0]
    assert [image.picture for image in images] == [FilePicture(folder / "a.png"), FilePicture(folder / "sub dir" / "ü.png")]
    assert images[1].name == "sub dir/ü.png"


def test_optional_columns(folder: Path) -> None:
    (first, second), _ = read(write(folder / "x.csv", CSV))
    assert (first.prompt, first.weight, first.split) == ("a cat, sitting", 2.0, "train")
    assert (second.prompt, second.weight, second.split) == ("", 1.0, "val")
    assert (first.where, second.where) == (f"{folder}/x.csv, line 2", f"{folder}/x.csv, line 3")


def test_only_what_is_to_be_learned_is_needed(folder: Path) -> None:
    path = write(folder / "x.csv", "path,label,score\na.png,cat,bad\nb.png,7,1\n")
    images, skipped = read(path, target="label")
    assert [(image.label, image.score) for image in images] == [("cat", None), ("7", None)] and skipped == []


@pytest.mark.parametrize("votes", ['"[0,0,0,0,0,0,0,1,0,3]"', None])
def test_votes_and_their_mean(folder: Path, votes: str | None) -> None:
    header = "votes" if votes else ",".join(f"votes_{rating}" for rating in range(1, 11))
    path = write(folder / "x.csv", f"path,{header}\na.png,{votes or '0,0,0,0,0,0,0,1,0,3'}\n")
    [image], _ = read(path, target="votes")
    assert image.votes == (0, 0, 0, 0, 0, 0, 0, 1, 0, 3)
    assert read(path)[0][0].score == pytest.approx((8 + 3 * 10) / 4)


@pytest.mark.parametrize(
    ("cell", "tags"),
    [
        ("1girl  solo 1girl", ("1girl", "solo")),
        ('"long hair, solo ,"', ("long hair", "solo")),
        ('"[""long hair"", ""x""]"', ("long hair", "x")),
        ("", ()),
    ],
)
def test_tags_are_written_in_several_ways(folder: Path, cell: str, tags: tuple[str, ...]) -> None:
    [image], _ = read(write(folder / "x.csv", f"path,tags,split\na.png,{cell},\n"), target="tags")
    assert image.tags == tags


def test_other_columns_by_name(folder: Path) -> None:
    path = write(folder / "x.csv", "File,AESTHETIC_SCORE,caption\na.png,6.5,cat\n")
    [image], _ = read(path, score_column="AESTHETIC_SCORE", path_column="File", prompt_column="caption")
    assert (image.score, image.prompt) == (6.5, "cat")
    with pytest.raises(UserError, match="has no column 'path'; it has file, aesthetic_score, caption"):
        read(path, score_column="AESTHETIC_SCORE")


BAD_ROWS = [
    ("x.csv", "path,score\nb.png,good\n", "line 2: score 'good' is not a finite number"),
    ("x.csv", "path,score\nb.png,NaN\n", "line 2: score 'NaN'"),
    ("x.csv", "path,score\nb.png,1e999\n", "line 2: score '1e999'"),
    ("x.csv", "path,score\nb.png,\n", "line 2: score ''"),
    ("x.csv", "path,score\n,1\n", "line 2: path is empty"),
    ("x.csv", "path,score\nb.png,1,2\n", "line 2: line 1 has 2 columns and this row has 3"),
    ("x.csv", "path,score\nb.png\n", "line 2: line 1 has 2 columns and this row has 1"),
    ("x.csv", "path,score,weight\nb.png,1,0\n", "line 2: weight 0 is not above 0"),
    ("x.csv", "path,score,split\nb.png,1,dev\n", "line 2: split 'dev' is not train, val or test"),
    ("x.csv", "path,score\nnone.png,1\n", "line 2: there is no picture .*none.png"),
    ("x.csv", "path,score\nsub dir,1\n", "line 2: there is no picture"),
    ("x.csv", "path,score\nb.png,11\n", "line 2: score 11 is outside score_range, 1 to 10"),
    ("x.jsonl", '{"path": "b.png", "score": true}\n', "line 1: score True"),
    ("x.jsonl", '{"path": "b.png", "score": NaN}\n', "line 1: score nan"),
    ("x.jsonl", '{"path": "b.png", "score": [1]}\n', r"line 1: score \[1\]"),
    ("x.jsonl", '{"path": "b.png"}\n', "line 1: there is no 'score'; it has path"),
    ("x.jsonl", '{"path":\n', "line 1: this is not JSON"),
    ("x.jsonl", "[1]\n", "item 1: this is no JSON object"),
    ("x.jsonl", "1\n", "line 1: this is no JSON object"),
]


@pytest.mark.parametrize(("name", "text", "reason"), BAD_ROWS)
def test_a_bad_row_is_left_out_with_one_sentence_that_says_where_and_why(folder: Path, name: str, text: str, reason: str) -> None:
    images, [skipped] = read(write(folder / name, text), "table", score_range=[1, 10])
    assert images == []
    with pytest.raises(AssertionError, match=reason):  # pytest's way to match
        raise AssertionError(skipped.reason)
    assert "\n" not in skipped.reason and skipped.kind and skipped.count == 1


def test_bad_rows_do_not_take_good_ones_with_them(folder: Path) -> None:
    text = 'path,score\na.png,1\n\nnone.png,2\n,,\n,\nsub dir/../a.png,3\nb.png,4\n"unclosed,5\n'
    images, skipped = read(write(folder / "x.csv", text))
    assert [image.name for image in images] == ["a.png", "b.png"]
    assert counts(skipped) == {"picture is missing": 1, "picture is listed twice": 1, "row cannot be read": 1}
    latin = folder / "latin.csv"
    latin.write_bytes(b"path,score\n\xfc.png,1\na.png,1\n")
    images, skipped = read(latin)
    assert [image.name for image in images] == ["a.png"] and "UTF-8" in skipped[0].reason


def test_a_broken_json_list_gives_what_stands_before_the_break(folder: Path) -> None:
    images, [skipped] = read(write(folder / "x.json", '[{"path": "a.png", "score": 1}, {"path": "b.png" "score": 1}]'))
    assert len(images) == 1 and "from item 2 on" in skipped.reason
    images, [skipped] = read(write(folder / "x.json", '[{"path": "a.png", "score": 1}, {"path": '))
    assert len(images) == 1 and "from item 2 on" in skipped.reason


def test_a_json_list_of_any_length_is_read_piece_by_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.scorer_data.readers.rows._CHUNK", 7)  # pieces end within texts, numbers and the marks between them
    items = [{"path": f"p{number}.png", "score": number, "prompt": 'a "[b],{ü}\\'} for number in range(50)]
    add_pictures(folder, [str(item["path"]) for item in items])
    images, skipped = read(write(folder / "x.json", json.dumps(items, indent=1, ensure_ascii=False)))
    assert [image.score for image in images] == list(range(50)) and skipped == []
    assert {image.prompt for image in images} == {'a "[b],{ü}\\'}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("x.csv", "", "is empty"),
        (
            "x.csv",
            "path,rating\na.png,1\n",
            "has no column 'score' or 'votes' or 'votes_1'; it has path, rating; .* name it by score_column$",
        ),
        ("x.csv", "path,score,Score\na.png,1,2\n", "has 2 columns 'score'; rename those that are not meant"),
        ("x.csv", "path,score,split,split\na.png,1,train,val\n", "has 2 columns 'split'"),
        ("x.xlsx", "PK", "ends in '.xlsx'; it can be .csv, .tsv, .jsonl, .ndjson, .json, .parquet: save it as .csv"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(folder: Path, name: str, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read(write(folder / name, text), "table")


def test_missing_files_folders_and_other_encodings_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to read at"):
        read(folder / "none.csv")
    with pytest.raises(UserError, match="image_dir .* is not a folder"):
        read(write(folder / "x.csv", CSV), image_dir=folder / "none")
    (folder / "wide.csv").write_bytes("path,score\na.png,1\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        read(folder / "wide.csv")


def test_paths_are_relative_to_image_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write(tmp_path_factory.mktemp("elsewhere") / "x.csv", f"path,score\na.png,1\n{folder}/b.png,2\n")
    images, skipped = read(elsewhere, image_dir=folder)
    assert [image.picture.key for image in images] == [f"{folder}/a.png", f"{folder}/b.png"] and skipped == []
    images, skipped = read(elsewhere)
    assert len(images) == 1 and counts(skipped) == {"picture is missing": 1}


def test_a_linked_folder_is_the_same_folder_and_accents_may_be_decomposed(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "sub dir", target_is_directory=True)
    decomposed = "sub dir/u\u0308.png"
    images, skipped = read(write(folder / "x.csv", f"path,score\n{decomposed},1\nlink/ü.png,2\n"))
    assert [image.picture.key for image in images] == [f"{folder}/sub dir/ü.png"]
    assert counts(skipped) == {"picture is listed twice": 1}


def test_a_folder_or_a_pattern_of_tables(folder: Path) -> None:
    write(folder / "lists" / "1.csv", "path,score\na.png,1\n")
    write(folder / "lists" / "2.csv", "path,score\nb.png,2\na.png,3\n")
    for path in (folder / "lists", folder / "lists" / "*.csv"):
        images, skipped = read(path, "table", image_dir=folder)
        assert [image.score for image in images] == [1, 2] and counts(skipped) == {"picture is listed twice": 1}


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("path;score\na.png;7,125\nb.png;-0,25\n", [7.125, -0.25]),
        ("path\tscore\na.png\t7,5\n", [7.5]),
        ('path,score\na.png,"7,5"\nb.png,"1,234"\n', [7.5]),  # the second could be a thousand
        ("sep=;\npath;score\na.png;7\n", [7.0]),
        ("sep=|\npath|score\na.png|7\n", [7.0]),
        ("path\tscore\na.png\t7.5\n", [7.5]),
        ("path,score,,\na.png,1,,\nb.png,2,,,,\n", [1.0, 2.0]),
        ("path,score\ra.png,1\rb.png,2\r", [1.0, 2.0]),
    ],
)
def test_what_spreadsheets_write(folder: Path, text: str, scores: list[float]) -> None:
    for name in ("x.csv", "x.txt"):
        images, skipped = read(write(folder / name, text))
        assert [image.score for image in images] == scores and len(skipped) == text.count("1,234")


@pytest.mark.parametrize(
    ("text", "opened", "bad"),
    [
        ('b.png,2,"open\n' + "".join(f"{number}.png,3,x\n" for number in range(150)), 3, 1),
        ('b.png,2,"5 inch\n' + "".join(f"{number}.png,3,x\n" for number in range(9)) + 'none.png,4,"red, blue"\n', 3, 2),
        ('b.png,2,"open\n' + "".join(f"{number}.png,3,x\n" for number in range(9)) + 'none.png,4,close"\n', 3, 2),
        ('b.png,2,"a text\nof two, or more\nlines"\n0.png,3,x\n', None, 0),
    ],
)
def test_a_quote_that_never_closes_loses_its_own_row(folder: Path, text: str, opened: int | None, bad: int) -> None:
    add_pictures(folder, [f"{number}.png" for number in range(150)])
    images, skipped = read(write(folder / "x.csv", f"path,score,prompt\na.png,1,x\n{text}"))
    assert len(images) == 1 + text.count(",3,x") + (opened is None) and len(skipped) == bad
    if opened:
        assert f"line {opened}: this is not a row" in skipped[0].reason and "a quote opens here" in skipped[0].reason
        assert images[-1].where.endswith(f"line {text.count(chr(10)) + 2 - (bad == 2)}")  # the numbers of lines go on


def test_metadata_of_hugging_face(folder: Path) -> None:
    line = '{"file_name": "%s", "text": "a cat", "score": %d}\n'
    write(folder / "metadata.jsonl", line % ("a.png", 1) + line % ("sub dir/ü.png", 2))
    images, skipped = read(folder)
    assert [(image.name, image.score, image.prompt) for image in images] == [("a.png", 1, "a cat"), ("sub dir/ü.png", 2, "a cat")]
    assert skipped == []
    add_pictures(folder / "parts", ["train/a.png", "train/b.png", "validation/a.png"])
    write(folder / "parts" / "train" / "metadata.csv", "file_name,score\na.png,1\ntrain/b.png,2\n")
    write(folder / "parts" / "validation" / "metadata.csv", "file_name,score\na.png,3\n")
    images, skipped = read(folder / "parts")
    expected = [("train/a.png", "train"), ("train/b.png", "train"), ("validation/a.png", "val")]
    assert [(image.name, image.split) for image in images] == expected and skipped == []


def test_an_id_is_enough_and_a_web_address_is_not(folder: Path) -> None:
    add_pictures(folder, ["0.jpg", "12.png", "v1.5.png"])
    text = '[{"id": 0, "s": 1}, {"id": 12.0, "s": 2}, {"id": "v1.5", "s": 3}, {"id": "13", "s": 4}, {"id": "https://x.org/a.png", "s": 5}]'
    images, skipped = read(write(folder / "x.json", text), path_column="id", score_column="s")
    assert [Path(image.picture.key).name for image in images] == ["0.jpg", "12.png", "v1.5.png"]
    assert counts(skipped) == {"picture is missing": 1, "path is a web address": 1}


def test_the_json_of_idealo(folder: Path) -> None:
    text = '[{"image_id": "a", "label": [0,0,1,2,3,2,1,0,0,0]}, {"image_id": "b", "label": [0,0,0,0,0,0,0,0,0,0]}]'
    [image], [skipped] = read(write(folder / "x.json", text), target="votes")
    assert image.votes == (0, 0, 1, 2, 3, 2, 1, 0, 0, 0) and skipped.kind == "votes are negative or none"


def label_studio(picture: str, *answers: dict, cancelled: bool = False) -> dict:
    kinds = {"quality": "rating", "style": "choices"}
    results = [
        {"from_name": name, "type": kinds[name], "value": {kinds[name]: value}} for given in answers for name, value in given.items()
    ]
    return {"id": 7, "data": {"image": picture, "text": "a cat"}, "annotations": [{"was_cancelled": cancelled, "result": results}]}


def test_exports_of_label_studio(folder: Path) -> None:
    tasks = [
        label_studio("/data/upload/3/cb044c20-a.png", {"quality": 4, "style": ["photo"]}, {"quality": 1, "style": ["photo"]}),
        label_studio("/data/local-files/?d=sub%20dir/%C3%BC.png", {"quality": 5, "style": ["ink"]}),
        label_studio("/data/upload/3/cb044c20-b.png", {"quality": 5}, cancelled=True),
    ]
    path = write(folder / "x.json", json.dumps(tasks))
    images, [skipped] = read(path)
    assert [(image.name, image.score, image.prompt) for image in images] == [("a.png", 2.5, "a cat"), ("sub dir/ü.png", 5, "a cat")]
    assert "there is no 'score'" in skipped.reason
    assert [image.label for image in read(path, target="label")[0]] == ["photo", "ink"]
    assert [image.tags for image in read(path, target="tags")[0]] == [("photo",), ("ink",)]
    odd = [{"choices": [{"a": [1]}]}, {"rating": 10**400}, {"rating": [1]}, {"number": None}]
    tasks = [{"data": {"image": "a.png"}, "annotations": [{"result": [{"from_name": "x", "value": value}]}]} for value in odd]
    for target in ("score", "label", "tags"):
        images, skipped = read(write(folder / "odd.json", json.dumps(tasks)), target=target)
        assert len(images) <= 1 and len(images) + len(skipped) == len(odd)
    short = '[{"image": "/data/upload/cb044c20-a.png", "id": 1, "quality": [{"rating": 4}], "annotation_id": 7, "lead_time": 6.7}]'
    assert [image.score for image in read(write(folder / "min.json", short))[0]] == [4]
    table = 'annotation_id,id,image,lead_time,quality,style\n7,1,/data/upload/1/cb044c20-a.png,6.7,"[{""rating"": 4}]",ink\n'
    path = write(folder / "x.csv", table)
    assert [image.score for image in read(path)[0]] == [4]
    assert [image.score for image in read(path, score_column="quality")[0]] == [4]


def test_how_many_rows_were_used_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read(write(folder / "x.csv", "path,score\na.png,1\nb.png,bad\nnone.png,1\n"))
    assert f"{folder}/x.csv: used 1 of 3 rows" in caplog.text


def test_a_broken_header_is_one_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 1.*no names of columns"):
        read(write(folder / "x.csv", '"path"x,score\na.png,1\n'))


@pytest.mark.parametrize("name", ["../a.png", "sub dir/../../a.png", "x\\u0000.png", "\\ud800.png"])
def test_a_relative_path_stays_in_image_dir(folder: Path, name: str) -> None:
    images, skipped = read(write(folder / "sub dir" / "x.jsonl", f'{{"path": "{name}", "score": 1}}\n' + '{"a":' * 9000 + "\n"))
    assert images == [] and len(skipped) == 2
