"""AVA as it is handed out, and pyiqa's table of it."""

from pathlib import Path

import pytest

from library.errors import UserError
from tests.helpers.rated_files import add_pictures, counts, read, write

# The first lines of AVA.txt are of this form: index, image, ten counts, two tags, contest.
AVA = """\
1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396
2 953958 10 7 15 26 26 21 10 8 1 2 1 21 1396
3 954184 0 0 4 8 41 56 10 3 4 0 0 0 1396
4 954113 0 1 4 6 48 37 23 5 2 2 15 15 1396
"""


@pytest.fixture
def ava(tmp_path: Path) -> Path:
    add_pictures(tmp_path / "images", ["953619.jpg", "953958.jpg", "954184.jpg"])
    write(tmp_path / "tags.txt", "1 Abstract\n15 Nature\n21 Black and White\n22 Macro\n")
    return write(tmp_path / "AVA.txt", AVA)


def test_votes_scores_and_tags(ava: Path) -> None:
    images, skipped = read(ava)
    assert [image.name for image in images] == ["953619.jpg", "953958.jpg", "954184.jpg"]
    assert images[0].votes == (0, 1, 5, 17, 38, 36, 15, 6, 5, 1)
    assert images[0].score == pytest.approx((1 * 2 + 5 * 3 + 17 * 4 + 38 * 5 + 36 * 6 + 15 * 7 + 6 * 8 + 5 * 9 + 1 * 10) / 124)
    assert [image.tags for image in images] == [("Abstract", "Macro"), ("Abstract", "Black and White"), ()]
    assert [image.split for image in images] == [None, None, None]
    assert counts(skipped) == {"picture is missing": 1} and "line 4: there is no picture" in skipped[0].reason
    assert [image.where for image in read(ava.parent)[0]] == [image.where for image in images]  # the folder will do
    (ava.parent / "tags.txt").unlink()
    assert read(ava)[0][0].tags == ("1", "22")


def test_only_the_official_test_pictures_are_for_testing(ava: Path) -> None:
    lists = ava.parent / "aesthetics_image_lists"
    write(lists / "generic_test.jpgl", "953958\n")
    assert [image.split for image in read(ava)[0]] == [None, "test", None]
    assert [image.split for image in read(ava, split="none")[0]] == [None, None, None]
    write(lists / "generic_ls_train.jpgl", "953619\n1\n")
    images, skipped = read(ava, split="generic_ls")
    assert [(image.name, image.split) for image in images] == [("953619.jpg", None), ("953958.jpg", "test")]
    assert counts(skipped) == {"picture is not in the split": 2}
    write(lists / "animal_train.jpgl", "954184\n")
    write(lists / "animal_test.jpgl", "953619\n")
    animals, _ = read(ava, split="animal")
    assert [(image.name, image.split) for image in animals] == [("953619.jpg", "test"), ("954184.jpg", None)]
    with pytest.raises(UserError, match="there is no list generic_ss_train.jpgl"):
        read(ava, split="generic_ss")


def test_bad_lines_and_scores_out_of_range(ava: Path) -> None:
    bad = "5 953619 0 0\n6 x 1 1 1 1 1 1 1 1 1 1 0 0 1\n7 954184 0 0 0 0 0 0 0 0 0 0 0 0 1\n8 954184 1 1 1 1 1 1 1 1 1 x 0 0 1\n\n"
    _, skipped = read(write(ava, bad), "ava")
    assert [record.kind for record in skipped] == [
        "line is not one of AVA.txt",
        "line is not one of AVA.txt",
        "votes are negative or none",
        "a count of votes is not a finite number",
    ]
    images, skipped = read(write(ava, AVA), score_range=[5.5, 10])
    assert [image.name for image in images] == ["953619.jpg", "954184.jpg"]
    assert counts(skipped) == {"score is outside score_range": 1, "picture is missing": 1}


def test_the_table_that_pyiqa_makes(tmp_path: Path) -> None:
    header = (
        "img_name,MOS," + ",".join(f"c{rating}" for rating in range(1, 11)) + ",semantic_tag1,semantic_tag2,official split,ILGnet split\n"
    )
    rows = "1.jpg,5.4,0,1,5,17,38,36,15,6,5,1,1,22,0,2\n2.jpg,4.7,10,7,15,26,26,21,10,8,1,2,0,0,2,0\n3.jpg,5,1,0,0,0,0,0,0,0,0,0,0,0,1,2\n"
    add_pictures(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    path = write(tmp_path / "meta_info_AVADataset.csv", header + rows)
    images, skipped = read(path, target="votes")
    assert images[0].votes == (0, 1, 5, 17, 38, 36, 15, 6, 5, 1) and skipped == []
    assert images[0].score == pytest.approx(5.6371, abs=1e-4)  # from the votes: MOS is rounded
    assert [image.split for image in images] == [None, "test", "val"]
    assert [image.split for image in read(path, split="ilgnet")[0]] == ["test", None, "test"]
    assert [image.tags for image in images] == [("1", "22"), (), ()]
    with pytest.raises(UserError, match="it can be official, ilgnet or none"):
        read(path, split="generic_ls")
