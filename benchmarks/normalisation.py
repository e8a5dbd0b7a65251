"""Which norms, input scaling, stem and conditioning a convolutional network needs to learn a score from latents.

    python -m benchmarks.normalisation

Small networks, all of them trained in the same way on the same drawings: their brightness and the size of what they show, from the
latents of the embedded model's VAE at every noise level. Each variant changes one thing in a ResNet of transformers, or is another
kind of network. Writes results/normalisation.json after every run, and then results/normalisation.md.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_cosine_schedule_with_warmup
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.step import environment
from examples.shapes.pictures import draw_batch
from examples.shapes.scores import brightness, size
from library.atomic_files import atomic_write_text
from library.models.loading import load_vae
from library.models.vae import encode_images
from library.scorer_training.trainer import add_noise, draw_sigmas, standard_schedule
from library.scorers.base import Backbone
from library.scorers.convolutional import replace_batch_norms
from library.scorers.latent_resnet import LatentResNet
from library.scorers.transformers_cnn import TransformersCnn
from library.settings.cli import run_main

ROOT = Path(__file__).resolve().parents[1]
SCORES = {"brightness": brightness, "size": size}
SIGMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
ENVIRONMENT = ("date", "device", "python", "torch", "diffusers", "transformers")
SD_SCALING_FACTOR = 0.18215  # of SD1: its latents are 5.5 times as large without it
GOOD = 0.9  # the SRCC of both scores on clean latents that is waited for
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, CLEAN_FRACTION, CHECK_EVERY = 64, 1e-3, 50, 0.25, 50


# -- the variants ----------------------------------------------------------------------------------------------------------


class SigmaPerBlock(TransformersCnn):
    """sigma enters after every block, not only after every stage."""

    def __init__(self, **architecture: Any) -> None:
        super().__init__(**architecture)
        blocks = [block for stage in self.stages for block in stage.layers]
        films = [type(self.films[0])(256, block.layer[-1].convolution.out_channels) for block in blocks]
        self.films = nn.ModuleList([self.films[0], *films])
        self.stages = nn.ModuleList(blocks)  # to `forward`, every block is a stage


class SigmaAtHead(TransformersCnn):
    """The network does not know sigma; its embedding stands beside the features."""

    def __init__(self, **architecture: Any) -> None:
        super().__init__(**architecture)
        self.films = nn.ModuleList(_Unconditioned() for _ in self.films)
        self.mix = nn.Sequential(nn.Linear(self.feature_width + 256, self.feature_width), nn.SiLU())

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Any = None, prompts: Any = None) -> Tensor:
        return self.mix(torch.cat([super().forward(latents, sigmas), self.sigma_embedding(sigmas)], dim=1))


class _Unconditioned(nn.Module):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x


def resnet(backbone: type[TransformersCnn] = TransformersCnn, **changes: Any) -> TransformersCnn:
    """The smallest ResNet, with group norm; `changes` are arguments of the backbone."""
    return backbone(in_channels=4, **{**TransformersCnn.presets["resnet-tiny"], "norm": "group", **changes})


def silu_resnet() -> TransformersCnn:
    return resnet(config={**TransformersCnn.presets["resnet-tiny"]["config"], "hidden_act": "silu"})


def resnet_with(make_norm: Callable[[int], nn.Module]) -> TransformersCnn:
    """That ResNet with other norms."""
    backbone = resnet(norm="batch")
    replace_batch_norms(backbone, make_norm)
    return backbone


def stock_resnet(**changes: Any) -> TransformersCnn:
    """As it reads photographs: the stem has stride 2 and is followed by a maximum over 3x3 at stride 2."""
    backbone = resnet(stem_stride=2, **changes)
    backbone.stem = nn.Sequential(backbone.stem, nn.MaxPool2d(3, 2, 1))
    return backbone


@dataclass(frozen=True, kw_only=True)
class Variant:
    """`make` draws a backbone; `scaling` is one of SCALINGS; `group` is the part of the table."""

    group: str
    name: str
    make: Callable[[], Backbone]
    scaling: str = "scaled"


VARIANTS = (
    Variant(group="norm", name="ResNet, batch norm", make=lambda: resnet(norm="batch")),
    Variant(group="norm", name="ResNet, group norm", make=resnet),
    Variant(
        group="norm", name="ResNet, layer norm over channels and space", make=lambda: resnet_with(lambda width: nn.GroupNorm(1, width))
    ),
    Variant(group="norm", name="ResNet, no norm", make=lambda: resnet_with(lambda width: nn.Identity())),
    Variant(group="norm", name="ResNet, group norm, SiLU after each block", make=silu_resnet),
    Variant(
        group="kind",
        name="ConvNeXt V2 (layer norm over channels)",
        make=lambda: TransformersCnn(in_channels=4, **TransformersCnn.presets["convnextv2-micro"]),
    ),
    Variant(
        group="kind",
        name="latent_resnet (group norm before, in each block)",
        make=lambda: LatentResNet(in_channels=4, **LatentResNet.presets["tiny"]),
    ),
    Variant(group="scaling", name="ResNet, batch norm, latents / 0.18215", make=lambda: resnet(norm="batch"), scaling="unscaled"),
    Variant(group="scaling", name="ResNet, group norm, latents / 0.18215", make=resnet, scaling="unscaled"),
    Variant(group="scaling", name="ResNet, group norm, whitened latents", make=resnet, scaling="whitened"),
    Variant(group="stem", name="ResNet, group norm, stem stride 2", make=lambda: resnet(stem_stride=2)),
    Variant(group="stem", name="ResNet, group norm, stem stride 2 and maximum pool", make=stock_resnet),
    Variant(group="stem", name="ResNet, batch norm, stem stride 2 and maximum pool (stock)", make=lambda: stock_resnet(norm="batch")),
    Variant(group="sigma", name="ResNet, group norm, sigma in every block", make=lambda: resnet(SigmaPerBlock)),
    Variant(group="sigma", name="ResNet, group norm, sigma only at the head", make=lambda: resnet(SigmaAtHead)),
)


# -- the training, the same for all ------------------------------------------------------------------------------------------


class TwoScores(nn.Module):
    """Latents, scaled and shifted by channel, through a backbone to the two scores in standard deviations [B, 2]."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.feature_width, len(SCORES))
        self.register_buffer("shift", shift.view(1, -1, 1, 1))
        self.register_buffer("scale", scale.view(1, -1, 1, 1))

    def forward(self, latents: Tensor, sigmas: Tensor) -> Tensor:
        return self.head(self.backbone((latents - self.shift) * self.scale, sigmas))


@dataclass(frozen=True)
class Pictures:
    """Latents [N, 4, 8, 8] and their standardised scores [N, 2]."""

    latents: Tensor
    scores: Tensor

    def split(self, count: int) -> tuple["Pictures", "Pictures"]:
        return Pictures(self.latents[:-count], self.scores[:-count]), Pictures(self.latents[-count:], self.scores[-count:])


def draw_pictures(count: int, seed: int) -> Pictures:
    """Rated drawings of 64x64 pixels in latent space."""
    vae, rng = load_vae(ROOT / "examples" / "shapes" / "model"), random.Random(seed)
    pixels, _ = draw_batch(count, rng, (64, 64))
    with torch.no_grad():
        latents = torch.cat([encode_images(vae, part) for part in pixels.split(32)])
    scores = torch.stack([score(pixels / 2 + 0.5) for score in SCORES.values()], dim=1)
    return Pictures(latents, (scores - scores.mean(0)) / scores.std(0))


@torch.no_grad()
def correlations(model: nn.Module, pictures: Pictures, sigma: float) -> dict[str, float]:
    """SRCC of each score at one noise level, always with the same noise."""
    model.eval()
    sigmas = torch.full((len(pictures.latents),), sigma)
    outputs = model(add_noise(pictures.latents, sigmas, torch.Generator().manual_seed(0)), sigmas)
    model.train()
    columns = zip(SCORES, outputs.unbind(1), pictures.scores.unbind(1), strict=True)
    return {name: 0.0 if found.std() == 0 else float(np.asarray(spearmanr(found, true))[0]) for name, found, true in columns}


def train(model: nn.Module, training: Pictures, validation: Pictures, steps: int, seed: int) -> dict[str, Any]:
    """Mean squared error at uniform timesteps and on clean latents -> SRCC by sigma, and when it was good on clean latents."""
    generator, schedule = torch.Generator().manual_seed(seed), standard_schedule()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    start, good_at = time.process_time(), None
    for step in range(1, steps + 1):
        chosen = torch.randint(len(training.latents), (BATCH_SIZE,), generator=generator)
        sigmas = draw_sigmas(BATCH_SIZE, CLEAN_FRACTION, schedule, generator)
        outputs = model(add_noise(training.latents[chosen], sigmas, generator), sigmas)
        loss = (outputs - training.scores[chosen]).square().mean()
        if not loss.isfinite():
            return {"diverged_at": step}
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        if good_at is None and step % CHECK_EVERY == 0 and min(correlations(model, validation, 0.0).values()) >= GOOD:
            good_at = step
    seconds = time.process_time() - start
    return {
        "srcc": {str(sigma): correlations(model, validation, sigma) for sigma in SIGMAS},
        "good_at": good_at,
        "cpu_seconds": round(seconds, 1),
    }


def run(variants: Sequence[Variant], seeds: Sequence[int], steps: int, count: int, path: Path) -> dict[str, Any]:
    """Train every variant with every seed, and write all that is known to `path` after each."""
    training, validation = draw_pictures(count, seed=0).split(count // 5)
    mean, std = training.latents.mean((0, 2, 3)), training.latents.std((0, 2, 3))
    ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
    scalings = {"scaled": (zeros, ones), "unscaled": (zeros, ones / SD_SCALING_FACTOR), "whitened": (mean, 1 / std)}
    result: dict[str, Any] = {
        "environment": {key: value for key, value in environment(Accelerator(cpu=True)).items() if key in ENVIRONMENT},
        "steps": steps,
        "pictures": len(training.latents),
        "validation_pictures": len(validation.latents),
        "latents": {"mean": mean.tolist(), "std": std.tolist()},
        "variants": [],
    }
    for variant in tqdm(variants, desc="variants"):
        parameters = sum(parameter.numel() for parameter in variant.make().parameters())
        rows: list[dict[str, Any]] = []
        result["variants"].append({"group": variant.group, "name": variant.name, "parameters": parameters, "runs": rows})
        for seed in seeds:
            torch.manual_seed(seed)
            model = TwoScores(variant.make(), *scalings[variant.scaling])
            rows.append({"seed": seed, **train(model, training, validation, steps, seed)})
            atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    return result


# -- the table -------------------------------------------------------------------------------------------------------------------


def _cell(runs: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> str:
    values = ["diverged" if "diverged_at" in row else f"{value(row):.3f}" for row in runs]
    return " / ".join(values)


def format_table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each variant; in a cell, a number for each seed."""
    lines = ["| | variant | parameters | " + " | ".join(f"sigma {sigma:g}" for sigma in SIGMAS) + f" | steps to {GOOD} | CPU seconds |"]
    lines.append("|---" * (len(SIGMAS) + 5) + "|")
    for variant in result["variants"]:
        runs = variant["runs"]
        cells = [_cell(runs, lambda row, s=str(sigma): sum(row["srcc"][s].values()) / len(SCORES)) for sigma in SIGMAS]
        good = " / ".join(str(row.get("good_at") or "never") for row in runs)
        seconds = " / ".join(f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "" for row in runs)
        lines.append(
            f"| {variant['group']} | {variant['name']} | {variant['parameters'] / 1e6:.2f} M | "
            + " | ".join(cells)
            + f" | {good} | {seconds} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=2000, help="drawings, those to validate with among them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=[], help="only those whose name has one of these words in it")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "normalisation.json")
    args = parser.parse_args()
    chosen = [variant for variant in VARIANTS if not args.variants or any(word in variant.name for word in args.variants)]
    result = run(chosen, args.seeds, args.steps, args.pictures, args.output)
    page = (
        f"As `python -m benchmarks.normalisation` writes it: mean of the SRCC of {' and '.join(SCORES)} on "
        f"{result['validation_pictures']} drawings, after {args.steps} steps of {BATCH_SIZE} out of {result['pictures']}; "
        f"a number for each seed.\n\n{format_table(result)}\n"
    )
    atomic_write_text(args.output.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    run_main(main)
