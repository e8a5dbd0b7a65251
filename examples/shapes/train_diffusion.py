"""Train the text encoder and the U-Net of the tiny Stable Diffusion from scratch on captioned drawings.

    python -m examples.shapes.train_diffusion --output_dir examples/shapes/model --steps 5000

The parts are SD1's own classes with SD1's block names, layer counts and noise schedule, only narrower. Text encoder and
U-Net learn together (there is no CLIP to start from); the loss is the noise's MSE with min-SNR weighting (Hang et al.
2023, arXiv 2303.09556), which spends the few steps there are on what a picture shows rather than on its grain. An
exponential moving average of the weights is what is saved, in half precision, as a diffusers folder.
"""

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.shapes.pictures import draw_batch
from examples.shapes.tokenizer import build_tokenizer
from examples.shapes.world import RESOLUTIONS, Scene, caption

SNR_GAMMA = 5.0
SHARES = (0.6, 0.2, 0.2)  # of RESOLUTIONS
EMPTY_CAPTIONS = 0.1  # share of captions dropped, so that classifier-free guidance has an unconditional branch


class TextToNoise(nn.Module):
    """Text encoder and U-Net as one module, so that one optimizer and one moving average hold both."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                hidden_act="quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                projection_dim=96,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(48, 64, 96, 96),
            norm_num_groups=16,
            cross_attention_dim=96,
            attention_head_dim=4,  # SD1's configs call the number of heads so
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        text = self.text_encoder(input_ids).last_hidden_state
        return self.unet(latents, timesteps, text).sample


@dataclass(frozen=True)
class LatentSet:
    """Latents [N, 4, h, w] of N drawings of one resolution, and their scenes."""

    latents: Tensor
    scenes: list[Scene]


@torch.no_grad()
def encode_drawings(vae: AutoencoderKL, count: int, resolution: tuple[int, int], rng: random.Random) -> LatentSet:
    latents, scenes = [], []
    for _ in tqdm(range(0, count, 50), desc=f"drawing {resolution[0]}x{resolution[1]}"):
        pixels, drawn = draw_batch(50, rng, resolution)
        latents.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
        scenes += drawn
    return LatentSet(torch.cat(latents), scenes)


def settings(description: str | None, *, learning_rate: float, steps: int) -> argparse.ArgumentParser:
    """What both tiny models are trained with; the folder is the script's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--num_pictures", type=int, default=16_000)
    parser.add_argument("--save_every_n_steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def train(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    vae: AutoencoderKL,
    args: argparse.Namespace,
    loss_of: Callable[[nn.Module, Tensor, list[str]], Tensor],
    save: Callable[[nn.Module], None],
) -> None:
    """Train a model on latents [B, 4, h, w] of drawings and their captions; `save` is given the moving average of the weights."""
    rng = random.Random(args.seed)
    sets = [encode_drawings(vae, round(share * args.num_pictures), size, rng) for size, share in zip(RESOLUTIONS, SHARES, strict=True)]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each, args.learning_rate, total_steps=args.steps, pct_start=0.05) for each in optimizers
    ]
    progress = tqdm(range(1, args.steps + 1), desc=type(model).__name__)
    smooth_loss = 1.0
    for step in progress:
        drawings = rng.choices(sets, weights=SHARES)[0]
        rows = rng.sample(range(len(drawings.scenes)), args.batch_size)
        captions = ["" if rng.random() < EMPTY_CAPTIONS else caption(drawings.scenes[row], rng) for row in rows]
        loss = loss_of(model, drawings.latents[rows], captions)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        average.update_parameters(model)

        smooth_loss = 0.98 * smooth_loss + 0.02 * loss.item()
        progress.set_postfix(loss=f"{smooth_loss:.4f}")
        if step % args.save_every_n_steps == 0 or step == args.steps:
            save(copy.deepcopy(average.module))
    print(f"saved to {args.output_dir}")


def min_snr_weights(alphas_cumprod: Tensor) -> Tensor:
    """Weights [T] of the noise's MSE under min-SNR-gamma: min(SNR, gamma) / SNR."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=SNR_GAMMA) / snr


def main() -> None:
    parser = settings(__doc__, learning_rate=1e-3, steps=5000)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/shapes/model"), help="must hold vae/; the rest is written here")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    vae = AutoencoderKL.from_pretrained(args.output_dir / "vae", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    loss_weights = min_snr_weights(scheduler.alphas_cumprod)

    def loss_of(model: nn.Module, latents: Tensor, captions: list[str]) -> Tensor:
        input_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        predicted = model(scheduler.add_noise(latents, noise, timesteps), timesteps, input_ids)
        return ((predicted - noise).square().mean((1, 2, 3)) * loss_weights[timesteps]).mean()

    def save(model: nn.Module) -> None:
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(args.output_dir / "vae"),
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            unet=model.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(args.output_dir)

    model = TextToNoise(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    train(model, [optimizer], vae, args, loss_of, save)


if __name__ == "__main__":
    main()
