"""One opinion, two models: a scorer steers every model that shares its latents, whatever predicts there and however that was trained.

    python -m benchmarks.two_models

A scorer of brightness learns from rated drawings. From that one file come sliders for the embedded U-Net, which predicts noise
(examples/shapes/model), and for the embedded transformer, which predicts the velocity of a flow (examples/shapes/flow_model): three seeds
of each, with the settings of examples/shapes/slider.toml and the program's own calibration. Reported are what each file promises, the true
gains on held-out prompts, captions obeyed, what else moved, and how well the scorer ranks each model's own unfinished pictures by the true
score of what becomes of them. What is there already is not trained again.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.proofs.__main__ import markdown
from benchmarks.proofs.runs import Row, attached, measure, measurer, prompts, row, scorer, slider
from benchmarks.proofs.strength import SEEDS, calibrated
from benchmarks.shapes_runs import FLOW_MODEL, MODEL, SIGMAS, VAE
from examples.shapes.scores import SCORES
from library.diffusion.solvers import SOLVERS
from library.measuring.measure import Measurer
from library.prompts.files import load_prompts, spread
from library.reports.plots import image_grid, signed
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import decode, guide, initial_noise, predict_branches, sample
from library.scorer_training.criteria.metrics import spearman
from library.scorers.io import load_scorer

SCORE = "brightness"
MODELS = {"U-Net": MODEL, "Z-Image": FLOW_MODEL}
RESULTS, GRID = ROOT / "benchmarks" / "results" / "two_models", ROOT / "docs" / "images" / "two_models.png"
WEIGHTS = (-1.0, 0.0, 1.0)
COUNT = 48  # prompts of a measurement, with 2 seeds each, and 4 of the base model
SHOWN = 6  # prompts of the grid
RANKED = 24  # prompts whose pictures are followed, with 4 seeds each


def slider_of(model: Path, seed: int) -> Path:
    """The slider of a model and seed; the U-Net's are those of `benchmarks.proofs calibration`."""
    if model == MODEL:
        return calibrated(SCORE, seed)
    folders = {"pretrained_model_name_or_path": str(model), "vae": str(VAE)}
    return slider(f"two_models_{SCORE}_{seed}", scorer=[str(scorer(SCORE))], seed=seed, **folders)


def strengths() -> list[Row]:
    """What each file promises of +1 and -1, and the true gain; what another true score did."""
    return [
        row(f"{name}, seed {seed}", slider_of(model, seed), SCORE, other="size", stops_at=1.3, model=model, count=COUNT)
        for name, model in MODELS.items()
        for seed in SEEDS
    ]


def side_effects() -> list[Row]:
    """Statistics of the pictures that are not the score, relative to the base model's, at -1 and +1, mean of the seeds."""
    rows = []
    for name, model in MODELS.items():
        records = [measure(slider_of(model, seed), model=model, count=COUNT) for seed in SEEDS]
        for statistic in records[0].statistics:
            values = torch.tensor([record.statistics[statistic] for record in records], dtype=torch.float64).mean(0)
            rows.append({"model": name, "statistic": statistic, "-1": values[0].item(), "0": values[1].item(), "+1": values[2].item()})
    return rows


@torch.no_grad()
def followed(used: Measurer, size: int) -> Iterator[tuple[float, Tensor]]:
    """Sigma and latents [N, C, h, w] before every step and at the end (sigma 0) of `size` prompts with all their seeds."""
    model, sampling, solver = used.model, used.sampling, SOLVERS[used.sampling.sampler]
    asked = [(prompt, seed) for prompt, own in zip(used.prompts[:size], used.seeds, strict=False) for seed in own]
    texts, encoder = [prompt for prompt, _ in asked], PromptEncoder(model)
    cond, uncond = encoder.cond(texts, sampling.size), encoder.uncond(texts, sampling.size)
    height, width = (side // model.spec.vae_scale_factor for side in sampling.size)
    latents, _ = initial_noise([seed for _, seed in asked], (model.spec.latent_channels, height, width))
    scales, schedule = torch.full((len(asked),), sampling.guidance_scale), solver.schedule(model.schedule)
    for now, after in pairwise(schedule.inference_timesteps(sampling.num_steps)):
        now, after = now.expand(len(asked)), after.expand(len(asked))
        yield schedule.sigmas(now)[0].item(), latents
        eps = guide(model, latents, now, *predict_branches(model, latents, now, cond, uncond), scales, 0.0)
        latents = solver.step(latents, eps, schedule.abar(now), schedule.abar(after), None, None)
    yield 0.0, latents


def rank_correlations() -> list[Row]:
    """Spearman's rank correlation of what the scorer says of unfinished pictures with the true score of the finished ones.

    Over all pictures, and within prompts: of the differences from the prompt's mean, where the prompt itself says nothing.
    """
    rated, rows = load_scorer(scorer(SCORE)).eval(), []
    for name, model in MODELS.items():
        used = measurer(model, prompts()[1], COUNT)
        trail = list(followed(used, RANKED))
        truth = SCORES[SCORE](decode(used.model, trail[-1][1]).clamp(0, 1)).view(RANKED, -1)
        for sigma, latents in trail:
            with torch.no_grad():
                said = rated(latents, torch.full((len(latents),), sigma)).view(RANKED, -1)
            within = [table - table.mean(1, keepdim=True) for table in (said, truth)]
            rows.append(
                {
                    "model": name,
                    "sigma": sigma,
                    "all": spearman(said.flatten(), truth.flatten()),
                    "within": spearman(*map(torch.flatten, within)),
                }
            )
    return rows


def grid(path: Path) -> None:
    """Both sliders of the first seed at -1, 0 and +1, the same prompts, as a picture."""
    columns, labels, asked = [], [], spread(load_prompts(prompts()[1]), SHOWN)
    for name, model in MODELS.items():
        used = measurer(model, prompts()[1], COUNT)
        with attached(used.model, slider_of(model, SEEDS[0])) as network:
            for weight in WEIGHTS:
                latents = sample(used.model, network, asked, range(SHOWN), weight, sampling=used.sampling)
                columns.append((255 * decode(used.model, latents).clamp(0, 1)).round().byte())
                labels.append(f"{name} {signed(weight)}")
    image_grid(list(torch.stack(columns, dim=1)), [prompt.prompt for prompt in asked], labels).save(path, optimize=True)


def tables(found: dict[str, list[Row]]) -> str:
    """All that was found, as Markdown."""
    effects, correlations = [], []
    for statistic in dict.fromkeys(entry["statistic"] for entry in found["side_effects"]):
        own = [entry for entry in found["side_effects"] if entry["statistic"] == statistic]
        effects.append([statistic, *(" / ".join(f"{entry[end]:.3g}" for end in ("-1", "0", "+1")) for entry in own)])
    for name in MODELS:
        own = [entry for entry in found["rank_correlations"] if entry["model"] == name]
        nearest = [min(own, key=lambda entry, sigma=sigma: abs(entry["sigma"] - sigma)) for sigma in SIGMAS]
        correlations.append([name, *(f"{entry['all']:.3f} / {entry['within']:.3f}" for entry in nearest)])
    return "\n\n".join(
        [
            markdown("strength", found["strength"]),
            "### side effects",
            markdown_table(["statistic", *(f"{name} at -1 / 0 / +1" for name in MODELS)], effects),
            "### rank correlation with the true score of the finished picture, all pictures / within prompts",
            markdown_table(["sigma near", *(f"{sigma:g}" for sigma in SIGMAS)], correlations),
        ]
    )


def main() -> None:
    argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    found = {"strength": strengths(), "side_effects": side_effects(), "rank_correlations": rank_correlations()}
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = tables(found)
    RESULTS.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    grid(GRID)
    print(text)


if __name__ == "__main__":
    main()
