"""Measure what a slider does on prompts it may never have seen, and show it.

    python tools/evaluate_slider.py --pretrained_model_name_or_path sd15.safetensors --network_weights slider.safetensors \
        --scorer scorer.safetensors --judges my_judges.py:sharpness --prompts_file prompts.txt --output_dir evaluation

Every prompt is sampled with several seeds at several weights of the LoRA; the pictures are scored by the slider's own scorer and by
judges that training never saw. Writes evaluation.json, curve.png, grid.png and report.html, and prints the table. Several LoRA
files are measured on the same prompts and seeds, side by side.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, so that the script runs from anywhere

from library.atomic_files import atomic_write_bytes, atomic_write_text
from library.cli import parse_config, run_main
from library.config import ModelConfig, check_at_least, option
from library.errors import UserError
from library.evaluation import SliderEvaluation, evaluate
from library.findings import text_table
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.plots import multiplier_grid, score_curves
from library.prompts import load_prompts, spread
from library.report import html_report
from library.runtime import check_writable, set_num_threads, weight_dtype
from library.scorers.base import Scorer
from library.scorers.io import check_scorer_fits, load_scorer
from library.scorers.judges import Judge, load_judge
from library.solvers import SOLVERS
from library.types import PromptSpec
from networks.lora import create_network_from_weights


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, how, and where the results go."""

    network_weights: tuple[Path, ...] = option((), help="LoRA files; several are shown side by side.")
    scorer: tuple[Path, ...] = option((), help="Scorer files that train_latent_scorer.py wrote; the first is the one trained on.")
    judges: tuple[str, ...] = option((), help="Functions of pixels, package.module:function or file.py:function, that training never saw.")
    prompts_file: Path | None = option(None, help="Prompts (.txt, .toml or PartiPrompts .tsv), best ones that training did not use.")
    num_prompts: int = option(32, help="How many of them to take, evenly over the file.")
    seeds_per_prompt: int = option(4, help="Pictures of each prompt at each weight.")
    seed: int = option(0, help="First seed; no two pairs of prompt and seed share one.")
    multipliers: tuple[float, ...] = option((-1.0, -0.5, 0.0, 0.5, 1.0), help="LoRA weights to measure at; 0 is always among them.")
    num_steps: int = option(20, help="Sampling steps.")
    guidance_scale: float = option(5.0, help="Classifier-free guidance of the prompts that do not bring their own; 1 is none.")
    sampler: str = option("ddim", choices=tuple(SOLVERS), help="Sampler.")
    resolution: tuple[int, ...] = option((), help="Width and height (or one number) in pixels, multiples of 8; default the model's own.")
    batch_size: int = option(8, help="Pictures sampled together.")
    num_grid_prompts: int = option(6, help="Rows of the picture grid.")
    mixed_precision: str = option("no", choices=("no", "fp16", "bf16"), help="Precision that the model computes in; no is float32.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")
    output_dir: Path = option(Path("evaluation"), help="Folder for the results.")

    def __post_init__(self) -> None:
        if not self.network_weights:
            raise UserError("network_weights is not set; give at least one LoRA file")
        if not self.scorer and not self.judges:
            raise UserError("neither scorer nor judges is set; give a scorer file, a judge such as file.py:function, or both")
        if self.prompts_file is None:
            raise UserError("prompts_file is not set; give a .txt, .toml or .tsv file of prompts")
        if not any(self.multipliers):
            raise UserError("multipliers holds no weight but 0; give at least one other, for example -1 0 1")
        check_at_least(self, 1, "num_prompts", "num_steps", "batch_size", "num_grid_prompts", "num_threads", "guidance_scale")
        check_at_least(self, 2, "seeds_per_prompt")
        check_at_least(self, 0, "seed")
        if len(self.resolution) > 2 or any(pixels <= 0 or pixels % 8 for pixels in self.resolution):
            raise UserError(f"resolution is {list(self.resolution)}; it must be one or two positive multiples of 8 (width, height)")

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
    judges = [load_judge(name) for name in settings.judges]
    scorers = {scorer.name: scorer for scorer in map(load_scorer, settings.scorer)}
    for file in settings.network_weights:
        if not file.is_file():
            raise UserError(f"network_weights {file} does not exist; give the .safetensors file of a LoRA")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(
        config.model.pretrained_model_name_or_path,
        family=config.model.family,
        v_parameterization=config.model.v_parameterization,
        vae=config.model.vae,
        clip_skip=config.model.clip_skip,
        dtype=weight_dtype(settings.mixed_precision),
        device=device,
    )
    for scorer in scorers.values():
        check_scorer_fits(scorer.to(device), model.vae_fingerprint())
    check_writable(settings.output_dir)

    names = slider_names(settings.network_weights)
    named_judges = judge_names(judges, scorers)
    evaluations = [
        measure(model, file, name, prompts, scorers, named_judges, settings)
        for file, name in zip(settings.network_weights, names, strict=True)
    ]
    paths = write_results(settings.output_dir, evaluations)
    print("\n\n".join(map(text_table, evaluations)))
    print("\n" + "\n".join(map(str, paths)))


def measure(
    model: DiffusionModel,
    file: Path,
    name: str,
    prompts: Sequence[PromptSpec],
    scorers: Mapping[str, Scorer],
    judges: Mapping[str, Judge],
    settings: EvaluationConfig,
) -> SliderEvaluation:
    """Attach one LoRA, measure it, and take it off again."""
    network, _ = create_network_from_weights(1.0, file, model.vae, model.text_encoders, model.unet, for_inference=True)
    network.to(model.device)
    network.apply_to(model.text_encoders, model.unet)
    assert settings.prompts_file is not None
    count = settings.seeds_per_prompt
    num_weights = len({*settings.multipliers, 0.0})
    try:
        with tqdm(total=len(prompts) * count * num_weights * settings.num_steps, desc=f"sampling {name}", unit="step") as bar:
            evaluation = evaluate(
                model,
                network,
                prompts,
                [[settings.seed + row * count + column for column in range(count)] for row in range(len(prompts))],
                settings.multipliers,
                scorers,
                judges,
                num_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
                resolution=settings.size(model.spec.resolution),
                batch_size=settings.batch_size,
                solver=settings.sampler,
                name=name,
                num_pictures=settings.num_grid_prompts,
                progress=bar.update,
            )
    finally:
        network.remove()
    files = {"model": model.spec.name, "LoRA": file.name, "prompts file": settings.prompts_file.name, "judges": ", ".join(settings.judges)}
    return replace(evaluation, settings=files | evaluation.settings)


def write_results(output_dir: Path, evaluations: Sequence[SliderEvaluation]) -> list[Path]:
    """Write the JSON, the PNGs and the report, and return their paths."""
    curve = score_curves(evaluations)
    grids = [
        multiplier_grid(
            evaluation.pictures,
            [f"{evaluation.prompts[row]} (seed {evaluation.seeds[row][0]})" for row in range(len(evaluation.pictures))],
            evaluation.multipliers,
        )
        for evaluation in evaluations
    ]
    grid_names = ["grid.png"] if len(evaluations) == 1 else [f"grid_{evaluation.name.replace('/', '_')}.png" for evaluation in evaluations]
    pngs = {output_dir / "curve.png": curve} | {output_dir / name: grid for name, grid in zip(grid_names, grids, strict=True)}
    for path, content in pngs.items():
        atomic_write_bytes(path, content)
    results, report = output_dir / "evaluation.json", output_dir / "report.html"
    content = {"format": "leco_score.evaluation/1", "sliders": [evaluation.to_dict() for evaluation in evaluations]}
    atomic_write_text(results, json.dumps(content, indent=1, allow_nan=False))
    atomic_write_text(report, html_report(evaluations, curve, grids))
    return [results, *pngs, report]


def slider_names(files: Sequence[Path]) -> list[str]:
    """File names without their ending, with the folder's name where two are the same."""
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else f"{file.parent.name}/{file.stem}" for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"network_weights names two sliders alike: {', '.join(map(str, files))}; give each file once, under its own name")
    return names


def judge_names(judges: Sequence[Judge], scorers: Mapping[str, Scorer]) -> dict[str, Judge]:
    """The judges by the name of their function, by the whole name where that is taken."""
    short = [judge.name.rpartition(":")[2] for judge in judges]
    return {
        name if short.count(name) == 1 and name not in scorers else judge.name: judge for name, judge in zip(short, judges, strict=True)
    }


if __name__ == "__main__":
    run_main(main)
