"""Latent scorers on real pictures: subjects of clip-art, distortions of photographs, an opinion distilled, and one score in any bucket.

    python -m benchmarks.package_pictures && python -m benchmarks.photo_vae      the pictures, and latents for them
    python -m benchmarks.real_pictures --data_dir output/real_pictures           about half an hour on one core

Everything of ours is run as a user runs it: train_latent_scorer.py and tools/score_images.py, on tables of pictures. Beside it, one
network of timm, a ResNet-18 of half the width, is trained on pixels and on the same VAE's latents: as many steps, the same pictures, the
same learning rate. Test pictures are never trained on: a quarter of every subject's drawings, and 60 photographs that the VAE did not
see either. Writes benchmarks/results/real_pictures.json and .md.
Needs timm and torchvision; `setup_and_run.py test` puts them into the folder .optional.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.package_pictures import photographs, split
from benchmarks.photo_crops import DISTORTIONS, SIZES, colourfulness, write_cuts
from benchmarks.photo_vae import NUM_TEST_PHOTOGRAPHS, split_clipart
from benchmarks.real_pictures_report import markdown
from benchmarks.same_content import same_content
from benchmarks.timm_network import BATCH_SIZE, LEARNING_RATE, Stack, fit, outputs_of, stacks
from library.atomic_files import atomic_write_text
from library.models.loading import load_vae
from library.models.vae import decode_latents, encode_images
from library.scorer_training.criteria.metrics import spearman, top_k_accuracy
from library.scorers.base import BackboneScorer
from library.scorers.io import load_scorer
from library.scorers.optional_packages import import_timm

ROOT = Path(__file__).resolve().parents[1]
BUCKETS = {"resolution": "128", "min_bucket_reso": 96, "max_bucket_reso": 160, "bucket_reso_steps": 16}
ENLARGE = 2  # what a VAE hides of a picture it may show of the same picture enlarged
COLOURFULNESS = "benchmarks.photo_crops:colourfulness"


def run(*words: object) -> float:
    """Run a script of the project as a user does, and return the CPU seconds that it took."""
    before = _children_seconds()
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)
    return _children_seconds() - before


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def flags(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def train(place: "Place", table: Path | None, output_dir: Path, **settings: Any) -> float:
    """Train a scorer by the script; returns the CPU seconds, reading and encoding the pictures among them."""
    defaults = {
        "vae": place.vae_dir,
        **({"train_data_file": table} if table else {}),
        "cache_dir": place.runs / "latent_cache",
        "output_dir": output_dir,
        "max_train_steps": place.steps,
        "train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "scorer_size": "small",
        "validate_every_n_steps": 100,
        "lr_warmup_steps": 0.1,
        "ema_decay": 0.99,
        "vae_batch_size": 32,
        "num_threads": 1,
        **BUCKETS,
    }
    return run("train_latent_scorer.py", *flags({**defaults, **settings}))


def score(images: Path, output_dir: Path, vae: Path | None = None, **settings: Any) -> list[dict[str, str]]:
    """Score pictures by the script; returns the rows of its table."""
    given = {"images": images, "output_dir": output_dir, "batch_size": 32, **({"vae": vae} if vae else {}), **BUCKETS, **settings}
    run("tools/score_images.py", *flags(given))
    return read_rows(output_dir / "scores.csv")


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# -- the experiments: each fills in its part of the results -----------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the pictures are, the VAE that reads them, and how long trainings are."""

    data_dir: Path
    vae: AutoencoderKL
    steps: int

    @property
    def vae_dir(self) -> Path:
        return self.data_dir / "photo_vae"

    @property
    def runs(self) -> Path:
        return self.data_dir / "runs"

    @property
    def unseen(self) -> list[Path]:
        """The test photographs."""
        return split(photographs(self.data_dir), NUM_TEST_PHOTOGRAPHS)[1]

    def encode(self, pixels: Tensor) -> Tensor:
        return encode_images(self.vae, pixels)

    def scorer(self, run_name: str) -> BackboneScorer:
        scorer = load_scorer(self.runs / run_name / "scorer.safetensors")
        assert isinstance(scorer, BackboneScorer)
        return scorer


def distilled(place: Place) -> dict[str, Any]:
    """An opinion about pixels, colourfulness, labels pictures and becomes a latent scorer: two commands."""
    cuts, folder = write_cuts(place.data_dir), place.runs / "colourfulness"
    labels = score(cuts, folder / "labels", judge=COLOURFULNESS)
    seconds = train(place, folder / "labels" / "scores.csv", folder, scorer_size="tiny")
    scorer = place.scorer(folder.name)
    test = write_rows(place.runs / "colours.csv", [{"path": row["path"]} for row in labels if row["split"] == "test"])
    whole = write_rows(place.runs / "photographs.csv", [{"path": path} for path in place.unseen])
    result: dict[str, Any] = {"train": sum(row["split"] == "train" for row in labels), "seconds": seconds}
    result["by sigma, validation"] = scorer.spec.training["validation"]
    for name, table in (("cuts", test), ("whole photographs", whole)):
        rows = score(table, folder / name.replace(" ", "_"), place.vae_dir, scorer=folder / "scorer.safetensors", judge=COLOURFULNESS)
        scores, truths = (torch.tensor([float(row[column]) for row in rows]) for column in ("score", "colourfulness"))
        result[name] = {"test": len(rows), "srcc": spearman(scores, truths)}
        if name == "cuts":
            result["by bucket"] = by_bucket(rows, scores, truths, scorer.spec.std)
    return result


@torch.no_grad()
def left_by_the_vae(place: Place) -> dict[str, Any]:
    """How much of the opinion survives the VAE: the function of pixels on the test cuts, against itself on what the VAE makes of them."""
    cuts = write_cuts(place.data_dir)
    paths = [cuts.parent / row["path"] for row in read_rows(cuts) if row["split"] == "test"]
    stacked = stacks(paths, torch.zeros(len(paths)), unchanged, BUCKETS)
    pixels = [chunk for stack in stacked for chunk in stack.inputs.split(32)]
    restored = [decode_latents(place.vae, place.encode(chunk)).clamp(-1, 1) for chunk in pixels]
    before, after = (torch.cat([colourfulness(chunk / 2 + 0.5) for chunk in chunks]) for chunks in (pixels, restored))
    return {"test": len(before), "srcc": spearman(before, after)}


def distortions(place: Place) -> dict[str, Any]:
    """SRCC with the strength of each distortion on cuts of photographs never seen: one backbone, a head for each kind."""
    cuts, folder = write_cuts(place.data_dir, ENLARGE), place.runs / "distortions"
    rows = read_rows(cuts)
    tables = []
    for kind in DISTORTIONS:
        mine = [{**row, "path": cuts.parent / row["path"]} for row in rows if row["kind"] == kind]
        table = write_rows(folder / f"{kind}.csv", mine)
        tables.append(f'[[datasets]]\nname = "{kind}"\ncriterion = "mse"\n[[datasets.subsets]]\npath = "{table.as_posix()}"\n')
    atomic_write_text(folder / "dataset.toml", "\n".join(tables))
    seconds = train(
        place,
        None,
        folder,
        dataset_config=folder / "dataset.toml",
        clean_fraction=1,
        scorer_size="tiny",
        validate_every_n_steps=place.steps,
    )
    scorer, test = place.scorer("distortions"), test_cuts(place)
    stacked = stacks([Path(row["path"]) for row in test], torch.arange(len(test)), place.encode, BUCKETS)

    @torch.no_grad()
    def read(latents: Tensor) -> Tensor:
        return torch.cat([scorer.outputs(kind, latents, latents.new_zeros(len(latents))).mean(1) for kind in DISTORTIONS], dim=1)

    outputs, order = outputs_of(read, stacked)
    return {
        "train": sum(row["split"] == "train" for row in rows),
        "test": len(test),
        "network": "latent_resnet",
        "seconds": seconds,
        "parameters": num_parameters(scorer),
        "srcc": by_kind(test, outputs[order.argsort()]),
    }


def distortions_on_pixels(place: Place) -> dict[str, Any]:
    """The same by a network that sees what the VAE may have lost."""
    cuts, test, kinds = write_cuts(place.data_dir, ENLARGE), test_cuts(place), list(DISTORTIONS)
    training = [row for row in read_rows(cuts) if row["split"] == "train"]
    targets = torch.tensor(
        [[float(row["score"]), kinds.index(row["kind"])] for row in training]
    )  # [N, 2]: strength, and whose head learns it
    stacked = stacks([cuts.parent / row["path"] for row in training], targets, unchanged, BUCKETS)

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        mine = outputs.gather(1, wanted[:, 1:].long()).squeeze(1)
        return F.mse_loss(mine, (wanted[:, 0] - 0.5) * 12**0.5)

    network, seconds = fit(stacked, len(kinds), loss, place.steps)
    # Buckets come in another order than the rows: a target tells which row it is.
    outputs, order = outputs_of(network, stacks([Path(row["path"]) for row in test], torch.arange(len(test)), unchanged, BUCKETS))
    name = "timm resnet18, half width, pixels"
    srcc = by_kind(test, outputs[order.argsort()])
    return {"network": name, "seconds": seconds, "parameters": num_parameters(network), "srcc": srcc}


def test_cuts(place: Place) -> list[dict[str, str]]:
    cuts = write_cuts(place.data_dir, ENLARGE)
    return [{**row, "path": str(cuts.parent / row["path"])} for row in read_rows(cuts) if row["split"] == "test"]


def by_kind(test: Sequence[Mapping[str, str]], outputs: Tensor) -> dict[str, float]:
    """SRCC of each kind's strengths with the output that stands for it: outputs [N, kinds] of the N test cuts."""
    strengths = torch.tensor([float(row["score"]) for row in test])
    result = {}
    for column, kind in enumerate(DISTORTIONS):
        chosen = torch.tensor([row["kind"] == kind for row in test])
        result[kind] = spearman(outputs[chosen, column], strengths[chosen])
    return result


def one_content(place: Place) -> dict[str, Any]:
    return same_content(place.unseen, place.vae, place.scorer("colourfulness"))


def subjects(place: Place) -> dict[str, Any]:
    """Top-1 and top-5 of the subjects of drawings by our scorer."""
    training, test = split_clipart(place.data_dir)
    rows = [{"path": path, "label": subject, "split": "train" if number % 10 else "val"} for number, (path, subject) in enumerate(training)]
    table = write_rows(place.runs / "clipart.csv", rows)
    seconds = train(place, table, place.runs / "clipart", criterion="classification", clean_fraction=1)
    scorer = place.scorer("clipart")
    names = sorted({subject for _, subject in training})
    order = [scorer.spec.head().classes.index(name) for name in names]

    def network(latents: Tensor) -> Tensor:
        return scorer.outputs(scorer.spec.score_head, latents, latents.new_zeros(len(latents))).mean(1)[:, order]

    most = max(sum(subject == name for _, subject in test) for name in names)
    return {
        "classes": len(names),
        "train": len(training),
        "test": len(test),
        "most frequent class": most / len(test),
        "network": "latent_resnet",
        "seconds": seconds,
        "parameters": num_parameters(scorer),
        **accuracy(network, labelled(test, names, place.encode)),
    }


def subjects_by_timm(place: Place, encode: Callable[[Tensor], Tensor], what: str) -> dict[str, Any]:
    """The same by a network of timm, trained on what `encode` makes of pixels."""
    training, test = split_clipart(place.data_dir)
    names = sorted({subject for _, subject in training})
    ours = [entry for number, entry in enumerate(training) if number % 10]  # as many as the script trains on
    loss = lambda outputs, wanted: F.cross_entropy(outputs, wanted, label_smoothing=0.1)  # noqa: E731
    network, seconds = fit(labelled(ours, names, encode), len(names), loss, place.steps)
    name = f"timm resnet18, half width, {what}"
    found = accuracy(network, labelled(test, names, encode))
    return {"network": name, "seconds": seconds, "parameters": num_parameters(network), **found}


def subjects_on_latents(place: Place) -> dict[str, Any]:
    return subjects_by_timm(place, place.encode, "latents")


def subjects_on_pixels(place: Place) -> dict[str, Any]:
    return subjects_by_timm(place, unchanged, "pixels")


def labelled(entries: Sequence[tuple[Path, str]], names: Sequence[str], encode: Callable[[Tensor], Tensor]) -> list[Stack]:
    labels = torch.tensor([names.index(subject) for _, subject in entries])
    return stacks([path for path, _ in entries], labels, encode, BUCKETS)


def accuracy(network: Callable[[Tensor], Tensor], stacked: Sequence[Stack]) -> dict[str, float]:
    outputs, labels = outputs_of(network, stacked)
    return {"top1": top_k_accuracy(outputs, labels, 1), "top5": top_k_accuracy(outputs, labels, 5), "tested": len(labels)}


def unchanged(pixels: Tensor) -> Tensor:
    return pixels


def by_bucket(rows: Sequence[Mapping[str, str]], scores: Tensor, truths: Tensor, std: float) -> dict[str, dict[str, float]]:
    """How well, and how far off on average, a scorer is in each bucket; in standard deviations of the score."""
    sizes = [Image.open(row["path"]).size for row in rows]
    result = {}
    for size in SIZES:
        chosen = torch.tensor([entry == size for entry in sizes])
        error = (scores - truths)[chosen] / std
        entry = {"test": int(chosen.sum()), "srcc": spearman(scores[chosen], truths[chosen]), "mean error": error.mean().item()}
        result[f"{size[0]}x{size[1]}"] = entry
    return result


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


STAGES: Mapping[str, Callable[[Place], dict[str, Any]]] = {
    "distilled": distilled,
    "distilled, left by the VAE": left_by_the_vae,
    "distortions": distortions,
    "same content": one_content,
    "subjects": subjects,
    "subjects, timm on latents": subjects_on_latents,
    "subjects, timm on pixels": subjects_on_pixels,
    "distortions, timm on pixels": distortions_on_pixels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=ROOT / "output" / "real_pictures")
    parser.add_argument("--steps", type=int, default=400, help="of every training")
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES), help="what to do; others stay as they are")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "real_pictures")
    parser.add_argument("--packages_dir", type=Path, help="where timm and torchvision are, such as .optional, if they are not installed")
    args = parser.parse_args()
    if args.packages_dir is not None:
        sys.path.append(
            str(args.packages_dir.resolve())
        )  # of this process alone: beside a torch for the CPU torchvision breaks the scripts
    if any("timm" in stage for stage in args.stages):
        import_timm()  # before half an hour is spent
    torch.set_num_threads(1)

    data_dir: Path = args.data_dir.resolve()
    place = Place(data_dir, load_vae(data_dir / "photo_vae"), args.steps)
    file: Path = args.results.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    results |= {"batch_size": BATCH_SIZE, "vae": json.loads((place.vae_dir / "training.json").read_text())}
    for stage in args.stages:
        results[stage] = {"steps": args.steps, **STAGES[stage](place)}
        atomic_write_text(file, json.dumps(results, indent=1) + "\n")
        atomic_write_text(args.results.with_suffix(".md"), markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
