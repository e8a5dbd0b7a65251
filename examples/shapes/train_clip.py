"""Train a tiny CLIP for the shapes world, around the embedded model's own text encoder.

    python -m examples.shapes.train_clip --output_dir output/shapes/clip

As SD1's text encoder is one tower of CLIP ViT-L/14, the embedded model's is the text tower here, frozen; the picture tower and both
projections learn, with CLIP's symmetric cross entropy (arXiv 2103.00020), from captioned drawings. Written in transformers' layout, with
captions.txt, texts without pictures for tools/train_image_prompt_adapter.py. Prints how often the nearest of 64 captions is a picture's
own, and how far pictures and captions lie apart.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from examples.shapes.pictures import draw_batch
from examples.shapes.world import RESOLUTIONS, Scene, caption, random_scene
from library.atomic_files import atomic_write_text
from library.scorers.image_models.preprocessing import Preprocessing
from library.text_free.clip_pair import ClipPair

MODEL = Path(__file__).with_name("model")
HALF = (0.5, 0.5, 0.5)
NUM_CAPTIONS = 4000
CAPTIONS_PER_PICTURE = 2
DIM = 64


def build_clip(text_encoder: CLIPTextModel) -> CLIPModel:
    """A CLIP whose text tower is this one, and whose picture tower is a new ViT of 64-pixel pictures in patches of 8."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8, projection_dim=DIM
    )
    clip = CLIPModel(CLIPConfig(text_config=text_encoder.config.to_dict(), vision_config=vision.to_dict(), projection_dim=DIM))
    clip.text_model.load_state_dict(text_encoder.state_dict())
    clip.text_model.requires_grad_(False)
    return clip


def contrastive_loss(texts: Tensor, pictures: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's: each picture must find its text among the batch's, and each text its picture. Unit vectors [B, P]."""
    logits = logit_scale.exp().clamp(max=100) * pictures @ texts.T
    own = torch.arange(len(texts))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train(clip: CLIPModel, pair: ClipPair, steps: int, batch_size: int, num_pictures: int, seed: int) -> None:
    rng = random.Random(seed)
    sets: list[tuple[Tensor, list[Scene]]] = []
    for resolution, share in zip(RESOLUTIONS, (0.6, 0.2, 0.2), strict=True):
        pixels, scenes = draw_batch(round(share * num_pictures), rng, resolution)
        sets.append((pair.preprocessing(pixels / 2 + 0.5)[:, 0], scenes))
    views, scenes = torch.cat([views for views, _ in sets]), [scene for _, own in sets for scene in own]
    texts = torch.stack([_pooled_texts(clip, pair, [caption(scene, rng) for scene in scenes]) for _ in range(CAPTIONS_PER_PICTURE)])
    trained = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="CLIP")):
        rows = rng.sample(range(len(scenes)), batch_size)
        described = F.normalize(clip.text_projection(texts[rng.randrange(CAPTIONS_PER_PICTURE), rows]), dim=-1)
        pictures = F.normalize(clip.visual_projection(clip.vision_model(pixel_values=views[rows]).pooler_output), dim=-1)
        loss = contrastive_loss(described, pictures, clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def _pooled_texts(clip: CLIPModel, pair: ClipPair, texts: list[str]) -> Tensor:
    """What the frozen text tower makes of them [N, D]: computed once, as it does not learn."""
    batches = []
    for start in range(0, len(texts), 128):
        tokens = pair.tokenizer(texts[start : start + 128], padding="max_length", truncation=True, return_tensors="pt")
        batches.append(clip.text_model(input_ids=tokens.input_ids).pooler_output)
    return torch.cat(batches)


@torch.no_grad()
def measure(pair: ClipPair, seed: int, count: int = 640) -> str:
    """Retrieval and distances on new drawings, in words."""
    rng = random.Random(seed)
    pixels, scenes = draw_batch(count, rng, RESOLUTIONS[0])
    texts, pictures = pair.embed_texts([caption(scene, rng) for scene in scenes]), pair.embed_pixels(pixels)
    found = torch.cat([(p @ t.T).argmax(1) == torch.arange(len(p)) for p, t in zip(pictures.split(64), texts.split(64), strict=True)])
    apart = (texts.mean(0) - pictures.mean(0)).norm()
    centred = F.cosine_similarity(texts - texts.mean(0), pictures - pictures.mean(0))
    return (
        f"own caption found among 64: {found.float().mean():.1%}; means {apart:.2f} apart; cosine of picture and own caption "
        f"{(texts * pictures).sum(1).mean():.2f}, without the means {centred.mean():.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/shapes/clip"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_pictures", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    clip = build_clip(CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32))
    trained = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    pair = ClipPair(clip, tokenizer, Preprocessing(size=64, mean=HALF, std=HALF))
    for parameter in trained:
        parameter.requires_grad_(True)
    train(clip, pair, args.steps, args.batch_size, args.num_pictures, args.seed)
    print(measure(pair, args.seed + 1))

    clip.half().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    preprocessor = {"image_mean": HALF, "image_std": HALF, "size": 64, "do_normalize": True}
    atomic_write_text(args.output_dir / "preprocessor_config.json", json.dumps(preprocessor))
    rng = random.Random(args.seed)
    captions = dict.fromkeys(caption(random_scene(rng), rng) for _ in range(NUM_CAPTIONS))
    atomic_write_text(args.output_dir / "captions.txt", "\n".join(captions) + "\n")
    print(f"wrote {args.output_dir}, with {len(captions)} captions in captions.txt")


if __name__ == "__main__":
    main()
