"""Which scorer learns most from 50 and from 100 ratings of photographs: those that learn to see from them, and those that need not.

    python -m benchmarks.real_kinds --oasis FOLDER --taesd FOLDER --efficientnet FOLDER [--unrated FOLDER]

The folders are those of `benchmarks.real_ratings`. One simulated person's
ratings of photographs of four fifths are learned by the trainer's own parts, with its defaults; every `EVERY` steps the
averaged weights are held against the people's mean on the last fifth. Heads that are fitted to the same ratings stand beside them. What
learns to see from the photographs without ratings does so once. What was made is kept in `--work` and not made again.
"""

import csv
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.photographs import SCORES, Opinions, Photographs, encoded, fast_precision, has_bfloat16, load_taesd, pictures_of, read_oasis
from benchmarks.real_ratings import FOLDS, T_OF_FOLDS, folds_of, load_backbone, look, moments_of, pixels_of, pretrained, standardised
from benchmarks.shapes_runs import write_results
from library.atomic_files import atomic_write_text
from library.models.vae import VaeFingerprint
from library.scorer_training.closed_form import ridge
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.criteria.metrics import spearman
from library.scorer_training.run import PretrainingScorer, ScorerRun
from library.scorer_training.setup import make_backbone
from library.scorer_training.stages import Stage
from library.scorer_training.tasks import load_tasks
from library.scorers.base import BackboneScorer, ModelSource, ScorerSpec
from library.scorers.io import load_backbone_weights, save_backbone
from library.settings.cli import run_main
from library.settings.options import build_config
from library.settings.shared import TrainingConfig
from library.training.runtime import create_accelerator

EVERY = 25  # steps
EPOCHS = 8  # of the imitation
MOMENTS, PIXELS = "moments of the latents, ridge", "EfficientNet-Lite0 on pixels, ridge"
IMITATED = "efficientnet_lite, imitated in latents, ridge"
LARGER = (224, 176)  # pixels, for EfficientNet: the size of the photographs that it learned from
KINDS: Mapping[str, Mapping[str, Any]] = {
    "latent_resnet": {},
    "latent_resnet, mirrored and cut": {"flip_aug": True, "crop_variants": 2},
    "latent_vit": {"scorer_kind": "latent_vit"},
    "latent_vit, masked before": {"scorer_kind": "latent_vit", "pretrain_criterion": "masked"},
}


class TinyVae(nn.Module):
    """FLUX.2's tiny VAE as `library.models.vae` asks a VAE."""

    config: Mapping[str, Any] = {"latent_channels": 32, "block_out_channels": [64] * 4, "scaling_factor": 1.0}
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def encode(self, pixels: Tensor, return_dict: bool) -> tuple[Tensor]:
        with fast_precision():
            return (self.encoder((pixels / 2 + 0.5).contiguous(memory_format=torch.channels_last)).float(),)


def make_run(vae: TinyVae, settings: Mapping[str, Any]) -> ScorerRun:
    """The training of a new scorer, as train_latent_scorer.py would begin it."""
    config = build_config(LatentScorerConfig, {"bucket_reso_steps": 16, "mixed_precision": "bf16" if has_bfloat16() else "no", **settings})
    accelerator = create_accelerator(TrainingConfig(mixed_precision=config.training.mixed_precision))
    torch.manual_seed(config.training.seed)
    no_model: Any = None
    source = ModelSource(no_model, vae)
    tasks, before = load_tasks(config, source, accelerator)
    backbone, architecture = make_backbone(config.scorer, source, tasks[0].train.latent_area)
    head, kind = tasks[0].head, config.scorer.scorer_kind
    spec = ScorerSpec(kind=kind, architecture=architecture, vae=VaeFingerprint.of(vae), heads=(head,), score_head=head.name)
    optimizer, taught = config.training.optimizer_config(), config.output.output_dir / f"pretrained_{config.pretraining.steps}.safetensors"
    if before and not taught.is_file():
        first = Stage("pretraining", before, [before[0].name], config.pretraining.steps, optimizer, pretraining=True)
        teaching = dataclasses.replace(spec, heads=(before[0].head,), score_head=before[0].name)
        run = ScorerRun(accelerator, config.training, PretrainingScorer(teaching, backbone, lambda latents: latents), first)
        while run.done < first.end:
            run.step()
        run.keep_average()
        save_backbone(taught, backbone, spec)
    if before:
        load_backbone_weights(taught, backbone, spec)
    stage = Stage("training", tasks, [head.name], config.training.max_train_steps, optimizer)
    return ScorerRun(accelerator, config.training, BackboneScorer(spec, backbone), stage)


def learning_curve(run: ScorerRun, steps: int) -> list[float]:
    """Rank correlation of the averaged weights on clean validation pictures, every `EVERY` steps."""
    found = []
    while run.done < steps:
        run.step()
        if run.done % EVERY == 0:
            with run.averaged():
                found.append(run.tables()[run.stage.tasks[0].name][0]["srcc"])
    return found


def parts(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each fold, the photographs of the others in a random order, and its own."""
    fold = folds_of(count)
    for own in range(FOLDS):
        yield np.random.default_rng(10 * own).permutation(np.flatnonzero(fold != own)), np.flatnonzero(fold == own)


def rating_tables(folder: Path, files: Sequence[Path], opinions: Opinions, count: int) -> Iterator[Path]:
    """For each fold a table of one person's `count` ratings to train on, and of the people's mean to validate with."""
    rated = opinions.of_one_person(0)
    for own, (inside, outside) in enumerate(parts(len(files))):
        path = folder / f"{own}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "score", "split"))
            writer.writerows((files[row].absolute(), rated[row], "train") for row in inside[:count])
            writer.writerows((files[row].absolute(), opinions.mean[row], "validation") for row in outside)
        yield path


def seen_in(photographs: Photographs, see: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `see` makes of pixels and latents [N, D], in the order of the files."""
    found = [see(pixels, latents) for pixels, latents in zip(photographs.pixels, photographs.latents, strict=True)]
    return torch.cat(found)[photographs.numbers.argsort()]


def fitted(features: Tensor, opinions: Opinions, count: int) -> list[list[float]]:
    """Rank correlation in each fold of a ridge regression on features [N, D], from the same ratings."""
    rated, found = torch.from_numpy(opinions.of_one_person(0)), []
    for inside, outside in parts(len(rated)):
        weight, _ = ridge(features[inside[:count]], rated[inside[:count]])
        found.append([spearman(features[outside].double() @ weight, torch.from_numpy(opinions.mean[outside]))])
    return found


def interval(values: np.ndarray) -> str:
    """Mean over the folds with its 95 % interval."""
    return f"{values.mean():.2f} ± {T_OF_FOLDS * values.std(ddof=1) / len(values) ** 0.5:.2f}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each way to learn, score and number of ratings; what is trained at the step that is best for the mean of the folds."""
    lines = []
    for row in rows:
        curves = np.array(row["srcc"])  # [FOLDS, measured]
        best = int(curves.mean(0).argmax())
        other = next(own for own in rows if own["kind"] == MOMENTS and all(own[key] == row[key] for key in ("score", "count")))
        less = interval(curves[:, best] - np.array(other["srcc"])[:, 0]) if row is not other else ""
        steps = (EVERY * (best + 1), ", ".join(f"{value:.2f}" for value in curves.mean(0))) if curves.shape[1] > 1 else ("", "")
        lines.append((row["kind"], row["score"], row["count"], interval(curves[:, best]), less, *steps))
    measured = ("rank correlation", "less moments, fold by fold", "step", f"mean after every {EVERY} steps")
    return markdown_table(("learned by", "score", "ratings", *measured), lines)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON from its file if it is there."""
    if not path.is_file():
        atomic_write_text(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def main(words: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--oasis", type=Path, required=True)
    parser.add_argument("--taesd", type=Path, required=True)
    parser.add_argument("--efficientnet", type=Path, required=True)
    parser.add_argument("--unrated", type=Path, help="Photographs without ratings; not set: what learns to see from them is left out.")
    parser.add_argument("--every", type=int, default=2, help="Imitate on every n-th of the pictures without ratings.")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 100], help="Of ratings.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pretrain_steps", type=int, default=1000)
    parser.add_argument("--size", type=int, nargs=2, default=(144, 112), help="Width and height in pixels of the photographs.")
    parser.add_argument("--work", type=Path, default=Path("output/real_kinds"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "real_kinds")
    options = parser.parse_args(words)
    options.work.mkdir(parents=True, exist_ok=True)
    files, people = read_oasis(options.oasis)
    vae, (width, height) = TinyVae(load_taesd(options.taesd).encoder), options.size
    cases: list[tuple[str, int]] = [(score, count) for score in SCORES for count in options.counts]
    rows: list[dict[str, Any]] = []

    def add(kind: str, score: str, count: int, values: list[list[float]]) -> None:
        rows.append({"kind": kind, "score": score, "count": count, "srcc": values})
        print(table(rows).splitlines()[-1], flush=True)

    weights = next(options.efficientnet.rglob("efficientnet-lite0*.pth"), options.efficientnet)
    network = load_backbone(weights)
    small, large = (
        encoded(files, vae, options.work / f"rated_{len(files)}_{size[0]}.safetensors", size) for size in ((width, height), LARGER)
    )
    network.measure_units([pixels_of(part[::12]) for part in large.pixels])
    seen = {
        MOMENTS: standardised(seen_in(small, lambda pixels, latents: moments_of(latents))),
        PIXELS: seen_in(large, lambda pixels, latents: look(network, pixels).features),
    }
    if options.unrated:
        unrated = encoded(pictures_of([options.unrated])[:: options.every], vae, options.work / f"unrated_{options.every}.safetensors")
        imitating = pretrained(unrated, weights, options.work / f"imitation_{options.every}_{EPOCHS}.safetensors", EPOCHS)

        def imitated(latents: Tensor) -> Tensor:
            return torch.cat([imitating(part, part.new_zeros(len(part))) for part in latents.split(16)])

        seen[IMITATED] = seen_in(large, lambda pixels, latents: imitated(latents))
    for (kind, features), (score, count) in itertools.product(seen.items(), cases):
        add(kind, score, count, fitted(features, people[score], count))

    base = {"vae": str(options.taesd), "resolution": f"{width},{height}", "output_dir": str(options.work)}
    for kind, (score, count) in itertools.product(options.kinds, cases):
        curves, teaching = [], {}
        if "pretrain_criterion" in KINDS[kind]:
            if not options.unrated:
                continue
            teaching = {"pretrain_data_file": str(options.unrated), "pretrain_steps": options.pretrain_steps}
        for own, ratings in enumerate(rating_tables(options.work, files, people[score], count)):
            settings = {**base, **KINDS[kind], **teaching, "train_data_file": str(ratings)}
            path = options.work / f"{kind.replace(' ', '_')}-{score}-{count}-{own}-{width}-{options.steps}.json"
            curves.append(kept(path, lambda settings=settings: learning_curve(make_run(vae, settings), options.steps)))
        add(kind, score, count, curves)
    write_results(options.output, rows, table(rows))


if __name__ == "__main__":
    run_main(main)
