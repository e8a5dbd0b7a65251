"""Sliders of the shapes world, trained where they are not there, and what functions of pixels say of them on held-out prompts."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks import ROOT
from benchmarks.shapes_runs import MODEL, VAE, independent_judge, learned_scorer, written_prompts
from examples.shapes.scores import SCORES as TRUE_SCORES
from library.measuring.judges import Judges
from library.measuring.measure import Measurer, Raters, seed_table
from library.measuring.pictures import Part
from library.measuring.record import EvaluationRecord
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.prompts.files import load_prompts, spread
from library.rollouts.sample import SamplingConfig
from library.scorers.io import load_scorer
from library.scorers.judges import load_judge
from library.settings.cli import read_config_file
from library.settings.options import build_config, options
from library.training.tracking import read_metrics
from networks.lora import LoRANetwork, create_network_from_weights
from train_leco_score import leco_score_config, train

Row = dict[str, Any]
OUTPUT = ROOT / "output" / "proofs"
scorer, prompts = partial(learned_scorer, OUTPUT), partial(written_prompts, OUTPUT / "prompts")
CAPTIONS = "examples.shapes.judge:caption_obeyed"
SCORES = ("brightness", "size", "warmth")
JUDGES = [CAPTIONS, "examples.shapes.judge:size_shown", *(f"examples.shapes.scores:{score}" for score in TRUE_SCORES)]
PLAIN: Row = {"max_train_steps": 120, "measure": "off"}  # as trained: neither stopped, chosen nor calibrated
UNIT_SEEDS = 8  # of the base model: the unit is harder to know than the gain


def slider(name: str, **changes: Any) -> Path:
    """Train a slider with the example's settings and the program's own calibration, changed; or take the one that is there."""
    folder = OUTPUT / name
    path = folder / "slider.safetensors"
    if not path.is_file():
        settings: Row = read_config_file(ROOT / "examples" / "shapes" / "slider.toml", options(leco_score_config()))
        settings |= {"prompts_file": str(prompts()[0]), "output_dir": str(folder), "output_name": "slider", "num_threads": 1}
        train(build_config(leco_score_config(), settings | {"calibrate": "visible", "sample_every_n_steps": ""} | changes))
    return path


@cache
def measurer(
    model: Path,
    prompts_file: Path,
    count: int,
    sampler: str = "ddim",
    num_steps: int = 20,
    guidance: float = 3.0,
    judge_of: str | None = None,
) -> Measurer:
    """One for all sliders that are measured alike, so that the base model's pictures are made once. `judge_of`: a score that another kind
    of scorer judges, too, which learned it from other drawings."""
    found = spread(load_prompts(prompts_file), count)
    scorers = {} if judge_of is None else {"judge": load_scorer(independent_judge(OUTPUT, judge_of))}
    return Measurer(
        model=load_model(str(model), vae=None if (model / "vae").is_dir() else VAE).freeze(),
        raters=Raters(judges=Judges({name.rpartition(":")[2]: load_judge(name) for name in JUDGES}, scorers)),
        prompts=found,
        seeds=seed_table(found, UNIT_SEEDS, first=50_000),
        sampling=SamplingConfig(num_steps=num_steps, guidance_scale=guidance, size=(64, 64), sampler=sampler),
    )


@contextmanager
def attached(model: DiffusionModel, path: Path) -> Iterator[LoRANetwork]:
    """A slider's file on a model, and off again at the end."""
    network, _ = create_network_from_weights(1.0, path, model.vae, model.text_encoders, model.unet, for_inference=True)
    network.apply_to(model.text_encoders, model.unet)
    try:
        yield network
    finally:
        network.remove()


def measure(
    path: Path,
    prompts_file: Path | None = None,
    *,
    weights: tuple[float, ...] = (-1.0, 1.0),
    model: Path = MODEL,
    count: int = 32,
    seeds: int = 2,
    **others: Any,
) -> EvaluationRecord:
    """What a slider does at these weights on `count` (held-out) prompts with so many seeds; kept beside it. `others` are `measurer`'s."""
    prompts_file = prompts_file or prompts()[1]
    parts = (path.stem, prompts_file.stem, count, seeds, *weights, *others.values())
    kept = path.with_name("_".join(map(str, parts)) + ".json")
    if kept.is_file():
        return EvaluationRecord.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    used = measurer(model, prompts_file, count, **others)
    with attached(used.model, path) as network:
        record = used.measure(network, weights, part=Part(range(len(used.prompts)), slice(0, seeds)))
    kept.write_text(json.dumps(record.to_dict()), encoding="utf-8")
    return record


def row(run: str, path: Path, score: str | None, *, other: str | None = None, stops_at: float | None = None, **measured: Any) -> Row:
    """A line of a table: true gains of a score, and of another one; captions obeyed at -1, 0 and +1; of a calibrated slider, whose training
    stops at a gain of `stops_at`, also what its file promises."""
    record, found = measure(path, **measured), Row(run=run)
    if stops_at is not None:
        found |= promise(path) | {
            "trained to": [gain / stops_at for gain in last_gains(path)],
            "told apart": [record.visible_share(place) for place in (0, 2)],
        }
    for word, name in (("true", score), ("other", other)):
        if name is not None:
            gains = record.responses[name].gains_std
            found |= {f"{word} -1": gains[0].to_list(), f"{word} +1": gains[2].to_list()}
    if score is not None:
        found["captions"] = [share.value for share in record.responses["caption_obeyed"].means]
    return found


def promise(path: Path) -> Row:
    """What the file says of weight +1 and -1, and in words."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    gains = {f"promised {end}": json.loads(metadata.get(f"ss_leco_gain_{name}", "null")) for end, name in (("-1", "down"), ("+1", "up"))}
    return {name: gain for name, gain in gains.items() if gain} | {"says": metadata["modelspec.description"].partition(". ")[0]}


def last_gains(path: Path) -> list[float]:
    """The training score's, measured last while training, at -1 and +1; above 0 when all is well."""
    measured = [entry for entry in read_metrics(path.with_suffix(".metrics.jsonl")) if entry.get("gain_at_+1") is not None][-1]
    return [sign * (measured[f"gain_at_{sign:+d}"] or 0.0) for sign in (-1, 1)]


def plain_prompts(path: Path) -> list[str]:
    """Those of a file that say nothing of size."""
    return [prompt.prompt for prompt in load_prompts(path) if not any(word in prompt.prompt for word in ("large", "small", "medium"))]


def written(path: Path, lines: Sequence[str]) -> Path:
    """A prompt file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
