"""Danbooru's metadata: both generations of JSON, and parquet."""

import datetime
import json
import logging
import math
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from library.errors import UserError
from library.scorer_data.readers.danbooru_popularity import SMALLEST_BIN, PopularityModel, log_popularity
from tests.helpers.rated_files import add_pictures, counts, read, write


def old_post(number: int, **changes: Any) -> dict[str, Any]:
    """As in Danbooru2017 to 2020: numbers are text."""
    post = {
        "id": str(number),
        "created_at": "2017-11-25 08:15:55.85054 UTC",
        "updated_at": "2018-01-01 00:00:00 UTC",
        "score": "5",
        "up_score": "7",
        "down_score": "-2",
        "favs": ["11", "12", "13"],
        "rating": "s",
        "file_ext": "jpg",
        "is_deleted": False,
        "is_banned": False,
        "is_pending": False,
        "tags": [
            {"id": "1", "name": "1girl", "category": "0"},
            {"id": "2", "name": "hatsune_miku", "category": "4"},
            {"id": "3", "name": "vocaloid", "category": "3"},
        ],
    }
    return post | changes


def new_post(number: int, **changes: Any) -> dict[str, Any]:
    """As in Danbooru2021 and what the site gives since."""
    post = {
        "id": number,
        "created_at": "2023-05-24T12:35:31.000+09:00",
        "updated_at": "2023-06-01T00:00:00.000+09:00",
        "score": 5,
        "up_score": 7,
        "down_score": -2,
        "fav_count": 9,
        "rating": "g",
        "file_ext": "png",
        "is_deleted": False,
        "is_banned": False,
        "is_pending": False,
        "tag_string": "1girl hatsune_miku solo vocaloid",
        "tag_string_general": "1girl solo",
        "tag_string_character": "hatsune_miku",
        "tag_string_copyright": "vocaloid",
        "tag_string_artist": "",
        "tag_string_meta": "highres",
    }
    return post | changes


def write_posts(path: Path, posts: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(post) + "\n" for post in posts))


@pytest.mark.parametrize("post", [old_post, new_post])
def test_both_generations_say_the_same(tmp_path: Path, post: Any) -> None:
    suffix = post(1)["file_ext"]
    add_pictures(tmp_path, [f"original/0567/1234567.{suffix}", f"original/0008/8.{suffix}"])
    path = write_posts(tmp_path / "metadata" / "posts000000000000.json", [post(1234567), post(8, score="-3" if post is old_post else -3)])
    images, skipped = read(tmp_path, age_correction=False)
    assert [(image.name, image.score) for image in images] == [(f"original/0567/1234567.{suffix}", 5), (f"original/0008/8.{suffix}", -3)]
    assert skipped == [] and images[0].where == f"{path}, line 1"
    [favourites, _], _ = read(path, image_dir=tmp_path, score_column="fav_count", age_correction=False)
    assert favourites.score == (3 if post is old_post else 9)
    general, character = (
        read(tmp_path, target="tags", tags=categories)[0][0].tags for categories in ("general", ["character", "copyright"])
    )
    assert general is not None and general[0] == "1girl" and character == ("hatsune_miku", "vocaloid")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("original", "original/0123/5123.png"),
        ("512px", "512px/0123/5123.jpg"),
        ("buckets", "0123/5123.png"),
        ("flat", "5123.png"),
        ("flat", "5123.webp"),
    ],
)
def test_pictures_are_found_in_every_layout(tmp_path: Path, layout: str, name: str) -> None:
    add_pictures(tmp_path, [name])
    posts = write_posts(tmp_path / "posts.json", [new_post(5123)])
    for choice in (layout, "auto"):
        images, _ = read(posts, target="label", layout=choice)
        assert [image.name for image in images] == [name]
    other = "flat" if layout != "flat" else "original"
    images, [skipped] = read(posts, target="label", layout=other)
    assert images == [] and skipped.kind == "picture is missing"


def test_what_is_left_out_is_reported_by_its_number(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["1.png", "9.png"])
    posts = [
        new_post(1),
        new_post(2, is_deleted=True),
        old_post(3, is_deleted="true"),
        new_post(4, is_banned=True),
        new_post(5, is_pending=True),
        new_post(6, file_ext="mp4"),
        new_post(7, file_ext="zip"),
        new_post(8, file_ext="swf"),
        new_post(9, score=None),
        new_post(10),
        new_post(11),
        new_post(1),
        new_post(9, id="x"),
    ]
    images, skipped = read(write_posts(tmp_path / "posts.json", posts), age_correction=False)
    assert [image.name for image in images] == ["1.png"]
    assert counts(skipped) == {
        "post is deleted": 2,
        "post is banned": 1,
        "post is pending": 1,
        "post is no picture": 3,
        "score is not a finite number": 1,
        "picture is missing": 2,
        "picture is listed twice": 1,
        "id is not a finite number": 1,
    }
    assert any("line 10" in record.reason for record in skipped)


def test_what_s_means_goes_by_the_dump(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_pictures(tmp_path, [f"{number}.png" for number in range(1, 5)])
    ratings = ["s", "q", "e"]
    old = write_posts(
        tmp_path / "old.jsonl", [new_post(n, rating=r, created_at="2019-01-01", updated_at="2021-12-31") for n, r in enumerate(ratings, 1)]
    )
    late = write_posts(tmp_path / "late.jsonl", [new_post(n, rating=r, created_at="2019-01-01") for n, r in enumerate(ratings, 1)])
    new = write_posts(tmp_path / "new.jsonl", [new_post(n, rating=r, updated_at=None) for n, r in enumerate([*ratings, "g"], 1)])
    with caplog.at_level(logging.INFO):
        assert [image.label for image in read(old, target="label")[0]] == ["safe", "questionable", "explicit"]
    assert "rating s means safe" in caplog.text
    assert [image.label for image in read(late, target="label")[0]] == ["sensitive", "questionable", "explicit"]
    assert [image.label for image in read(new, target="label")[0]] == ["sensitive", "questionable", "explicit", "general"]
    images, skipped = read(new, target="label", ratings="old")
    assert [image.label for image in images] == ["safe", "questionable", "explicit"] and counts(skipped) == {"rating is unknown": 1}
    assert read(old, target="label", ratings="new")[0][0].label == "sensitive"


def test_parquet_and_several_shards(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["1.png", "2.jpg", "3.webp"])
    created = datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)
    posts = [new_post(number, created_at=created, media_asset={"file_ext": ext}) for number, ext in ((1, "png"), (2, "mp4"), (3, "png"))]
    for post in posts:
        del post["file_ext"], post["is_deleted"], post["is_banned"], post["is_pending"]
    parquet.write_table(pyarrow.Table.from_pylist(posts[:2]), tmp_path / "0000.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(posts[2:]), tmp_path / "0001.parquet")
    write(tmp_path / "notes.txt", "not read")
    images, skipped = read(tmp_path, age_correction=True)
    assert [image.name for image in images] == ["1.png", "3.webp"] and [image.score for image in images] == [0, 0]
    assert counts(skipped) == {"post is no picture": 1}


def test_only_shards_of_posts_are_read(tmp_path: Path) -> None:
    add_pictures(tmp_path, ["1.png", "2.png"])
    for number in (1, 2):
        write_posts(tmp_path / "metadata" / f"posts00000000000{number}.json", [new_post(number)])
    write_posts(tmp_path / "metadata" / "tags000000000000.json", [{"id": 1, "name": "1girl"}])
    images, skipped = read(tmp_path, target="label")
    assert len(images) == 2 and skipped == []


# -- popularity ----------------------------------------------------------------------------------------------------------


def test_the_correction_takes_age_and_rating_out_and_leaves_quality(tmp_path: Path) -> None:
    """Votes are exp(quality + a trend over 4000 days + 1 if explicit): what is left is quality."""
    generator = torch.Generator().manual_seed(0)
    count = 12_000
    days = torch.randint(0, 4000, (count,), generator=generator)
    explicit = torch.rand(count, generator=generator) < 0.5
    quality = torch.randn(count, generator=generator)
    votes = torch.exp(0.5 * quality + 2 + 3 * days / 4000 + explicit)
    model = PopularityModel()
    posts = [
        (vote, day, "e" if is_explicit else "g")
        for vote, day, is_explicit in zip(votes.tolist(), days.tolist(), explicit.tolist(), strict=True)
    ]
    for post in posts:
        model.add(*post)
    model.fit()
    scores = torch.tensor([model.score(*post) for post in posts])

    def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([first.float(), second.float()]))[0, 1])

    assert correlation(votes.log(), days) > 0.75 and abs(correlation(scores, days)) < 0.02
    assert abs(correlation(scores, explicit)) < 0.02
    assert correlation(scores, quality) > 0.98 > 0.6 > correlation(votes.log(), quality)
    assert abs(float(scores.mean())) < 1e-3 and abs(float(scores.std()) - 1) < 1e-2


def test_spans_hold_enough_posts_and_are_as_short_as_they_can_be() -> None:
    model = PopularityModel()
    for day in range(10):
        for post in range(SMALLEST_BIN if day >= 7 else SMALLEST_BIN // 5):  # days 0 to 6 hold 1.4 spans' worth
            model.add(math.expm1(day + (post % 2)), day, "g")
    model.fit()
    for day in (7, 8, 9):  # a span each: votes of y = day and y = day + 1, half of each
        assert model.score(math.expm1(day), day, "g") == pytest.approx(-1) and model.score(math.expm1(day + 1), day, "g") == pytest.approx(
            1
        )
    together = [value for day in range(7) for value in (day, day + 1)]
    mean = sum(together) / len(together)
    spread = math.sqrt(sum((value - mean) ** 2 for value in together) / len(together))
    assert model.score(math.expm1(3), 0, "g") == pytest.approx((3 - mean) / spread)
    assert model.score(math.expm1(3), -100, "g") == model.score(math.expm1(3), 6, "g")


def test_posts_that_are_alike_score_0_and_votes_may_be_negative() -> None:
    model = PopularityModel()
    for _ in range(3):
        model.add(7, 0, "s")
    model.fit()
    assert model.score(7, 0, "s") == 0
    assert log_popularity(-3) == -math.log(4) and log_popularity(0) == 0


def test_popularity_is_corrected_by_default(tmp_path: Path) -> None:
    add_pictures(tmp_path, [f"{number}.png" for number in range(1, 5)])
    posts = [new_post(number, score=votes) for number, votes in enumerate([0, 2, 26, 8], start=1)]
    posts += [new_post(5, score=10**6, is_deleted=True), new_post(3, id=6, created_at="?", score=8)]
    images, skipped = read(write_posts(tmp_path / "posts.json", posts))
    values = torch.log1p(torch.tensor([0.0, 2, 26, 8], dtype=torch.float64))
    expected = (values - values.mean()) / values.std(correction=0)
    assert [image.score for image in images] == pytest.approx(expected.tolist())
    assert counts(skipped) == {"post is deleted": 1, "created_at is no date": 1}


def test_bad_options(tmp_path: Path) -> None:
    posts = write_posts(tmp_path / "posts.json", [new_post(1)])
    with pytest.raises(UserError, match="tags of reader 'danbooru' has 'species'; it can have general, artist"):
        read(posts, target="tags", tags=["species"])
    with pytest.raises(UserError, match="layout of reader 'danbooru' is 'deep'; it can be 'auto' or 'original'"):
        read(posts, layout="deep")
    with pytest.raises(UserError, match="age_correction of reader 'danbooru' is 'no'; it can be true or false"):
        read(posts, age_correction="no")
