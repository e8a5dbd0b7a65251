"""Options, recognition, reports and splits: what is the same for all readers."""

import logging
import re
import tomllib
from pathlib import Path

import pytest

from library.errors import UserError
from library.scorer_data.readers.base import READERS, TARGETS, ReaderOptions
from library.scorer_data.readers.recognition import read_records, recognise
from library.scorer_data.records import FilePicture, RatedImage, RatedPair, Skipped, SkipReport, name_fraction, split_of
from library.scorer_training.criteria.base import get_criterion
from tests.helpers.rated_files import read, write

# -- options -------------------------------------------------------------------------------------------------------------


def test_options_of_the_keys_of_a_dataset_toml() -> None:
    options = ReaderOptions.of({"score_column": "MOS", "score_range": [1, 10], "layout": "flat"}, target="score", image_dir=Path("x"))
    assert options == ReaderOptions(
        target="score", image_dir=Path("x"), score_column="MOS", score_range=(1.0, 10.0), extra={"layout": "flat"}
    )


@pytest.mark.parametrize(
    "keys", [{"score_range": [2, 1]}, {"score_range": 3}, {"score_range": [1, 2, 3]}, {"score_column": 3}, {"split": []}]
)
def test_values_of_the_wrong_kind(keys: dict) -> None:
    with pytest.raises(UserError, match="but it must be"):
        ReaderOptions.of(keys, target="score")


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_what_it_does_not_know_and_names_what_it_does(tmp_path: Path, reader: str) -> None:
    reads = []
    for target in TARGETS:
        try:
            read_records(tmp_path, reader, ReaderOptions(target=target, extra={"colour": "red"}))
        except UserError as error:
            refused_target = f"but {target} is to be learned" in str(error)
            if not refused_target:
                assert f"reader {reader!r} has no option 'colour'" in str(error) and "it has" in str(error)
                reads.append(target)
    assert reads


def test_a_near_name_is_offered_and_scores_belong_to_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "path,label,score\n")
    with pytest.raises(UserError, match="no option 'score_colum'.*did you mean 'score_column'"):
        read(path, score_colum="x")
    with pytest.raises(UserError, match="score_range is set .* but label is to be learned"):
        read(path, target="label", score_range=[1, 2])
    with pytest.raises(UserError, match="there is no reader 'csv'"):
        read_records(path, "csv")


DOCS = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")


def test_every_reader_is_in_the_docs_with_an_example_that_it_takes(tmp_path: Path) -> None:
    subsets = [
        (get_criterion(dataset["criterion"]).target, subset)
        for block in re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
        for dataset in tomllib.loads(block)["datasets"]
        for subset in dataset["subsets"]
    ]
    assert {subset["reader"] for _, subset in subsets if "reader" in subset} == set(READERS)
    assert sorted(re.findall(r"^### (\w+)$", DOCS, re.MULTILINE)) == sorted(READERS)
    for target, subset in subsets:
        keys = {key: value for key, value in subset.items() if key not in ("path", "reader", "image_dir", "num_repeats")}
        options = ReaderOptions.of(keys, target=target, image_dir=tmp_path)
        if subset.get("reader") in ("folders", "score_folders", "webdataset"):  # the pictures are in the source itself
            options = ReaderOptions.of(keys, target=target)
        with pytest.raises(UserError, match="there is|is not a folder|has no folders|none of the"):  # and not: there is no such option
            next(read_records(tmp_path / "none", subset.get("reader", "table"), options))


# -- recognition ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "reader"),
    [
        ("x.csv", "path,score\na,1\n", "table"),
        ("x.csv", "path_a,path_b,label\na,b,1\n", "pairs"),
        ("x.json", '[{"human_preference": [1, 0], "file_path": []}]', "hpdv2"),
        ("x.json", '[{"rank": [1, 0], "image_path": []}]', "hpdv2"),
        ("x.json", '{"id": "1", "rating": "s", "tags": []}', "danbooru"),
        ("x.jsonl", '{"path": "a", "score": 1}', "table"),
        ("x.jsonl", '{"data": {"image": "a.png"}, "annotations": []}', "table"),
        ("x.txt", "path\tscore\na\t1\n", "table"),
        ("folder/metadata.jsonl", '{"file_name": "a.png"}', "table"),
        ("folder/test/metadata.csv", "file_name,score\na.png,1\n", "table"),
        ("x.csv", "img_name,MOS,c1,c10\na,1,1,1\n", "ava"),
        ("x.txt", "1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n", "ava"),
        ("style_train.csv", "a,1\nb,1\n", "wikiart"),
        ("x.sqlite", "", "simulacra"),
        ("x.tar", "", "webdataset"),
        ("folder/AVA.txt", "", "ava"),
        ("folder/posts000000000000.json", "", "danbooru"),
        ("folder/metadata/posts000000000000.json", "", "danbooru"),
        ("folder/x-000.tar", "", "webdataset"),
        ("folder/style_train.csv", "", "wikiart"),
        ("folder/Ukiyo_e/1.jpg", "", "wikiart"),
        ("folder/cat/1.jpg", "", "folders"),
        ("folder/train/cat/1.jpg", "", "folders"),
        ("folder/01/1.jpg", "", "score_folders"),
        ("folder/train/-1.5/1.jpg", "", "score_folders"),
    ],
)
def test_sources_are_recognised(tmp_path: Path, name: str, text: str, reader: str) -> None:
    write(tmp_path / name, text)
    path = tmp_path / Path(name).parts[0]
    assert recognise(path) == reader


def test_what_is_not_recognised(tmp_path: Path) -> None:
    for path in (tmp_path, write(tmp_path / "x.txt", "one two"), write(tmp_path / "x.xml", "")):
        with pytest.raises(
            UserError, match=r"it does not show what .* is; give .* set data_reader \(reader in a dataset.toml\) to one of ava, dan"
        ):
            recognise(path)
    write(tmp_path / "both" / "ratings.csv", "path,score\n")
    with pytest.raises(UserError, match=r"give one of its tables \(.*ratings.csv\)"):  # beside the pictures, in the folder that was given
        recognise(tmp_path / "both")
    with pytest.raises(UserError, match="there is nothing to read at"):
        recognise(tmp_path / "none.csv")


# -- reports -------------------------------------------------------------------------------------------------------------


def test_a_report_counts_by_kind_and_shows_the_first_examples(caplog: pytest.LogCaptureFixture) -> None:
    report = SkipReport()
    assert len(report) == 0 and report.first() == ""
    for number in range(5):
        report.add(Skipped(f"line {number}: it is late", "it is late"))
    report.add(Skipped("posts: deleted", "deleted", 1200))
    report.add(Skipped("no kind"))
    assert len(report) == 1206 and report.counts == {"deleted": 1200, "it is late": 5, "other": 1}
    assert str(report).splitlines() == [
        "left out: 1,206",
        "  1,200: deleted",
        "    posts: deleted",
        "  5: it is late",
        *(f"    line {number}: it is late" for number in range(3)),
        "  1: other",
        "    no kind",
    ]
    assert report.first() == "posts: deleted"
    with caplog.at_level(logging.WARNING):
        SkipReport().log(logging.getLogger("test"))
        assert caplog.text == ""
        report.log(logging.getLogger("test"))
    assert "1,200: deleted" in caplog.text


# -- splits --------------------------------------------------------------------------------------------------------------


def rated(name: str, split: str | None = None) -> RatedImage:
    return RatedImage(picture=FilePicture(f"/{name}"), name=name, where="", score=0.0, split=split)


def splits(images: list[RatedImage], share: float) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for image in images:
        found[split_of(image, share)].add(image.name)
    return found


def test_split_is_by_name_and_old_pictures_stay_where_they_were() -> None:
    images = [rated(f"{index}.png") for index in range(2000)]
    parts, fewer = splits(images, 0.1), splits(images[::-1][:1000], 0.1)
    assert 150 < len(parts["val"]) < 250 and not parts["test"]
    assert fewer["val"] <= parts["val"] and fewer["train"] <= parts["train"]
    assert name_fraction("0.png") == pytest.approx(0.059171, abs=1e-6)  # for ever: a split must outlive this version


def test_a_split_column_wins() -> None:
    images = [rated("a", "val"), rated("b", "train"), rated("c", "test"), rated("d")]
    assert splits(images, 1e-9) == {"train": {"b", "d"}, "val": {"a"}, "test": {"c"}}
    assert splits(images, 1 - 1e-9) == {"train": {"b"}, "val": {"a", "d"}, "test": {"c"}}


def test_pairs_of_one_prompt_stay_together() -> None:
    pictures = FilePicture("/a"), FilePicture("/b")
    pairs = [
        RatedPair(first=pictures[0], second=pictures[1], name=str(number), where="", preference=1.0, prompt=prompt)
        for prompt in ("a cat", "a dog", "a fish", "")
        for number in range(50)
    ]
    splits = {prompt: {split_of(pair, 0.5) for pair in pairs if pair.prompt == prompt} for prompt in ("a cat", "a dog", "a fish", "")}
    assert [len(splits[prompt]) for prompt in ("a cat", "a dog", "a fish", "")] == [1, 1, 1, 2]
    assert split_of(pairs[0], 0.5) == ("val" if name_fraction("a cat") < 0.5 else "train")
