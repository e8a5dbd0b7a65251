"""Photographs with people's ratings, and others without, in a real VAE's latents; all from folders that the user names.

OASIS (Kurdi, Lozano and Banaji 2017, doi 10.3758/s13428-016-0715-3): 900 photographs with the mean and the standard deviation of about 100
people's valence and arousal, 1 to 7. Violent and nude themes are left out.
"""

import csv
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from library.atomic_files import atomic_save_safetensors, load_tensors
from library.errors import UserError
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.records import FilePicture

LEFT_OUT = (
    """
animal carcass, bdsm, bloody knife, dead bodies, dog attack, explosion, gun, injury, kkk rally, knife, neonazi, nude couple, nude man,
nude woman, severed finger, shooting, skinhead, soldiers, surgery, torture chamber, tumor, war, weapon
""".replace("\n", " ")
    .strip()
    .split(", ")
)
SCORES = ("valence", "arousal")
SIZE = (288, 224)  # pixels: OASIS is 5 : 4; the area of 256 x 256
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST = 160  # pixels a side, of a picture without a rating


@dataclass(frozen=True)
class Photographs:
    """Pictures of two sizes: pixels [N, H, W, 3] uint8 and latents [N, C, h, w] of the wide ones, then those of the tall ones.

    Attributes:
        numbers: where each was in the list of files [N].
    """

    numbers: Tensor
    pixels: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]


@dataclass(frozen=True)
class Opinions:
    """What people say of pictures: the mean [N] and the standard deviation [N] over them, 1 to 7."""

    mean: np.ndarray
    spread: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Opinions":
        """Of these pictures."""
        return Opinions(self.mean[rows], self.spread[rows])

    def of_one_person(self, seed: int) -> np.ndarray:
        """One simulated person's ratings [N], whole numbers of 1 to 7."""
        return np.random.default_rng(seed).normal(self.mean, self.spread).round().clip(1, 7)


def read_oasis(folder: Path) -> tuple[list[Path], dict[str, Opinions]]:
    """The pictures that are kept, and what people say of them. Raises UserError if the folder is not OASIS."""
    table = folder / "OASIS.csv"
    if not table.is_file():
        raise UserError(f"there is no {table}; give the folder of OASIS, such as a copy of bkurdi/shiny-server")
    lines = table.read_bytes().decode("latin-1").splitlines()  # they end in CR alone
    rows = [row for row in csv.DictReader(io.StringIO("\n".join(lines))) if theme(row["Theme"]) not in LEFT_OUT]
    found = {file.stem.strip(): file for file in (folder / "images").iterdir()}
    files = [found[row["Theme"].strip()] for row in rows]
    columns = {score: [np.array([float(row[f"{score.title()}_{part}"]) for row in rows]) for part in ("mean", "SD")] for score in SCORES}
    return files, {score: Opinions(*values) for score, values in columns.items()}


def theme(name: str) -> str:
    """Of a picture's name such as "Dog 12"."""
    return name.strip().rstrip("0123456789 ").lower()


def pictures_of(folders: Iterable[Path]) -> list[Path]:
    """Every picture in these folders and below."""
    return sorted(file for folder in folders for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)


def load_taesd(folder: Path) -> Any:
    """FLUX.2's tiny VAE by the code beside its weights, a copy of madebyollin/taesd: `encoder` and `decoder` of pixels in 0..1."""
    code = folder / "taesd.py"
    if not code.is_file():
        raise UserError(f"there is no {code}; give the folder of a copy of madebyollin/taesd")
    spec = importlib.util.spec_from_file_location("taesd", code)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TAESD(str(folder / "taef2_encoder.pth"), str(folder / "taef2_decoder.pth")).eval().requires_grad_(False)


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16; where it must pretend to, a picture takes 26 times as long as in float32 (AVX2)."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def fast_precision() -> Any:
    """Within the block bfloat16 on a processor that has it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())


def encoded(files: Sequence[Path], vae: Any, cache: Path, size: tuple[int, int] = SIZE) -> Photographs:
    """Pictures as pixels and latents, from the file `cache` if it is there; `size` is (width, height) of the wide ones.

    Where the VAE computes in bfloat16 its latents are off by 1.4 % (relative RMS), a noise of sigma 0.014.
    """
    if not cache.is_file():
        atomic_save_safetensors(_encode(files, vae, size), cache)
    tensors, _ = load_tensors(cache)
    sides = [side for side in ("wide", "tall") if f"{side}.number" in tensors]
    number, pixels, latents = ([tensors[f"{side}.{part}"] for side in sides] for part in ("number", "pixels", "latents"))
    return Photographs(torch.cat(number), tuple(pixels), tuple(part.float() for part in latents))


@torch.inference_mode()
def _encode(files: Sequence[Path], vae: Any, wide: tuple[int, int]) -> Mapping[str, Tensor]:
    found: dict[str, dict[str, list[Tensor]]] = {side: {"number": [], "pixels": [], "latents": []} for side in ("wide", "tall")}
    encoder = vae.encoder.to(memory_format=torch.channels_last)
    for number, file in enumerate(tqdm(files, desc="encode")):
        picture = read_picture(FilePicture(file))
        if min(picture.size) < SMALLEST:
            continue
        side, size = ("wide", wide) if picture.width >= picture.height else ("tall", (wide[1], wide[0]))
        picture = cover(picture, size)
        pixels = (to_pixels([picture]) / 2 + 0.5).contiguous(memory_format=torch.channels_last)
        with fast_precision():
            latents = encoder(pixels)
        for part, value in (
            ("number", torch.tensor(number)),
            ("pixels", torch.from_numpy(np.array(picture))),
            ("latents", latents[0].half()),
        ):
            found[side][part].append(value)
    return {f"{side}.{part}": torch.stack(values).contiguous() for side, own in found.items() for part, values in own.items() if values}
