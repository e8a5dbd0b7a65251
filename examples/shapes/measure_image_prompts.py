"""Measure whether pictures of the embedded model, made from pictures through an adapter, show what those pictures show.

    python -m examples.shapes.measure_image_prompts --clip_model output/shapes/clip --adapters output/shapes/adapter.safetensors

New drawings, two of each shape in each colour, are given in place of prompts; the judge of examples/shapes/judge.py says whether shape
and colour of the samples are theirs. For comparison, the same scenes are sampled from their captions.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from examples.shapes.judge import obeyed
from examples.shapes.pictures import to_pixels
from examples.shapes.world import COLOURS, SHAPES, caption, draw, random_scene
from library.models.loading import load_model
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, sample
from library.text_free.adapter import check_adapter_fits, load_adapter, text_encoder_fingerprint
from library.text_free.clip_pair import ClipPair
from library.text_free.image_prompts import ImagePromptEncoder
from library.types import PromptSpec

MODEL = Path(__file__).with_name("model")


def shares(shape_right: Tensor, colour_right: Tensor) -> str:
    """Of bools [N] each."""
    both = (shape_right & colour_right).float().mean()
    return f"shape {shape_right.float().mean():.1%}, colour {colour_right.float().mean():.1%}, both {both:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip_model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--per_kind", type=int, default=2, help="drawings of each shape in each colour")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()

    model, clip, rng = load_model(MODEL), ClipPair.load(args.clip_model), random.Random(args.seed)
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS for _ in range(args.per_kind)]
    scenes = [random_scene(rng, (64, 64), shape=shape, colour=colour) for shape, colour in kinds]
    wanted = [f"a {colour} {shape}" for shape, colour in kinds]
    embeddings = clip.embed_pixels(to_pixels([draw(scene) for scene in scenes]))

    def report(name: str, encoder: PromptEncoder, prompts: list[str]) -> None:
        latents = sample(
            model,
            None,
            [PromptSpec(prompt=prompt) for prompt in prompts],
            range(len(prompts)),
            sampling=SamplingConfig(num_steps=20, guidance_scale=3.0, size=(64, 64), batch_size=24),
            encoder=encoder,
        )
        shape_right, colour_right = obeyed(decode(model, latents), wanted)
        print(f"{name}: {shares(shape_right, colour_right)}", flush=True)

    print(f"{len(scenes)} pictures")
    names = clip.embed_texts([f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS])
    named = ((embeddings - embeddings.mean(0)) @ (names - names.mean(0)).T).argmax(1)  # shapes are the outer loop: [N]
    own = torch.tensor([SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour) for shape, colour in kinds])
    shape_right, colour_right = named // len(COLOURS) == own // len(COLOURS), named % len(COLOURS) == own % len(COLOURS)
    print(f"CLIP itself: {shares(shape_right, colour_right)}")
    report("their captions", PromptEncoder(model), [caption(scene, rng) for scene in scenes])
    for path in args.adapters:
        adapter = load_adapter(path)
        check_adapter_fits(adapter, text_encoder_fingerprint(model), clip.fingerprint())
        names = [f"image:{row}" for row in range(len(scenes))]
        points = dict(zip(names, adapter.of_pictures(embeddings), strict=True))
        report(path.stem, ImagePromptEncoder(model, None, adapter, points), names)


if __name__ == "__main__":
    main()
