"""Manifests, pictures and buckets: what people's files look like, and what is said about the bad ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.scorer_data.buckets import BucketConfig, bucket_sizes, choose_bucket
from library.scorer_data.manifest import RatedImage, name_fraction, read_manifest, split_images
from library.scorer_data.pictures import cover, picture_size, read_picture, to_pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub dir").mkdir()
    for name in ("a.png", "b.png", "sub dir/ü.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- manifests -----------------------------------------------------------------------------------------------------------

CSV = 'path,score,prompt,weight,split\na.png,1.5,"a cat, sitting",2,train\nsub dir\\ü.png, -3 ,,,VAL\n'
TSV = "Path\tScore\textra\na.png\t1.5\tx\nsub dir/ü.png\t-3\ty\n"
JSONL = '{"path": "a.png", "score": 1.5}\n\n{"path": "sub dir/ü.png", "score": "-3", "prompt": null}\n'


@pytest.mark.parametrize(("name", "text"), [("x.csv", CSV), ("x.tsv", TSV), ("x.jsonl", JSONL), ("x.CSV", "\ufeff" + CSV)])
def test_every_format_reads_paths_and_scores(folder: Path, name: str, text: str) -> None:
    images = read_manifest(write(folder, name, text)).images
    assert [image.score for image in images] == [1.5, -3.0]
    assert [image.path for image in images] == [folder / "a.png", folder / "sub dir" / "ü.png"]
    assert images[1].name == "sub dir/ü.png"


def test_optional_columns(folder: Path) -> None:
    first, second = read_manifest(write(folder, "x.csv", CSV)).images
    assert (first.prompt, first.weight, first.split) == ("a cat, sitting", 2.0, "train")
    assert (second.prompt, second.weight, second.split) == ("", 1.0, "val")


def test_paths_are_relative_to_image_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), "x.csv", "path,score\na.png,1\n")
    assert read_manifest(elsewhere, folder).images[0].path == folder / "a.png"
    with pytest.raises(UserError, match="there is no picture"):
        read_manifest(elsewhere)


def test_labels(folder: Path) -> None:
    path = write(folder, "x.csv", "path,label\na.png,cat\nb.png,7\n")
    images = read_manifest(path, target="label").images
    assert [image.label for image in images] == ["cat", "7"] and images[0].score is None


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("x.csv", "", "is empty"),
        ("x.csv", "path,score\n", "lists no pictures"),
        ("x.jsonl", "\n", "lists no pictures"),
        ("x.csv", "path,rating\na.png,1\n", "line 1: there is no column 'score'; it has path, rating"),
        ("x.jsonl", '{"path": "a.png"}\n', "line 1: there is no column 'score'"),
        ("x.csv", "path,score\na.png,1\nb.png,good\n", "line 3: score 'good' is not a finite number"),
        ("x.csv", "path,score\na.png,NaN\n", "line 2: score 'NaN'"),
        ("x.csv", "path,score\na.png,1e999\n", "line 2: score '1e999'"),
        ("x.csv", "path,score\na.png,\n", "line 2: score ''"),
        ("x.jsonl", '{"path": "a.png", "score": true}\n', "line 1: score True"),
        ("x.jsonl", '{"path": "a.png", "score": [1]}\n', r"line 1: score \[1\]"),
        ("x.jsonl", '{"path": "a.png", "score": 1}\n{"path":\n', "line 2: this is not JSON"),
        ("x.jsonl", "[1]\n", "line 1: this is no JSON object"),
        ("x.csv", "path,score\n,1\n", "line 2: the path is empty"),
        ("x.csv", "path,score\na.png,1,2\n", "line 2: line 1 has 2 columns"),
        ("x.csv", "path,score\na.png\n", "line 2: line 1 has 2 columns"),
        ("x.csv", 'path,score\n"a.png,1\n', "cannot be read as .csv"),
        ("x.csv", "path,score,weight\na.png,1,0\n", "line 2: weight 0 is not above 0"),
        ("x.csv", "path,score,split\na.png,1,dev\n", "line 2: split 'dev' is not one of train, val, test"),
        ("x.csv", "path,score\na.png,1\nnone.png,2\n", "line 3: there is no picture"),
        ("x.csv", "path,score\na.png,1\nb.png,1\nsub dir/../a.png,2\n", "line 4: picture sub dir/../a.png is on line 2 already"),
        ("x.txt", "path,score\na.png,1\n", "ends in '.txt'; it can be .csv, .tsv, .jsonl"),
    ],
)
def test_a_bad_manifest_is_refused_in_one_sentence_with_its_line(folder: Path, name: str, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        read_manifest(write(folder, name, text))
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_encoding(folder: Path) -> None:
    with pytest.raises(UserError, match="there is no data file"):
        read_manifest(folder / "none.csv")
    with pytest.raises(UserError, match="is not a folder"):
        read_manifest(write(folder, "x.csv", CSV), folder / "none")
    (folder / "latin.csv").write_bytes("path,score\nü.png,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_manifest(folder / "latin.csv")


def test_bad_rows_can_be_left_out_but_bad_scores_cannot(folder: Path) -> None:
    text = "path,score\na.png,1\nnone.png,2\na.png,3\nb.png,4\n"
    manifest = read_manifest(write(folder, "x.csv", text), skip_bad_images=True)
    assert [image.name for image in manifest.images] == ["a.png", "b.png"]
    assert len(manifest.skipped) == 2 and "line 3" in manifest.skipped[0] and "line 4" in manifest.skipped[1]
    with pytest.raises(UserError, match="score 'x'"):
        read_manifest(write(folder, "y.csv", "path,score\na.png,x\n"), skip_bad_images=True)


def rated(name: str, split: str | None = None) -> RatedImage:
    return RatedImage(path=Path("/") / name, name=name, line=1, score=0.0, split=split)


def test_split_is_by_name_and_the_splits_share_nothing() -> None:
    images = [rated(f"{index}.png") for index in range(2000)]
    train, validation = split_images(images, 0.1)
    assert len(train) + len(validation) == 2000 and 150 < len(validation) < 250
    fewer_train, fewer_validation = split_images(images[::-1][:1000], 0.1)
    assert set(fewer_validation) <= set(validation) and set(fewer_train) <= set(train)
    assert name_fraction("0.png") == pytest.approx(0.059171, abs=1e-6)  # for ever: a split must outlive this version


def test_a_split_column_wins_and_test_rows_are_in_neither() -> None:
    images = [rated("a", "val"), rated("b", "train"), rated("c", "test"), rated("d")]
    assert [[image.name for image in part] for part in split_images(images, 1e-9)] == [["b", "d"], ["a"]]
    assert [[image.name for image in part] for part in split_images(images, 1 - 1e-9)] == [["b"], ["a", "d"]]


# -- pictures ------------------------------------------------------------------------------------------------------------


def pixel(picture: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = picture.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_exif_rotation(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == (10, 20) == read_picture(tmp_path / "turned.jpg").size


def test_transparency_is_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixel(read_picture(tmp_path / "clear.png")) == (255, 255, 255)
    assert pixel(read_picture(tmp_path / "half.png")) == (255, 127, 127)
    assert pixel(read_picture(tmp_path / "grey.png")) == (255, 255, 255)
    assert pixel(read_picture(tmp_path / "palette.png")) == (255, 255, 255)


def test_sixteen_bits_and_cmyk_and_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "sixteen.png")
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "sixteen.tif")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert pixel(read_picture(tmp_path / "sixteen.png")) == (128, 128, 128)
    assert pixel(read_picture(tmp_path / "sixteen.tif")) == (128, 128, 128)
    assert pixel(read_picture(tmp_path / "cmyk.tif")) == (255, 0, 0)
    assert pixel(read_picture(tmp_path / "grey.png")) == (77, 77, 77)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel(read_picture(tmp_path / "moving.gif")) == (0, 255, 0)


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_broken_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is None:  # cut short
        noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        read_picture(path)


def test_cover_keeps_proportions_and_the_middle() -> None:
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))  # a white square in the middle
    assert np.asarray(cover(picture, (64, 64))).min() > 250 - 60  # the square, with the resampling's ringing at its edges
    wide = np.asarray(cover(picture, (96, 32)))[16, :, 0] > 127
    assert wide.sum() == 32 and wide[32:64].all()


def test_pixels_are_in_minus_one_to_one() -> None:
    pixels = to_pixels([Image.new("RGB", (6, 4), (0, 255, 51))])
    assert pixels.shape == (1, 3, 4, 6)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


# -- buckets -------------------------------------------------------------------------------------------------------------


def test_bucket_sizes_are_those_of_sd_scripts() -> None:
    """sd-scripts' make_bucket_resolutions(512, 512, 256..1024, 64), as its README of the aspect-ratio buckets lists them."""
    expected = {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512)}
    found = set(bucket_sizes(BucketConfig()))
    assert expected <= found and found == {size[::-1] for size in found}
    assert all(width * height <= 512 * 512 and width % 64 == height % 64 == 0 for width, height in found)


@pytest.mark.parametrize("ratio", np.geomspace(1 / 3.9, 3.9, 41))
def test_a_picture_is_hardly_cropped(ratio: float) -> None:
    config = BucketConfig(resolution="1024", min_bucket_reso=256, max_bucket_reso=2048)
    width, height = round(2000 * ratio**0.5), round(2000 / ratio**0.5)
    bucket = choose_bucket(width, height, config)
    scale = max(bucket[0] / width, bucket[1] / height)
    assert max(width * scale - bucket[0], height * scale - bucket[1]) <= 1.2 * config.bucket_reso_steps


def test_small_pictures_keep_their_size_without_upscaling() -> None:
    config = BucketConfig(resolution="96,64", bucket_no_upscale=True, bucket_reso_steps=8)
    assert [choose_bucket(*size, config) for size in [(64, 64), (96, 64), (64, 96), (100, 60), (5, 5)]] == [
        (64, 64),
        (96, 64),
        (64, 96),
        (96, 56),
        (8, 8),
    ]
    width, height = choose_bucket(4000, 1000, config)
    assert width * height <= 96 * 64 and width / height == pytest.approx(4, rel=0.3)


def test_without_buckets_there_is_one_size() -> None:
    assert choose_bucket(4000, 1000, BucketConfig(resolution="512,768", enable_bucket=False)) == (512, 768)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"resolution": "512x512"}, "a size like 512"),
        ({"resolution": "500"}, "resolution is 500"),
        ({"bucket_reso_steps": 60}, "bucket_reso_steps is 60"),
        ({"min_bucket_reso": 640}, "min_bucket_reso is 640"),
        ({"max_bucket_reso": 256}, "max_bucket_reso is 256"),
    ],
)
def test_bad_bucket_options(values: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        BucketConfig(**values)
