"""Measure what a slider does on prompts it may never have seen, and show it.

    python tools/evaluate_slider.py --pretrained_model_name_or_path sd15.safetensors --network_weights slider.safetensors \
        --scorer scorer.safetensors --judges my_judges.py:sharpness --prompts_file prompts.txt --output_dir evaluation

Every prompt is sampled with several seeds at several weights of the LoRA; the pictures are scored by the slider's own scorer and by
judges that training never saw. Writes evaluation.json, curve.png, grid.png and report.html (one file, to be attached to the page where
the slider is offered), the cards NAME.json, NAME.metadata.json and NAME.preview.png for the programs that show LoRAs, and prints the table.
The LoRA may be anybody's: kohya's, LyCORIS' (LoCon, LoHa, LoKr, DoRA), PEFT's or Diffusers', as .safetensors or .pt. Several files, also
by a pattern such as "output/slider-step*.safetensors", are measured on the same prompts and seeds and shown side by side, each with
its difference from the first.
"""

import glob
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, so that the script runs from anywhere

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

import numpy as np
import torch

from library.atomic_files import atomic_write_bytes, atomic_write_text, load_tensors, remove_unfinished
from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.measuring.comparison import comparison_dict, summarise
from library.measuring.judges import load_judges
from library.measuring.measure import Measurer, Raters, seed_table
from library.measuring.record import FORMAT, EvaluationRecord
from library.measuring.warnings import final_warnings
from library.models.config import ModelConfig
from library.prompts.contents import GIVE_PROMPTS
from library.prompts.files import load_prompts, spread
from library.reports.plots import LIGHT, multiplier_grid, png_bytes, record_plots
from library.reports.report import html_report
from library.reports.text import comparison_text, text_table
from library.rollouts.few_step import choose_sampling
from library.rollouts.sample import SamplingConfig, variations
from library.scorers.io import check_scorer_fits, load_scorer
from library.settings.cli import parse_config, run_main
from library.settings.options import check_at_least, option
from library.slider_training.outcome import Outcome
from library.slider_training.previews import CARD_PROMPTS, card_picture
from library.training.output_files import check_outputs
from library.training.runtime import choose_precision, set_num_threads, weight_dtype
from networks.lora import create_network_from_weights
from networks.lora_metadata import write_cards

# Metadata of a LoRA file, and what the report calls it.
ORIGIN = {
    "ss_sd_model_name": "trained on",
    "ss_leco_scorer": "scorer",
    "ss_leco_score_estimator": "score estimator",
    "ss_steps": "training steps",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer",
    "ss_seed": "training seed",
    "modelspec.usage_hint": "how to use it",
    "modelspec.description": "what it promises",
    "ss_leco_conclusion": "what its training found",
    "ss_leco_scorer_worth": "what its scorer is worth",
    "ss_training_comment": "comment",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, how, and where the results go."""

    network_weights: tuple[str, ...] = option(
        (), help="LoRA files, or patterns such as output/slider-step*.safetensors; several are shown side by side."
    )
    scorer: tuple[Path, ...] = option((), help="Scorer files that train_latent_scorer.py wrote; the first is the one trained on.")
    judges: tuple[str, ...] = option(
        (),
        help="Functions of pixels, package.module:function or file.py:function, that training never saw; "
        "with =stay one that should not move, with =share a yes or no that must not fall.",
    )
    judge_scorers: tuple[str, ...] = option((), help="More judges: scorer files that training did not follow.")
    allow_code: tuple[str, ...] = option(
        (), help="Code that scorer files may run, as they ask for it, such as my_scorer.py:score.", only_with=("scorer", "judge_scorers")
    )
    prompts_file: Path | None = option(None, help="Prompts (.txt, .toml, .yaml, .json, .csv or .tsv), best ones that training did not use.")
    num_prompts: int = option(32, help="How many of them to take, evenly over the file.")
    seeds_per_prompt: int = option(4, help="Pictures of each prompt at each weight.")
    seed: int = option(0, help="First seed; no two pairs of prompt and seed share one.")
    multipliers: tuple[float, ...] = option(
        (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0), help="LoRA weights to measure at; 0 is always among them."
    )
    num_steps: int | None = option(None, help="Sampling steps; not set: 20, or as many as a few-step base is made for.")
    guidance_scale: float | None = option(
        None,
        help="Classifier-free guidance of the prompts that do not bring their own; 1 is none; not set: 5, or none for a few-step base.",
    )
    guidance_rescale: float = option(0.0, help="How far the guided prediction is rescaled to the contrast of the unguided, 0 to 1.")
    sampler: str | None = option(None, choices=SOLVERS, help="Sampler; not set: ddim, or that of a few-step base.")
    also: tuple[str, ...] = option(
        (),
        help="Other ways of sampling to measure weights +1 and -1 with, each changing one thing: guidance_scale=3,8 sampler=euler_a "
        "num_steps=30.",
    )
    resolution: tuple[int, ...] = option((), help="Width and height (or one number) in pixels, multiples of 8; default the model's own.")
    batch_size: int | None = option(None, help="Pictures sampled together; not set: what suits their size and the free memory.")
    num_grid_prompts: int = option(6, help="Rows of the picture grid.")
    mixed_precision: str | None = option(
        None,
        choices=("no", "fp16", "bf16"),
        help="Precision that the model computes in. no: float32. Not set: bf16 on a GPU that has it, else fp16; float32 on a CPU.",
    )
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")
    title: str | None = option(None, help="Heading of the report; not set: the sliders' names.")
    output_dir: Path = option(Path("evaluation"), help="Folder for the results.")

    def __post_init__(self) -> None:
        if not self.network_weights:
            raise UserError("network_weights is not set; give at least one LoRA file")
        if not self.scorer and not self.judges and not self.judge_scorers:
            raise UserError("neither scorer nor judges is set; give a scorer file, a judge such as file.py:function, or both")
        if self.prompts_file is None:
            raise UserError(f"prompts_file is not set; {GIVE_PROMPTS}")
        if not any(self.multipliers):
            raise UserError("multipliers holds no weight but 0; give at least one other, for example -1 0 1")
        check_at_least(self, 1, "num_prompts", "num_steps", "batch_size", "num_grid_prompts", "num_threads", "guidance_scale")
        check_at_least(self, 2, "seeds_per_prompt")
        check_at_least(self, 0, "seed")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale is {self.guidance_rescale:g}; it must be between 0 and 1")
        if len(self.resolution) > 2 or any(pixels <= 0 or pixels % 8 for pixels in self.resolution):
            raise UserError(f"resolution is {list(self.resolution)}; it must be one or two positive multiples of 8 (width, height)")
        _ = variations(SamplingConfig(num_steps=1, guidance_scale=1.0, size=(8, 8)), self.also)

    def size(self, native: int) -> tuple[int, int]:
        """(height, width) in pixels, for a model of this native resolution."""
        width, height = (self.resolution * 2)[:2] or (native, native)
        return height, width


@dataclass(frozen=True, kw_only=True)
class EvaluateSliderConfig:
    model: ModelConfig
    evaluation: EvaluationConfig


def main() -> None:
    config = parse_config(EvaluateSliderConfig, description="Measure what a slider LoRA does, and show it.")
    settings = config.evaluation
    set_num_threads(settings.num_threads)
    assert settings.prompts_file is not None
    prompts = spread(load_prompts(settings.prompts_file), settings.num_prompts)
    files = expand(settings.network_weights)
    sliders = slider_names(files)
    scorers = {scorer.name: scorer for scorer in (load_scorer(path, settings.allow_code) for path in settings.scorer)}
    judges = load_judges(settings.judges, settings.judge_scorers, training_files=settings.scorer, allow_code=settings.allow_code)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = config.model.load(dtype=weight_dtype(choose_precision(settings.mixed_precision, device)), device=device)
    for scorer in scorers.values():
        check_scorer_fits(scorer.to(device), model.vae_fingerprint())
    check_outputs(*(settings.output_dir / name for name in ("evaluation.json", "report.html", "curve.png")))
    remove_unfinished(settings.output_dir, r".+\.(png|json|html|csv)")

    names = ("num_steps", "guidance_scale", "guidance_rescale", "sampler", "batch_size")
    sampling = choose_sampling(model, settings.size(model.spec.resolution), **{name: getattr(settings, name) for name in names})
    measurer = Measurer(
        model=model,
        raters=Raters(scorers=scorers, judges=judges.on(model)),
        prompts=prompts,
        seeds=seed_table(prompts, settings.seeds_per_prompt, settings.seed),
        sampling=sampling,
        num_pictures=max(settings.num_grid_prompts, CARD_PROMPTS),
    )
    others = {name: replace(measurer, sampling=own, num_pictures=0) for name, own in variations(sampling, settings.also).items()}
    records = [measure(measurer, others, file, name, settings) for file, name in zip(files, sliders, strict=True)]
    paths = write_results(settings.output_dir, records, settings.title, settings.num_grid_prompts)
    for file, record in zip(files, records, strict=True):
        outcome = Outcome(step=0, record=record, warnings=tuple(final_warnings(record)))
        folder = settings.output_dir / Path(record.name).parent  # sliders of one file name keep the folders that tell them apart
        folder.mkdir(parents=True, exist_ok=True)
        paths += write_cards(file, model.spec, outcome.card(), folder)
        if (picture := card_picture(outcome)) is not None:
            paths.append(folder / f"{file.stem}.preview.png")
            atomic_write_bytes(paths[-1], png_bytes(picture))
    print("\n\n".join(map(text_table, records)))
    print(f"\n{comparison_text(records)}\n\n" + "\n".join(map(str, paths)))


def measure(measurer: Measurer, others: Mapping[str, Measurer], file: Path, name: str, settings: EvaluationConfig) -> EvaluationRecord:
    """Attach one LoRA, measure it, also as the others sample, and take it off again."""
    model = measurer.model
    network, _ = create_network_from_weights(1.0, file, model.vae, model.text_encoders, model.unet, for_inference=True)
    network.to(model.device)
    network.apply_to(model.text_encoders, model.unet)
    try:
        record = measurer.measure(network, settings.multipliers, name=name)
        ends = [record.multipliers[place] for place in record.ends]
        elsewhere = tuple(other.measure(network, ends, name=words) for words, other in others.items())
    finally:
        network.remove()
    for score in record.responses.values():
        if (broken := ~np.isfinite(score.values).all((0, 1))).any():
            weight = record.multipliers[int(broken.argmax())]
            raise UserError(f"{name}: {score.name} is not finite at weight {weight:g}; the model, the LoRA or the scorer is broken there")
    assert settings.prompts_file is not None
    judges = ", ".join(measurer.raters.judges.names)
    files = {"model": model.spec.name, "LoRA": file.name, "prompts file": settings.prompts_file.name, "judges": judges}
    return replace(record, settings=files | record.settings, origin=origin_of(file), elsewhere=elsewhere)


def write_results(output_dir: Path, records: Sequence[EvaluationRecord], title: str | None, num_rows: int) -> list[Path]:
    """Write the JSON, the PNGs and the report, with pictures of num_rows prompts, and return their paths."""
    records = [replace(record, pictures=record.pictures[:num_rows]) for record in records]
    pngs = {output_dir / "curve.png": next(iter(record_plots(records).values()))(LIGHT)}
    for record in records:
        labels = [f"{record.prompts[row]} (seed {record.seeds[row][0]})" for row in range(len(record.pictures))]
        name = "grid.png" if len(records) == 1 else f"grid_{record.name.replace('/', '_')}.png"
        pngs[output_dir / name] = multiplier_grid(record.pictures, labels, record.multipliers)
    for path, content in pngs.items():
        atomic_write_bytes(path, content)
    results, report = output_dir / "evaluation.json", output_dir / "report.html"
    content = {
        "format": FORMAT,
        "sliders": [record.to_dict() | {"summary": summarise(record).to_dict()} for record in records],
        "comparison": comparison_dict(records),
    }
    atomic_write_text(results, json.dumps(content, indent=1, allow_nan=False))
    atomic_write_text(report, html_report(records, title))
    return [results, *pngs, report]


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that names and patterns stand for, those of a pattern by the numbers in their names."""
    files: list[Path] = []
    for pattern in map(os.path.expanduser, patterns):
        found = [Path(pattern)] if Path(pattern).is_file() else [path for path in map(Path, glob.glob(pattern)) if path.is_file()]
        if not found:
            raise UserError(f"network_weights {pattern} does not exist; give the .safetensors file of a LoRA, or a pattern that finds some")
        found.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
        files += found
    return list(dict.fromkeys(files))


def origin_of(file: Path) -> dict[str, str]:
    """What a LoRA file's metadata says of how it was made."""
    _, metadata = load_tensors(file)
    return {name: _plain(metadata[key]) for key, name in ORIGIN.items() if key in metadata}


def _plain(value: str) -> str:
    """A list of names as people write it."""
    return ", ".join(re.findall(r'"([^"]*)"', value)) if value.startswith('["') else value


def slider_names(files: Sequence[Path]) -> list[str]:
    """File names without their ending, with as many folders before them as it takes to tell them apart."""
    paths = [file.resolve().with_suffix("") for file in files]
    if len(set(paths)) < len(paths):
        raise UserError(f"network_weights names a slider twice: {', '.join(map(str, files))}; give each file once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


if __name__ == "__main__":
    run_main(main)
