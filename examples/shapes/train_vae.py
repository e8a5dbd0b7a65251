"""Train the VAE of the tiny Stable Diffusion from scratch on drawn pictures.

    python -m examples.shapes.train_vae --output_dir examples/shapes/model --steps 4500

SD1's `AutoencoderKL` (8x downsampling, 4 latent channels) with few channels. Loss: L1 + MSE on pixels and a light KL
term. Left out, since flat shapes do not need them: a perceptual loss, an adversarial loss. The latents' standard
deviation is measured at the end and stored as `scaling_factor`, as SD1 does.

The VAE in examples/shapes/model was made by this script when the world still had dotted shapes and radii from 10 pixels up,
which it could not show; a new run draws today's world and gives a slightly different VAE.
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm

from examples.shapes.pictures import draw_batch
from examples.shapes.world import RESOLUTIONS

KL_WEIGHT = 3e-4  # per latent element; leaves the posterior a standard deviation of a few hundredths of the latents'


def build_vae() -> AutoencoderKL:
    """An untrained VAE whose posterior starts narrow: at a standard deviation of 1 the noise drowns what is to be learned."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=64,
        layers_per_block=1,
        block_out_channels=(24, 48, 64, 64),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=1.0,
        shift_factor=0.0,  # pipelines of flow models add it without asking
    )
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0.0
        vae.quant_conv.bias[4:] = -6.0  # log variance: a standard deviation of 0.05
    return vae


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss to minimise and the L1 part of it, for pixels [B, 3, H, W] in -1..1."""
    posterior = vae.encode(pixels).latent_dist
    restored = vae.decode(posterior.sample()).sample.float()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    l1 = l1_loss(restored, pixels)
    return l1 + mse_loss(restored, pixels) + KL_WEIGHT * kl, l1


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, rng: random.Random) -> float:
    pixels, _ = draw_batch(256, rng, resolution=(64, 64))
    return 1.0 / vae.encode(pixels).latent_dist.sample().std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/shapes/model"))
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05)

    progress = tqdm(range(args.steps), desc="VAE")
    for step in progress:
        pixels, _ = draw_batch(args.batch_size, rng, rng.choices(RESOLUTIONS, weights=(8, 1, 1))[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, l1 = vae_loss(vae, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(l1=f"{l1.item():.4f}")

    vae.eval()
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, rng))
    vae.to(torch.float16).save_pretrained(args.output_dir / "vae")
    print(f"scaling factor {vae.config.scaling_factor:.4f}, saved to {args.output_dir / 'vae'}")


if __name__ == "__main__":
    main()
