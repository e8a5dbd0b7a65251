"""Pictures, prompts and scorers of the shapes world, made where they are not there: what the benchmarks share."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks import ROOT
from examples.shapes.draw_pictures import write_prompts, write_ratings
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.setup import make_source
from library.scorer_training.tasks import Task, load_tasks
from library.scorer_training.validation import SigmaTable
from library.scorers.base import BackboneScorer
from library.scorers.io import load_scorer
from library.settings.options import build_config
from train_latent_scorer import train

MODEL = ROOT / "examples" / "shapes" / "model"
VAE, FLOW_MODEL = MODEL / "vae", MODEL.with_name("flow_model")  # a transformer in the same VAE's latents
SIGMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # columns of the tables
BASE: Mapping[str, Any] = {
    "pretrained_model_name_or_path": str(MODEL),
    "resolution": "80",
    "bucket_no_upscale": True,
    "bucket_reso_steps": 8,
    "scorer_size": "tiny",
    "validation_folds": 0,
    "validate_every_n_steps": 100,
    "lr_warmup_steps": 0.1,
    "ema_decay": 0.99,
    "train_batch_size": 64,
}


def drawn_pictures(folder: Path, count: int, score: str, seed: int = 0) -> Path:
    """A folder of `count` drawings with ratings.csv and pairs.csv, drawn if it is not there. Returns the path of ratings.csv."""
    path = folder / "ratings.csv"
    return path if path.is_file() else write_ratings(folder, count, score, seed)


def written_prompts(folder: Path) -> tuple[Path, Path]:
    """Prompts to train on, and held-out prompts."""
    if not (folder / "prompts.txt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_prompts(folder, 0)
    return folder / "prompts.txt", folder / "held_out_prompts.txt"


def learned_scorer(folder: Path, score: str, *, name: str = "scorer", seed: int = 0, table: Path | None = None, **settings: Any) -> Path:
    """The file of a scorer that learned 2,000 drawings, or a `table` of some of them. `seed` of the drawings."""
    pictures, path = folder / f"pictures_{score}_{seed}", folder / score / f"{name}.safetensors"
    if not path.is_file():
        ratings = drawn_pictures(pictures, 2000, score, seed)
        settings = {"scorer_kind": "latent_resnet", "max_train_steps": 1200, "image_dir": str(pictures), **settings}
        train_scorer(path.parent, output_name=name, train_data_file=str(table or ratings), cache_dir=str(pictures / "cache"), **settings)
    return path


def learned_from_few(folder: Path, score: str, *, name: str | None = None, **settings: Any) -> Path:
    """The same from 100 ratings, and 30 to choose its step by: a scorer that can be gamed."""
    ratings, table = drawn_pictures(folder / f"pictures_{score}_0", 2000, score, 0), folder / score / "100_ratings.csv"
    if not table.is_file():
        write_subset(ratings, table, range(130), ["train"] * 100 + ["validation"] * 30)
    settings = {"max_train_steps": 400, "train_batch_size": 32, **settings}
    return learned_scorer(folder, score, name=name or table.stem, table=table, **settings)


def independent_judge(folder: Path, score: str) -> Path:
    """Another kind of scorer, from other drawings."""
    kind = {"scorer_kind": "transformers_cnn", "scorer_size": "resnet-tiny", "max_train_steps": 600}
    return learned_scorer(folder, score, name="judge", seed=1, **kind)


def train_scorer(output_dir: Path, **settings: Any) -> BackboneScorer:
    """Train with BASE changed by `settings`, and load what came of it."""
    path = train(build_config(LatentScorerConfig, {**BASE, "output_dir": str(output_dir), **settings}))
    scorer = load_scorer(path)
    assert isinstance(scorer, BackboneScorer)
    return scorer


def rated_task(output_dir: Path, **settings: Any) -> Task:
    """What a run with these settings would learn, without learning it."""
    config, accelerator = build_config(LatentScorerConfig, {**BASE, "output_dir": str(output_dir), **settings}), Accelerator()
    tasks, _ = load_tasks(config, make_source(config.model, accelerator), accelerator)
    return tasks[0]


def write_subset(source: Path, target: Path, rows: Sequence[int], splits: Sequence[str]) -> Path:
    """A table with these rows of `source` only, each in a split. Paths stay valid when `source`'s folder is the image_dir."""
    with source.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        entries, columns = list(reader), list(reader.fieldnames or ())
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "split"])
        writer.writeheader()
        writer.writerows({**entries[row], "split": split} for row, split in zip(rows, splits, strict=True))
    return target


def columns_of(table: SigmaTable, metric: str) -> list[float]:
    """The metric at each of SIGMAS."""
    return [next(row[metric] for row in table if row["sigma"] == sigma) for sigma in SIGMAS]


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def activation_bytes(scorer: BackboneScorer, latents: torch.Tensor) -> int:
    """Bytes that autograd keeps between the forward and the backward pass to the latents, parameters not counted."""
    own = {parameter.data_ptr() for parameter in scorer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = scorer(latents.detach().requires_grad_(True), torch.zeros(len(latents)))
    assert scores.requires_grad
    return sum(kept.values())


def write_results(path: Path, rows: Iterable[Mapping[str, Any]], markdown: str) -> None:
    """`path`.json and `path`.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")
