"""Cuts of photographs, each made worse in one way at a known strength: blur, JPEG, noise or exposure.

    python -m benchmarks.photo_crops --data_dir output/real_pictures

Writes DATA_DIR/crops/*.png and DATA_DIR/crops/crops.csv with path, score (the strength, 0 to 1), kind, photograph and split. A photograph's
cuts are all in one split; those of "test" come from photographs that the VAE did not see either.
"""

import argparse
import csv
import io
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from benchmarks.package_pictures import photographs, split
from benchmarks.photo_vae import NUM_TEST_PHOTOGRAPHS
from library.training.runtime import generator

# Width and height of the cuts: buckets of about 128 x 128, so that a cut is encoded as it is.
SIZES = ((128, 128), (144, 112), (112, 144), (160, 96), (96, 160))
CUTS_PER_PHOTOGRAPH = 8
NUM_VALIDATION_PHOTOGRAPHS = 20


def blur(picture: Image.Image, strength: float, rng: torch.Generator) -> Image.Image:
    """Gaussian, with a standard deviation of up to 3 pixels."""
    return picture.filter(ImageFilter.GaussianBlur(3 * strength))


def jpeg(picture: Image.Image, strength: float, rng: torch.Generator) -> Image.Image:
    """Saved at a quality from 95 down to 8, evenly in its logarithm."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=round(95 * (8 / 95) ** strength))
    return Image.open(buffer).convert("RGB")


def noise(picture: Image.Image, strength: float, rng: torch.Generator) -> Image.Image:
    """Gaussian in every channel, with a standard deviation of up to a quarter of the range."""
    values = torch.from_numpy(np.asarray(picture).copy()).float()
    noisy = values + 64 * strength * torch.randn(values.shape, generator=rng)
    return Image.fromarray(noisy.round().clamp(0, 255).byte().numpy())


def exposure(picture: Image.Image, strength: float, rng: torch.Generator) -> Image.Image:
    """Up to two stops more or less light, at a gamma of 2.2; what is brighter than white is lost."""
    stops = 2 * strength * (1 if torch.rand((), generator=rng) < 0.5 else -1)
    table = [round(min(255.0, 255 * ((value / 255) ** 2.2 * 2**stops) ** (1 / 2.2))) for value in range(256)]
    return picture.point(table * 3)


DISTORTIONS: Mapping[str, Callable[[Image.Image, float, torch.Generator], Image.Image]] = MappingProxyType(
    {"blur": blur, "jpeg": jpeg, "noise": noise, "exposure": exposure}
)


def colourfulness(pixels: Tensor) -> Tensor:
    """How colourful pictures [B, 3, H, W] in 0..1 are (Hasler and Suesstrunk, Human Vision and Electronic Imaging 2003): [B]."""
    red, green, blue = pixels.unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)  # [B, 2, H W]
    return opponents.std(2).norm(dim=1) + 0.3 * opponents.mean(2).norm(dim=1)


def random_cut(photograph: Image.Image, size: tuple[int, int], rng: torch.Generator) -> Image.Image:
    """A part of these proportions, at a random place and scale, brought to `size` (width, height)."""
    largest = min(photograph.width / size[0], photograph.height / size[1])
    scale = math.exp(torch.empty(()).uniform_(min(0.0, math.log(largest)), math.log(largest), generator=rng).item())
    width, height = min(photograph.width, round(size[0] * scale)), min(photograph.height, round(size[1] * scale))
    left = int(torch.randint(photograph.width - width + 1, (), generator=rng))
    top = int(torch.randint(photograph.height - height + 1, (), generator=rng))
    return photograph.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)


def worsen(picture: Image.Image, kind: str, strength: float, rng: torch.Generator, enlarge: int = 1) -> Image.Image:
    """The picture distorted; with `enlarge` above 1, as a smaller one is that is enlarged so many times afterwards."""
    if enlarge == 1:
        return DISTORTIONS[kind](picture, strength, rng)
    small = picture.resize((picture.width // enlarge, picture.height // enlarge), Image.Resampling.LANCZOS)
    return DISTORTIONS[kind](small, strength, rng).resize(picture.size, Image.Resampling.BICUBIC)


def write_cuts(data_dir: Path, enlarge: int = 1) -> Path:
    """Cut all photographs; returns the path of crops.csv. Made at the first call, the same in every run."""
    folder = data_dir / ("crops" if enlarge == 1 else f"crops-{enlarge}x")
    if not (folder / "crops.csv").is_file():
        unfinished = data_dir / f"{folder.name}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        seen, test = split(photographs(data_dir), NUM_TEST_PHOTOGRAPHS)
        parts = {"val": seen[:NUM_VALIDATION_PHOTOGRAPHS], "train": seen[NUM_VALIDATION_PHOTOGRAPHS:], "test": test}
        with (unfinished / "crops.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "score", "kind", "photograph", "split"])
            for part, paths in parts.items():
                writer.writerows(_cuts(paths, part, unfinished, enlarge))
        unfinished.rename(folder)
    return folder / "crops.csv"


def _cuts(paths: Sequence[Path], part: str, folder: Path, enlarge: int) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for path in tqdm(paths, desc=f"cutting {part} photographs", unit="picture"):
        rng = generator(0, "cuts", path.stem)
        photograph = Image.open(path).convert("RGB")
        for number in range(CUTS_PER_PHOTOGRAPH):
            kind = list(DISTORTIONS)[number % len(DISTORTIONS)]
            strength = torch.rand((), generator=rng).item()
            size = SIZES[int(torch.randint(len(SIZES), (), generator=rng))]
            name = f"{part}-{path.stem}-{number}.png"
            worsen(random_cut(photograph, size, rng), kind, strength, rng, enlarge).save(folder / name)
            rows.append((name, f"{strength:.6f}", kind, path.stem, part))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("output/real_pictures"))
    print(write_cuts(parser.parse_args().data_dir))


if __name__ == "__main__":
    main()
