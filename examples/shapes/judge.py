"""The judge of the shapes world: a small network that reads shape and colour back from pictures.

    python -m examples.shapes.judge --steps 1200                        train it, and measure it on drawings it never saw
    python -m examples.shapes.judge --measure examples/shapes/model     measure how well samples of a model follow their captions

It sees drawings only, lightly blurred and grained as a VAE leaves them, never a sample. As a judge of
tools/evaluate_slider.py, `examples.shapes.judge:caption_obeyed` is 1 where a picture shows the shape and the colour
that its prompt names.
"""

import argparse
import functools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from tqdm import tqdm

from examples.shapes.pictures import draw_batch
from examples.shapes.scores import size
from examples.shapes.world import COLOURS, RESOLUTIONS, SHAPES, Scene, caption, random_scene

WEIGHTS = Path(__file__).with_name("judge.safetensors")


class ShapeColourJudge(nn.Module):
    """Pixels [B, 3, H, W] in 0..1, any size from 32 up -> logits of the shapes [B, 6] and of the colours [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 24, 48, 64, 96)
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels[-1], len(SHAPES) + len(COLOURS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pixels * 2 - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        shapes, colours = self.head(pooled).split([len(SHAPES), len(COLOURS)], dim=1)
        return shapes, colours


@functools.cache
def load_shape_colour_judge() -> ShapeColourJudge:
    judge = ShapeColourJudge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return judge.eval().requires_grad_(False)


def named_in(prompt: str, names: Sequence[str]) -> int:
    """Index of the one of `names` that the prompt holds. Raises ValueError if it holds none: it is no prompt of this world."""
    words = prompt.split()
    for index, name in enumerate(names):
        if name in words:
            return index
    raise ValueError(f"the prompt {prompt!r} names none of {', '.join(names)}")


def obeyed(pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Whether each picture shows the shape, and the colour, that its prompt names: two bool tensors [B]."""
    shapes, colours = load_shape_colour_judge().to(pixels.device)(pixels.clamp(0, 1))
    wanted_shapes = torch.tensor([named_in(prompt, SHAPES) for prompt in prompts], device=pixels.device)
    wanted_colours = torch.tensor([named_in(prompt, COLOURS) for prompt in prompts], device=pixels.device)
    return shapes.argmax(1) == wanted_shapes, colours.argmax(1) == wanted_colours


def caption_obeyed(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where a picture [B, 3, H, W] in 0..1 shows both the shape and the colour that its prompt names, else 0: [B]."""
    shape_right, colour_right = obeyed(pixels, prompts)
    return (shape_right & colour_right).float()


def size_shown(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The size of the object, 0..1, in a picture that still shows the shape and colour of its caption; 0 in one that does not [B].

    `scores.size` alone takes noise for a large object. This is what a person would mean.
    """
    return size(pixels) * caption_obeyed(pixels, prompts)


def _worn(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and grain at random strength: what a VAE does to a drawing."""
    amount = torch.rand(len(pixels), 1, 1, 1, generator=generator)
    blurred = avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
    grain = 0.04 * torch.randn(pixels.shape, generator=generator)
    return (torch.lerp(pixels, blurred, amount) + grain * torch.rand(len(pixels), 1, 1, 1, generator=generator)).clamp(0, 1)


def _targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
    return shapes, torch.tensor([COLOURS.index(scene.colour) for scene in scenes])


def train(steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    judge = ShapeColourJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="judge"):
        pixels, scenes = draw_batch(64, rng)
        shapes, colours = judge(_worn(pixels / 2 + 0.5, generator))
        wanted_shapes, wanted_colours = _targets(scenes)
        loss = cross_entropy(shapes, wanted_shapes) + cross_entropy(colours, wanted_colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in judge.state_dict().items()}, WEIGHTS)
    load_shape_colour_judge.cache_clear()


def measure_drawings(count: int = 2000, seed: int = 1_000_003) -> None:
    """Print how often the judge is right about drawings that it never saw."""
    rng = random.Random(seed)
    judge, right_shapes, right_colours = load_shape_colour_judge(), 0, 0
    for _ in range(0, count, 100):
        pixels, scenes = draw_batch(100, rng)
        shapes, colours = judge(pixels / 2 + 0.5)
        wanted_shapes, wanted_colours = _targets(scenes)
        right_shapes += int((shapes.argmax(1) == wanted_shapes).sum())
        right_colours += int((colours.argmax(1) == wanted_colours).sum())
    print(f"judge on {count} new drawings: shape {right_shapes / count:.1%}, colour {right_colours / count:.1%}")


def measure_samples(model_path: str, vae: str | None = None, per_resolution: int = 180, seed: int = 7) -> None:
    """Print how often a model's samples show what their captions say, by resolution."""
    from library.models.loading import load_model
    from library.rollouts.sample import SamplingConfig, decode, sample
    from library.types import PromptSpec

    model, rng = load_model(model_path, vae=vae), random.Random(seed)
    for width, height in RESOLUTIONS:
        prompts = [caption(random_scene(rng), rng) for _ in range(per_resolution)]
        with tqdm(total=per_resolution * 20, desc=f"sampling {width}x{height}", leave=False) as bar:
            latents = sample(
                model,
                None,
                [PromptSpec(prompt=prompt) for prompt in prompts],
                range(seed, seed + per_resolution),
                sampling=SamplingConfig(num_steps=20, guidance_scale=3.0, size=(height, width), batch_size=60),
                progress=bar.update,
            )
        shape_right, colour_right = obeyed(decode(model, latents), prompts)
        shares = f"shape {shape_right.float().mean():.1%}, colour {colour_right.float().mean():.1%}"
        print(f"{per_resolution} samples at {width}x{height}: {shares}, both {(shape_right & colour_right).float().mean():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps and replace the weights (0: do not train)")
    parser.add_argument("--measure", help="a model folder or file to sample from")
    parser.add_argument("--vae", help="of a model folder that has none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps:
        train(args.steps, args.seed)
    measure_drawings()
    if args.measure:
        measure_samples(args.measure, args.vae)


if __name__ == "__main__":
    main()
