"""What makes a transformer over latents learn a score: one table.

    python -m benchmarks.latent_vit

Draws pictures of the shapes world, rates them by the share that the object covers, encodes them with the embedded VAE, and trains every
variant with the same small loop on one thread. SRCC is on 500 pictures that no training saw, at five noise levels, and on the same
pictures at twice the size. Results are written after every run; what is in the file already is not run again.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from examples.shapes.pictures import to_pixels
from examples.shapes.scores import size
from examples.shapes.world import draw, random_scene
from library.models.loading import load_vae
from library.models.vae import encode_images
from library.scorer_training.criteria.metrics import spearman
from library.scorer_training.trainer import add_noise, draw_sigmas, standard_schedule
from library.scorers.base import Backbone
from library.scorers.masked_latents import MaskedLatentPretraining
from library.scorers.registry import get_backbone, preset_architecture

ROOT = Path(__file__).resolve().parents[1]
SIGMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
CLEAN_FRACTION, BATCH_SIZE, WEIGHT_DECAY, MAX_GRAD_NORM = 0.25, 32, 0.05, 1.0
NUM_RATED, NUM_UNRATED, NUM_HELD_OUT = 2000, 2000, 500


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size: clean latents [N, 4, h, w] and scores [N]."""

    latents: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.scores)


@torch.no_grad()
def draw_pictures(count: int, seed: int, vae: AutoencoderKL, enlargement: int = 1) -> list[Pictures]:
    """Random scenes, grouped by size; their pixels may be enlarged before they are encoded, which leaves their scores as they are."""
    rng = random.Random(seed)
    drawings: dict[tuple[int, int], list[Image.Image]] = {}
    for _ in range(count):
        picture = draw(random_scene(rng))
        drawings.setdefault(picture.size, []).append(picture)
    groups = []
    for _, group in sorted(drawings.items()):
        pixels = to_pixels(group)  # [N, 3, H, W]
        scores = size(pixels / 2 + 0.5)
        if enlargement > 1:
            pixels = F.interpolate(pixels, scale_factor=enlargement, mode="bicubic")
        groups.append(Pictures(torch.cat([encode_images(vae, part) for part in pixels.split(50)]), scores))
    return groups


class Model(nn.Module):
    """A backbone and a linear head: latents [B, C, h, w] and sigmas [B] to scores [B], in standard deviations of the training scores."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_width, 1)

    def forward(self, latents: Tensor, sigmas: Tensor) -> Tensor:
        return self.head(self.backbone(latents, sigmas)).squeeze(1)


@torch.no_grad()
def predict(model: Model, groups: Sequence[Pictures], sigma: float = 0.0) -> Tensor:
    """Scores of all pictures at one noise level, always with the same noise."""
    generator, outputs = torch.Generator().manual_seed(0), []
    model.eval()
    for group in groups:
        for latents in group.latents.split(100):
            sigmas = torch.full((len(latents),), sigma)
            outputs.append(model(add_noise(latents, sigmas, generator), sigmas))
    model.train()
    return torch.cat(outputs)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of AdamW, with a linear warmup and a cosine to 0."""

    steps: int = 400
    learning_rate: float = 1e-3
    warmup_steps: int = 40


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor]  # (noisy, sigmas, clean, scores, generator) -> [B]


def fit(module: nn.Module, loss: Loss, groups: Sequence[Pictures], schedule: Schedule, seed: int) -> None:
    """Train a module on random batches, each of one size."""
    generator, noise_schedule = torch.Generator().manual_seed(seed), standard_schedule()
    parameters = list(module.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=schedule.learning_rate
    )
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, schedule.warmup_steps, schedule.steps)
    batches = draw_batches(groups, generator)
    for _ in range(schedule.steps):
        clean, scores = next(batches)
        sigmas = draw_sigmas(len(clean), CLEAN_FRACTION, noise_schedule, generator)
        loss(add_noise(clean, sigmas, generator), sigmas, clean, scores, generator).mean().backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()


def draw_batches(groups: Sequence[Pictures], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endlessly latents [B, 4, h, w] and scores [B] of random pictures of one size, each size as often as it has pictures."""
    shares = torch.tensor([float(len(group)) for group in groups])
    while True:
        group = groups[int(torch.multinomial(shares, 1, generator=generator))]
        rows = torch.randint(len(group), (BATCH_SIZE,), generator=generator)
        yield group.latents[rows], group.scores[rows]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the table.

    Attributes:
        name: what is special about it.
        kind, architecture: the backbone.
        ratings: how many of the rated pictures it learns from.
        start: "random"; "masked", the backbone learned to fill in unrated pictures before; "distilled", a latent_resnet learned the
            ratings before and rates the unrated pictures, which are learned together with the rated ones.
    """

    name: str
    kind: str = "latent_vit"
    architecture: dict[str, Any]
    ratings: int = NUM_RATED
    schedule: Schedule = field(default_factory=Schedule)
    start: str = "random"


def train(run: Run, rated: list[Pictures], unrated: list[Pictures]) -> Model:
    """Train one variant from the beginning."""
    used = [Pictures(*(part[: round(len(group) * run.ratings / NUM_RATED)] for part in (group.latents, group.scores))) for group in rated]
    scores = torch.cat([group.scores for group in used])
    mean, std = scores.mean(), scores.std()
    torch.manual_seed(0)
    model = Model(get_backbone(run.kind)(in_channels=4, **run.architecture))
    if run.start == "masked":
        pretraining = MaskedLatentPretraining(model.backbone)
        fit(pretraining, lambda noisy, sigmas, clean, _, rng: pretraining(noisy, sigmas, clean, rng), unrated, PRETRAINING, seed=1)
    if run.start == "distilled":
        teacher = train(Run(name="teacher", kind="latent_resnet", architecture=RESNET, ratings=run.ratings), rated, unrated)
        opinions = (predict(teacher, unrated) * std + mean).split([len(group) for group in unrated])
        used = used + [Pictures(group.latents, opinion) for group, opinion in zip(unrated, opinions, strict=True)]
    fit(model, lambda noisy, sigmas, _, scores, __: (model(noisy, sigmas) - (scores - mean) / std).square(), used, run.schedule, seed=0)
    return model


PRETRAINING = Schedule(steps=600)
RESNET = preset_architecture("latent_resnet", "tiny")
PLAIN = {"position": "learned", "stem": 0, "registers": 0, "sigma_input": "token"}
FOUR_LAYERS = {"width": 96, "depth": 4, "heads": 3, "patch": 2}
SEVEN_MILLION = {"width": 256, "depth": 8, "heads": 4, "patch": 2}
RUNS = (
    Run(name="latent_resnet tiny", kind="latent_resnet", architecture=RESNET),
    Run(name="plain ViT", architecture=FOUR_LAYERS | PLAIN),
    Run(name="+ rotary", architecture=FOUR_LAYERS | PLAIN | {"position": "rotary"}),
    Run(name="+ stem of 2", architecture=FOUR_LAYERS | {"registers": 0, "sigma_input": "token"}),
    Run(name="+ 4 registers", architecture=FOUR_LAYERS | {"sigma_input": "token"}),
    Run(name="+ adaLN = ViT", architecture=FOUR_LAYERS),
    Run(name="ViT, rotary in cells", architecture=FOUR_LAYERS | {"position": "rotary_cells"}),
    Run(name="ViT, stem of 3", architecture=FOUR_LAYERS | {"stem": 3}),
    Run(name="ViT, patch 1", architecture=FOUR_LAYERS | {"patch": 1}),
    Run(name="ViT, lr 3e-4", architecture=FOUR_LAYERS, schedule=Schedule(learning_rate=3e-4)),
    Run(name="ViT, lr 3e-3", architecture=FOUR_LAYERS, schedule=Schedule(learning_rate=3e-3)),
    Run(name="ViT, no warmup", architecture=FOUR_LAYERS, schedule=Schedule(warmup_steps=0)),
    Run(name="ViT, 3 x steps", architecture=FOUR_LAYERS, schedule=Schedule(steps=1200)),
    Run(name="ViT, masked first", architecture=FOUR_LAYERS, start="masked"),
    Run(name="200: latent_resnet tiny", kind="latent_resnet", architecture=RESNET, ratings=200),
    Run(name="200: ViT", architecture=FOUR_LAYERS, ratings=200),
    Run(name="200: ViT, masked first", architecture=FOUR_LAYERS, ratings=200, start="masked"),
    Run(name="200: ViT, distilled", architecture=FOUR_LAYERS, ratings=200, start="distilled"),
    Run(name="7M: plain ViT, lr 1e-3", architecture=SEVEN_MILLION | PLAIN, schedule=Schedule(steps=250)),
    Run(name="7M: plain ViT, lr 3e-4", architecture=SEVEN_MILLION | PLAIN, schedule=Schedule(steps=250, learning_rate=3e-4)),
    Run(name="7M: ViT, lr 3e-4", architecture=SEVEN_MILLION, schedule=Schedule(steps=250, learning_rate=3e-4)),
)


def measure(run: Run, model: Model, held_out: list[Pictures], enlarged: list[Pictures], cpu_seconds: float) -> dict[str, Any]:
    """A row of the table, as plain JSON values. `shift` is how much the mean score changes at twice the size, in standard deviations."""
    scores = torch.cat([group.scores for group in held_out])
    return {
        "name": run.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": run.schedule.steps,
        "cpu_seconds": round(cpu_seconds, 1),
        "srcc": {f"{sigma:g}": round(spearman(predict(model, held_out, sigma), scores), 4) for sigma in SIGMAS},
        "enlarged_srcc": round(spearman(predict(model, enlarged), scores), 4),
        "enlarged_shift": round((predict(model, enlarged) - predict(model, held_out)).mean().item(), 4),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = " | ".join(f"sigma {sigma:g}" for sigma in SIGMAS)
    lines = [f"| variant | parameters | steps | CPU seconds | {names} | twice the size | shift |", "|---" * (6 + len(SIGMAS)) + "|"]
    for row in rows:
        cells = [f"{value:.3f}" for value in [*row["srcc"].values(), row["enlarged_srcc"]]]
        numbers = f"{row['parameters'] / 1e6:.2f} M | {row['steps']} | {row['cpu_seconds']:.0f}"
        lines.append(f"| {row['name']} | {numbers} | {' | '.join(cells)} | {row['enlarged_shift']:+.2f} |")
    return "\n".join(lines)


def kept_for_backward(backbone: Backbone, side: int) -> float:
    """MiB of activations that a forward pass over one picture of side x side latents keeps for the backward pass, each counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(torch.zeros(1, 4, side, side, requires_grad=True), torch.zeros(1))
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    return sum(nbytes for pointer, nbytes in kept.items() if pointer not in weights) / 2**20


def print_memory() -> None:
    """Tokens, and MiB without and with gradient checkpointing, of the four layers with patch 1."""
    for side in (32, 64, 96):
        built = [
            get_backbone("latent_vit")(in_channels=4, **FOUR_LAYERS | {"patch": 1, "gradient_checkpointing": on}) for on in (False, True)
        ]
        print(f"| {side}x{side} | {side**2} | {' | '.join(f'{kept_for_backward(backbone, side):.1f}' for backbone in built)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "latent_vit")
    parser.add_argument("--memory", action="store_true", help="only count the memory that grows with the size of the latents")
    args = parser.parse_args()
    if args.memory:
        return print_memory()
    torch.set_num_threads(1)
    results = args.results.with_suffix(".json")
    rows = {row["name"]: row for row in (json.loads(results.read_text(encoding="utf-8")) if results.exists() else [])}

    vae = load_vae(ROOT / "examples" / "shapes" / "model")
    rated, unrated, held_out = (draw_pictures(count, seed, vae) for seed, count in enumerate((NUM_RATED, NUM_UNRATED, NUM_HELD_OUT)))
    enlarged = draw_pictures(NUM_HELD_OUT, 2, vae, enlargement=2)  # the held-out pictures again
    for run in RUNS:
        if run.name in rows:
            continue
        started = time.process_time()
        model = train(run, rated, unrated)
        rows[run.name] = measure(run, model, held_out, enlarged, time.process_time() - started)
        ordered = [rows[known.name] for known in RUNS if known.name in rows]
        results.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        args.results.with_suffix(".md").write_text(markdown(ordered) + "\n", encoding="utf-8")
        print(markdown([rows[run.name]]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
