"""Sources that are one file with everything in it: the sqlite of Simulacra, and the tars of WebDataset."""

import io
import json
import sqlite3
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.scorer_data.records import SlicePicture
from tests.helpers.rated_files import add_pictures, counts, read, write

TABLES = """
    CREATE TABLE generations (id INTEGER PRIMARY KEY, prompt TEXT, method TEXT, verified INTEGER);
    CREATE TABLE images (id INTEGER PRIMARY KEY, gid INTEGER, idx INTEGER);
    CREATE TABLE ratings (sid INTEGER, iid INTEGER, rating INTEGER, verified INTEGER);
    CREATE TABLE paths (iid INTEGER, path TEXT);
    INSERT INTO generations VALUES (1, 'a cat', 'x', 1), (2, NULL, 'x', 1);
    INSERT INTO images VALUES (1, 1, 0), (2, 1, 1), (3, 2, 0), (4, 2, 1), (5, 2, 2);
    INSERT INTO ratings VALUES (1, 1, 4, 1), (2, 1, 9, 1), (3, 1, 9, 1), (1, 3, 10, 1), (1, 4, 11, 1), (1, 5, 2, 1);
    INSERT INTO paths VALUES (1, 'sac/a 1.png'), (1, 'sac/a 1 again.png'), (2, 'unrated.png');
    INSERT INTO paths VALUES (3, 'sac\\b.png'), (4, 'c.png'), (5, 'gone.png');
"""


@pytest.fixture
def simulacra(tmp_path: Path) -> Path:
    add_pictures(tmp_path, ["sac/a 1.png", "sac/a 1 again.png", "sac/b.png", "c.png"])
    path = tmp_path / "sac public #1?.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(TABLES)
    database.close()
    return path


def test_simulacra(simulacra: Path) -> None:
    (first, second), skipped = read(simulacra)
    assert first.score == pytest.approx((4 + 9 + 9) / 3) and first.votes == (0, 0, 0, 1, 0, 0, 0, 0, 2, 0)  # two paths do not count twice
    assert (first.prompt, second.prompt, second.score, second.name) == ("a cat", "", 10, "sac/b.png")
    assert [record.kind for record in skipped] == ["votes are negative or none", "picture is missing"]
    assert "image 4" in skipped[0].reason


def test_what_is_not_simulacra(simulacra: Path) -> None:
    with pytest.raises(UserError, match="is not the sqlite file of Simulacra"):
        read(write(simulacra.parent / "x.sqlite", "no database, but text that is longer than the header of one" * 20))
    with sqlite3.connect(simulacra.parent / "y.db") as database:
        database.execute("CREATE TABLE images (id)")
    database.close()
    with pytest.raises(UserError, match="no such table"):
        read(simulacra.parent / "y.db")
    with pytest.raises(UserError, match="there is no sqlite file"):
        read(simulacra.parent / "none.sqlite", "simulacra")


# -- WebDataset ----------------------------------------------------------------------------------------------------------


def encoded(grey: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, grey: int, values: object, **texts: str) -> list[tuple[str, bytes]]:
    json_file = json.dumps(values).encode()
    return [(f"{key}.png", encoded(grey)), (f"{key}.json", json_file), *((f"{key}.{name}", text.encode()) for name, text in texts.items())]


def test_samples_of_several_shards(tmp_path: Path) -> None:
    deep = "d" * 150 + "/ü 3"  # longer than a tar's header has room for
    write_tar(
        tmp_path / "x-000000.tar",
        [*sample("1", 10, {"score": 1.5, "prompt": "in json"}), *sample("2", 20, {"score": "2"}, txt=" in txt\n")],
    )
    write_tar(tmp_path / "x-000001.tar", [*sample(deep, 30, {"score": 3, "split": "val", "weight": 2}), ("4.jpg", encoded(40, "JPEG"))])
    images, [skipped] = read(tmp_path)
    assert [(image.score, image.prompt) for image in images] == [(1.5, "in json"), (2, "in txt"), (3, "")]
    assert (images[2].split, images[2].weight) == ("val", 2)
    assert images[2].name == f"x-000001.tar/{deep}.png" and "sample 4: score None is not a finite number" in skipped.reason
    for image, grey in zip(images, (10, 20, 30), strict=True):
        assert isinstance(image.picture, SlicePicture) and Image.open(image.picture.open()).getpixel((0, 0)) == (grey,) * 3
    for pattern in ("x-*.tar", "x-{000000..000001}.tar"):
        assert [image.picture for image in read(tmp_path / pattern)[0]] == [image.picture for image in images]
    assert len(read(tmp_path / "x-000000.tar")[0]) == 2


def test_labels_nested_fields_and_suffixes_of_several_parts(tmp_path: Path) -> None:
    members = [
        ("a.JPG", encoded(1, "JPEG")),
        ("a.cls", b"7\n"),
        ("a.seg.png", encoded(2)),
        *sample("b", 3, {"label": "cat", "ratings": {"mean": 4.5}, "tags": ["x", "y"]}),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    images, skipped = read(path, target="label")
    assert [(image.label, image.name) for image in images] == [("7", "x.tar/a.JPG"), ("cat", "x.tar/b.png")] and skipped == []
    assert read(path, score_column="ratings.mean")[0][0].score == 4.5
    assert [image.tags for image in read(path, target="tags")[0]] == [("x", "y")]


def test_bad_samples_and_shards_do_not_end_it(tmp_path: Path) -> None:
    good = sample("z", 9, {"score": 1})
    members = [("a.json", b"{}"), ("b.png", encoded(1)), ("b.json", b"{no"), ("c.png", encoded(1)), ("c.json", b"[1]"), *good]
    write_tar(tmp_path / "x-0.tar", members)
    write_tar(tmp_path / "x-1.tar", good, "w:gz")
    whole = write_tar(tmp_path / "x-2.tar", [*good, *sample("y", 9, {"score": 1})]).read_bytes()
    (tmp_path / "x-2.tar").write_bytes(whole[:2700])  # within the picture of the second sample
    images, skipped = read(tmp_path / "x-{0..3}.tar")
    assert [image.name for image in images] == ["x-0.tar/z.png", "x-2.tar/z.png"]
    assert counts(skipped) == {
        "sample has no picture": 1,
        "sample's text cannot be read": 1,
        "sample's .json is no object": 1,
        "shard cannot be read": 2,
        "shard is missing": 1,
    }
    for missing in ("y-{0..3}.tar", "y-*.tar", "y.tar"):
        with pytest.raises(UserError, match="there is n"):
            read(tmp_path / missing)


def test_the_members_of_a_shard_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", [member for number in range(30) for member in sample(str(number), number, {"score": number})])
    opened: list[tarfile.TarFile] = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *arguments: opened.append(original(*arguments)) or opened[-1])
    images, _ = read(path)
    assert [image.score for image in images] == list(range(30))
    assert len(opened) == 1 and len(opened[0].members) <= 1  # pyright: ignore[reportAttributeAccessIssue]
