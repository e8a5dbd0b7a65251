"""The benchmark on real pictures, without the pictures: what it finds in packages, what it does to photographs, what it counts."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.package_pictures import Seen, split, webp_pictures
from benchmarks.photo_crops import DISTORTIONS, SIZES, colourfulness, random_cut
from benchmarks.real_pictures import BUCKETS, by_kind
from benchmarks.real_pictures_report import markdown
from benchmarks.same_content import against, mirrored_around
from benchmarks.timm_network import outputs_of, stacks
from examples.shapes import scores
from library.scorer_data.buckets import BucketConfig, choose_bucket


def texture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Smooth random colours with some detail, as a photograph has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(coarse, fine, 0.3)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pictures_are_found_in_a_resource_file(tmp_path) -> None:
    def webp(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", lossless=True)
        return buffer.getvalue()

    opaque, clear = webp(Image.new("RGB", (40, 30), "red")), webp(Image.new("RGBA", (20, 20), (0, 0, 255, 100)))
    other = b"RIFF" + struct.pack("<I", 4) + b"WAVE"
    (tmp_path / "some.rcc").write_bytes(b"qres....RIFF" + other + clear + b"\0\0\x01" + opaque + b"tail")
    assert [(picture.size, picture.getpixel((0, 0))) for picture in webp_pictures(tmp_path / "some.rcc")] == [((40, 30), (255, 0, 0))]


def test_a_picture_that_looks_like_one_before_is_not_new() -> None:
    seen, first = Seen(), texture(0)
    buffer = io.BytesIO()
    first.resize((80, 60)).save(buffer, "JPEG", quality=70)
    assert seen.is_new(first) and not seen.is_new(Image.open(buffer).convert("RGB"))
    assert seen.is_new(texture(1)) and seen.is_new(Image.new("RGB", (50, 50), "red")) and seen.is_new(Image.new("RGB", (50, 50), "blue"))


def test_the_split_depends_on_the_names_alone(tmp_path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    train, test = split(paths, 5)
    assert (len(train), len(test)) == (15, 5) and not set(train) & set(test)
    assert split(paths[::-1], 5) == (train, test)


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_a_stronger_distortion_changes_a_picture_more(kind) -> None:
    picture = texture(2)
    changes = []
    for strength in (0.0, 0.3, 0.6, 1.0):
        changed = DISTORTIONS[kind](picture, strength, rng())
        assert changed.size == picture.size
        changes.append(float(np.abs(np.asarray(changed).astype(float) - np.asarray(picture)).mean()))
    assert changes == sorted(changes) and changes[0] < 0.7 * changes[-1]


def test_cuts_are_buckets_and_are_not_squashed() -> None:
    config = BucketConfig(**BUCKETS)
    assert [choose_bucket(*size, config) for size in SIZES] == list(SIZES)  # so a cut is encoded as it is
    y, x = np.mgrid[0:300, 0:400]
    circle = Image.fromarray((255 * ((x - 200) ** 2 + (y - 150) ** 2 < 140**2)).astype(np.uint8)).convert("RGB")
    for seed in range(5):
        cut = random_cut(circle, (160, 96), rng(seed))
        assert cut.size == (160, 96)


def test_colourfulness_is_that_of_the_shapes_world() -> None:
    pixels = torch.rand(4, 3, 20, 30, generator=rng())
    torch.testing.assert_close(colourfulness(pixels), scores.colourfulness(pixels), rtol=2e-3, atol=0)  # which divides by N, not N - 1
    assert colourfulness(torch.full((1, 3, 8, 8), 0.4)).item() == pytest.approx(0, abs=1e-6)


def test_a_canvas_continues_its_picture_by_its_mirror_image() -> None:
    picture = texture(3, (96, 96))
    wide = np.asarray(mirrored_around(picture, (160, 112)))
    assert wide.shape == (112, 160, 3)
    assert (wide[8:104, 32:128] == np.asarray(picture)).all() and (wide[:, 31] == wide[:, 32]).all()


def test_columns_are_compared_in_standard_deviations() -> None:
    base = torch.tensor([1.0, 2.0, 3.0])
    found = against({"a": base, "b": base + torch.tensor([0.2, -0.2, 0.6])}, "a", 0.5)
    assert set(found) == {"b"} and found["b"] == pytest.approx({"mean |difference|": 2 / 3, "mean difference": 0.4, "srcc": 1.0})


def test_stacks_keep_pictures_and_targets_together(tmp_path) -> None:
    paths = []
    for number, size in enumerate([(128, 128), (160, 96), (128, 128), (900, 60)]):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", size, (50 * number,) * 3).save(paths[-1])
    stacked = stacks(paths, torch.arange(4), lambda pixels: pixels, BUCKETS)  # the strip's bucket would cut most of it off
    means, targets = outputs_of(lambda pixels: pixels.mean((1, 2, 3)), stacked)
    assert sorted(targets.tolist()) == [0, 1, 2]
    torch.testing.assert_close((means + 1) * 127.5, 50.0 * targets)


def test_kinds_are_judged_apart() -> None:
    test = [{"score": str(row / 8), "kind": kind} for row, kind in enumerate([*DISTORTIONS] * 2)]
    outputs = torch.zeros(8, 4)
    outputs[:, 0], outputs[:, 1], outputs[4:, 3] = (
        torch.arange(8),
        torch.arange(8),
        -1,
    )  # jpeg is learned too, noise is not, exposure is reversed
    assert by_kind(test, outputs) == pytest.approx({"blur": 1, "jpeg": 1, "noise": 0, "exposure": -1})


def test_the_report_shows_what_there_is() -> None:
    psnr = {"pictures": 3, "psnr": {"128": 21.5}}
    vae = {"parameters": 2_000_000, "steps": 5, "cpu_minutes": 1.0, "photographs": psnr, "drawings": psnr}
    base = {"batch_size": 2, "vae": vae}
    assert "21.5 dB at 128 pixels" in markdown(base) and "Distortions" not in markdown(base)
    kinds = {"blur": 0.8, "jpeg": 0.6, "noise": 0.9, "exposure": 0.5}
    network = {"network": "ours", "seconds": 9.0, "parameters": 1_000_000, "steps": 3, "srcc": kinds}
    text = markdown({**base, "distortions": {**network, "train": 8, "test": 16}, "distortions, b": network})
    assert text.count("| ours | 1.0 M | 3 | 0.800 | 0.600 | 0.900 | 0.500 | 9 |") == 2
