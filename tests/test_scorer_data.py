"""Pictures and buckets: what people's files look like, and what becomes of them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.scorer_data.buckets import BucketConfig, bucket_sizes, choose_bucket, crop_share
from library.scorer_data.pictures import FORMATS, cover, read_picture, to_pixels
from library.scorer_data.records import FilePicture, SlicePicture

# -- pictures ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Image.Image:
    picture = read_picture(FilePicture(path))
    assert picture.mode == "RGB"
    return picture


def pixel(picture: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = picture.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_exif_rotation(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path / "turned.jpg").size == (10, 20)


def test_a_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read(tmp_path / "a.jpg").size == (8, 4)


def test_transparency_is_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixel(read(tmp_path / "clear.png")) == (255, 255, 255)
    assert pixel(read(tmp_path / "half.png")) == (255, 127, 127)
    assert pixel(read(tmp_path / "grey.png")) == (255, 255, 255)
    assert pixel(read(tmp_path / "palette.png")) == (255, 255, 255)


def test_sixteen_bits_and_cmyk_and_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "sixteen.png")
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "sixteen.tif")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    Image.new("YCbCr", (8, 8), (100, 128, 128)).save(tmp_path / "luma.tif")
    for value in (0.5, 100.0):
        Image.fromarray(np.full((4, 4), value, dtype=np.float32)).save(tmp_path / f"float_{value}.tif")
    assert pixel(read(tmp_path / "sixteen.png")) == (128, 128, 128)
    assert pixel(read(tmp_path / "sixteen.tif")) == (128, 128, 128)
    assert pixel(read(tmp_path / "cmyk.tif")) == (255, 0, 0)
    assert pixel(read(tmp_path / "grey.png")) == (77, 77, 77)
    assert pixel(read(tmp_path / "bit.png")) == (255, 255, 255)
    assert pixel(read(tmp_path / "luma.tif")) == (100, 100, 100)
    assert pixel(read(tmp_path / "float_0.5.tif")) == (128, 128, 128)
    assert pixel(read(tmp_path / "float_100.0.tif")) == (100, 100, 100)


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp"])
def test_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert pixel(read(tmp_path / name)) == pytest.approx((0, 255, 0), abs=1)


def test_a_part_of_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "lime").save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "x.tar").write_bytes(b"before" + content + b"after")
    assert pixel(read_picture(SlicePicture(tmp_path / "x.tar", 6, len(content), "a.png"))) == (0, 255, 0)
    with pytest.raises(UserError, match=r"x\.tar#7.* cannot be read"):
        read_picture(SlicePicture(tmp_path / "x.tar", 7, len(content), "a.png"))


def test_a_placeholder_of_one_pixel_is_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"gone\.png cannot be read: it has 1 x 1 pixels; give pictures of at least 2 a side"):
        read(tmp_path / "gone.png")


def test_pictures_that_are_too_big_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png", compress_level=1)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read: Image size \(200000000 pixels\) exceeds"):
        read(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "ppm", "tga", "ico"])
def test_whatever_is_wrong_with_a_file_it_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    """Bytes changed at random: a picture, or a UserError, and nothing else."""
    draw, path, refused = np.random.default_rng(0), tmp_path / f"a.{suffix}", 0
    Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for _ in range(60):
        content = np.frombuffer(whole, dtype=np.uint8).copy()
        content[draw.integers(0, min(len(content), 400), 10)] = draw.integers(0, 256, 10)
        path.write_bytes(content.tobytes())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and path.name in str(error)
    assert refused > 0 or suffix in ("bmp", "ppm", "tga")


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_broken_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is None:  # cut short
        noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        read(path)


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


@pytest.mark.parametrize(("steps", "largest"), [(64, 0.141), (32, 0.074), (8, 0.0192)])
def test_the_largest_share_that_a_bucket_cuts_off(steps: int, largest: float) -> None:
    """The figures that the module and its options state, for every ratio up to 1 : 4."""
    config = BucketConfig(bucket_reso_steps=steps)
    sizes = [(4000 * ratio**0.5, 4000 / ratio**0.5) for ratio in np.geomspace(0.25, 4, 401)]
    shares = [crop_share(round(width), round(height), choose_bucket(round(width), round(height), config)) for width, height in sizes]
    assert largest * 0.9 < max(shares) < largest
    assert crop_share(5000, 1000, choose_bucket(5000, 1000, config)) == pytest.approx(0.2)
    assert crop_share(1, 1, (512, 512)) == 0 and crop_share(100, 50, (50, 50)) == crop_share(50, 100, (50, 50)) == 0.5


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


@pytest.mark.parametrize("resolution", ["64", "128", "2048,1024"])
def test_limits_that_nobody_set_follow_the_resolution(resolution: str) -> None:
    config = BucketConfig(resolution=resolution, bucket_reso_steps=8)
    assert {min(side for size in bucket_sizes(config) for side in size)} == {config.shortest} == {min(config.width, config.height) // 2}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"resolution": "512x512"}, "a size like 512"),
        ({"resolution": "500"}, "resolution is 500"),
        ({"bucket_reso_steps": 60}, "bucket_reso_steps is 60"),
        ({"min_bucket_reso": 640}, "min_bucket_reso is 640"),
        ({"max_bucket_reso": 256}, "max_bucket_reso is 256"),
        ({"max_crop": 1.5}, "max_crop is 1.5"),
    ],
)
def test_bad_bucket_options(values: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        BucketConfig(**values)


@pytest.mark.parametrize("format", [*FORMATS, "MPO"])
def test_every_format_that_is_named_is_read(format: str, tmp_path: Path):
    Image.new("RGB", (16, 16), (250, 5, 5)).save(tmp_path / "picture", format=format)
    red, green, _ = np.asarray(read_picture(FilePicture(tmp_path / "picture"))).mean((0, 1))
    assert red > 200 and green < 50


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>", bytes(1000)])
def test_what_is_no_picture_is_told(content: bytes, tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(UserError, match="empty or of no format that is read here"):
        read_picture(FilePicture(tmp_path / "picture.png"))
