"""A small VAE for real pictures, since a real one cannot be shipped: what benchmarks.real_pictures makes its latents with.

    OMP_NUM_THREADS=1 python -m benchmarks.photo_vae --data_dir output/real_pictures

The layout of SD1's `AutoencoderKL` (8x downsampling, 4 latent channels) with 1.8 M parameters, trained from random weights on crops of
the photographs and, for a quarter of every batch, of the clip-art that `benchmarks.package_pictures` unpacks; on their training parts
only. Loss: L1 + MSE on pixels and a light KL term, as examples/shapes/train_vae.py. Left out: a perceptual loss, an adversarial loss;
so it blurs what SD1's VAE would invent. Writes DATA_DIR/photo_vae with its PSNR on photographs
that it never saw (training.json), and some of them beside what it makes of them.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm

from benchmarks.package_pictures import clipart, photographs, split
from library.atomic_files import atomic_write_text
from library.models.loading import load_vae
from library.models.vae import decode_latents, encode_images
from library.reports.plots import image_grid
from library.scorer_data.pictures import to_pixels
from library.training.runtime import generator

NUM_TEST_PHOTOGRAPHS = 60
CLIPART_PER_SUBJECT_TEST = 0.25
KL_WEIGHT = 1e-4  # per latent element
CROP, PHOTO_SHARE = 64, 0.75
MAX_SIDE = 512  # pixels of a photograph in memory


def build_vae() -> AutoencoderKL:
    """An untrained VAE whose posterior starts narrow: at a standard deviation of 1 the noise drowns what is to be learned."""
    vae = AutoencoderKL.from_config(
        {
            "latent_channels": 4,
            "sample_size": CROP,
            "layers_per_block": 1,
            "block_out_channels": [24, 48, 64, 96],
            "norm_num_groups": 8,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "scaling_factor": 1.0,
        }
    )
    assert isinstance(vae, AutoencoderKL) and vae.quant_conv is not None and vae.quant_conv.bias is not None
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0.0
        vae.quant_conv.bias[4:] = -6.0  # log variance: a standard deviation of 0.05
    return vae


class Crops:
    """Square crops of pictures, at random places and scales, mirrored or not."""

    def __init__(self, paths: Sequence[Path], rng: torch.Generator) -> None:
        self._rng, self._pictures = rng, []
        for path in tqdm(paths, desc="reading", unit="picture", leave=False):
            picture = Image.open(path).convert("RGB")
            picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
            self._pictures.append(np.asarray(picture))

    def draw(self, count: int) -> list[Image.Image]:
        return [self._crop() for _ in range(count)]

    def _crop(self) -> Image.Image:
        picture = self._pictures[self._integer(len(self._pictures))]
        height, width = picture.shape[:2]
        largest = min(height, width)
        side = round(math.exp(torch.empty(()).uniform_(math.log(min(CROP, largest)), math.log(largest), generator=self._rng).item()))
        top, left = self._integer(height - side + 1), self._integer(width - side + 1)
        crop = Image.fromarray(picture[top : top + side, left : left + side])
        crop = crop.resize((CROP, CROP), Image.Resampling.BOX if side > 2 * CROP else Image.Resampling.BICUBIC)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self._integer(2) else crop

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._rng))


def split_clipart(data_dir: Path) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """Training and test drawings with their subjects: the same share of every subject."""
    drawings = clipart(data_dir)
    train: list[tuple[Path, str]] = []
    test: list[tuple[Path, str]] = []
    for subject in sorted({subject for _, subject in drawings}):
        mine = [path for path, label in drawings if label == subject]
        parts = split(mine, round(CLIPART_PER_SUBJECT_TEST * len(mine)))
        for target, part in zip((train, test), parts, strict=True):
            target += [(path, subject) for path in part]
    return train, test


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss to minimise and the mean squared error in it, for pixels [B, 3, H, W] in -1..1."""
    posterior = vae.encode(pixels, return_dict=False)[0]
    sample: Any = posterior.sample()
    restored = vae.decode(sample, return_dict=False)[0].float()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    mse = mse_loss(restored, pixels)
    return l1_loss(restored, pixels) + mse + KL_WEIGHT * kl, mse


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture [B], for pixels in -1..1."""
    return 10 * torch.log10(4 / (first - second).square().mean((1, 2, 3)))


def square(path: Path, size: int) -> Image.Image:
    """The middle of a picture."""
    picture = Image.open(path).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


@torch.no_grad()
def restore(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return decode_latents(vae, encode_images(vae, pixels)).clamp(-1, 1)


def report(vae: AutoencoderKL, paths: Sequence[Path], picture: Path) -> dict[int, float]:
    """PSNR on pictures at 128 and 256 pixels; writes a grid of the first ones and what the VAE makes of them."""
    result = {}
    for size in (128, 256):
        pixels = torch.cat([to_pixels([square(path, size)]) for path in paths])
        restored = torch.cat([restore(vae, chunk) for chunk in pixels.split(8)])
        result[size] = psnr(pixels, restored).mean().item()
        if size == 256:
            rows = [torch.stack(pair) for pair in zip(pixels[:6], restored[:6], strict=True)]
            grid = image_grid(
                [((row + 1) * 127.5).round().byte() for row in rows], [path.stem for path in paths[:6]], ["picture", "restored"]
            )
            grid.save(picture)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("output/real_pictures"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    photos, _ = split(photographs(args.data_dir), NUM_TEST_PHOTOGRAPHS)
    drawings, _ = split_clipart(args.data_dir)
    photo_crops = Crops(photos, generator(args.seed, "photographs"))
    drawing_crops = Crops([path for path, _ in drawings], generator(args.seed, "clipart"))
    num_photos = round(PHOTO_SHARE * args.batch_size)

    vae, started = build_vae(), time.process_time()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05)
    progress = tqdm(range(args.steps), desc="VAE", mininterval=10)
    for step in progress:
        pixels = to_pixels([*photo_crops.draw(num_photos), *drawing_crops.draw(args.batch_size - num_photos)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, mse = vae_loss(vae, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(psnr=f"{10 * math.log10(4 / mse.item()):.1f}")

    vae.eval().requires_grad_(False)
    latents = torch.cat([encode_images(vae, to_pixels(photo_crops.draw(64))) for _ in range(4)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    folder = args.data_dir / "photo_vae"
    vae.save_pretrained(folder)
    measure(
        folder, args.data_dir, {"steps": args.steps, "batch_size": args.batch_size, "cpu_minutes": (time.process_time() - started) / 60}
    )


def measure(folder: Path, data_dir: Path, training: dict[str, float]) -> None:
    """Write training.json: how the VAE was trained, and its PSNR in dB on pictures that it never saw; and pictures to look at."""
    vae = load_vae(folder)
    _, photos = split(photographs(data_dir), NUM_TEST_PHOTOGRAPHS)
    _, drawings = split_clipart(data_dir)
    record: dict[str, Any] = {**training, "parameters": sum(parameter.numel() for parameter in vae.parameters())}
    record["scaling_factor"] = vae.config["scaling_factor"]
    for name, paths in (("photographs", photos), ("drawings", [path for path, _ in drawings[::10]])):
        record[name] = {"pictures": len(paths), "psnr": report(vae, paths, folder / f"{name}.png")}
    text = json.dumps(record, indent=1)
    atomic_write_text(folder / "training.json", text)
    print(text)


if __name__ == "__main__":
    main()
