"""How much a photograph was made worse, learned in a real VAE's latents: what docs/experiments.md of 2026-11-22 could not.

    python -m benchmarks.distortions --photographs FOLDER --taesd FOLDER

Each picture is made worse in each way at a known random strength, encoded by FLUX.2's tiny VAE, and the strength is learned by ridge
regression from statistics of the latents; 5-fold cross-validation over pictures.
"""

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from tqdm import tqdm

from benchmarks.photographs import load_taesd, pictures_of
from benchmarks.real_ratings import FOLDS, T_OF_FOLDS, folds_of, moments_of, standardised
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.records import FilePicture
from library.scorer_training.closed_form import ridge
from library.scorer_training.criteria.metrics import spearman
from library.settings.cli import run_main

SMALL = (192, 144)


def _jpeg(picture: Image.Image, strength: float) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=round(95 - 85 * strength))
    return Image.open(stream).convert("RGB")


def _noise(picture: Image.Image, strength: float) -> Image.Image:
    values = np.asarray(picture) + np.random.default_rng(round(1e6 * strength)).normal(0, 40 * strength, (*picture.size[::-1], 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


# strength 0 to 1
WAYS: Mapping[str, Callable[[Image.Image, float], Image.Image]] = {
    "blur": lambda picture, strength: picture.filter(ImageFilter.GaussianBlur(3 * strength)),
    "jpeg": _jpeg,
    "noise": _noise,
    "exposure": lambda picture, strength: ImageEnhance.Brightness(picture).enhance(1 + 1.5 * strength),
}


@torch.inference_mode()
def statistics(files: Sequence[Path], strengths: np.ndarray, vae: Any, worse: Callable[[Image.Image, float], Image.Image]) -> Tensor:
    """Of the latents of each picture made worse [N, D]."""
    latents = []
    for file, strength in zip(tqdm(files), strengths, strict=True):
        picture = worse(cover(read_picture(FilePicture(file)), SMALL), float(strength))
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encoder(to_pixels([picture]) / 2 + 0.5).float())
    return standardised(moments_of(torch.cat(latents)))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, nargs="+", required=True)
    parser.add_argument("--taesd", type=Path, required=True)
    parser.add_argument("--count", type=int, default=240)
    options = parser.parse_args(words)
    files, vae = pictures_of(options.photographs), load_taesd(options.taesd)
    files = files[:: max(1, len(files) // options.count)][: options.count]
    fold = folds_of(len(files))
    for number, (way, worse) in enumerate(WAYS.items()):
        strengths = np.random.default_rng(number).random(len(files))
        features, target = statistics(files, strengths, vae, worse), torch.from_numpy(strengths)
        found = []
        for own in range(FOLDS):
            weight, _ = ridge(features[fold != own], target[fold != own])
            found.append(spearman(features[fold == own].double() @ weight, target[fold == own]))
        print(f"{way:9} {np.mean(found):.3f} ± {T_OF_FOLDS * np.std(found, ddof=1) / FOLDS**0.5:.3f}", flush=True)


if __name__ == "__main__":
    run_main(main)
