"""Tables of one's own: what people's files look like, and what is said about the bad rows."""

import json
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
        ("x.csv", "path,rating\na.png,1\n", "has no column 'score' or 'votes' or 'votes_1'; it has path, rating"),
        ("x.txt", "path,score\na.png,1\n", "ends in '.txt'; it can be .csv, .tsv, .jsonl, .ndjson, .json, .parquet"),
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
        ("path;score\na.png;7,5\nb.png;-0,25\n", [7.5, -0.25]),
        ("sep=;\npath;score\na.png;7\n", [7.0]),
        ("path\tscore\na.png\t7.5\n", [7.5]),
        ("path,score\ra.png,1\rb.png,2\r", [1.0, 2.0]),
    ],
)
def test_what_spreadsheets_write(folder: Path, text: str, scores: list[float]) -> None:
    images, skipped = read(write(folder / "x.csv", text))
    assert [image.score for image in images] == scores and skipped == []


def test_a_quote_that_never_closes_is_named_by_the_line_that_opens_it(folder: Path) -> None:
    images, (skipped,) = read(write(folder / "x.csv", 'path,score,prompt\na.png,1,x\nb.png,2,"open\n' + "c.png,3,x\n" * 9))
    assert len(images) == 1 and "line 3 to 12" in skipped.reason and skipped.count == 10


def test_a_broken_header_is_one_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 1.*no names of columns"):
        read(write(folder / "x.csv", '"path"x,score\na.png,1\n'))


@pytest.mark.parametrize("name", ["../a.png", "sub dir/../../a.png", "x\\u0000.png", "\\ud800.png"])
def test_a_relative_path_stays_in_image_dir(folder: Path, name: str) -> None:
    images, skipped = read(write(folder / "sub dir" / "x.jsonl", f'{{"path": "{name}", "score": 1}}\n' + '{"a":' * 9000 + "\n"))
    assert images == [] and len(skipped) == 2
