"""What the slider does so far, in pictures: a grid written while it trains."""

from collections.abc import Sequence
from pathlib import Path

from library.atomic_files import atomic_write_bytes
from library.models.base import DiffusionModel
from library.reports.plots import multiplier_grid
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, sample
from library.types import PromptSpec
from networks.lora import LoRANetwork


def preview_path(output_dir: str | Path, output_name: str, step: int) -> Path:
    """{output_dir}/sample/{output_name}_{step:06d}.png, where sd-scripts puts its samples."""
    return Path(output_dir, "sample", f"{output_name}_{step:06d}.png")


def write_preview(
    path: str | Path,
    model: DiffusionModel,
    network: LoRANetwork,
    prompts: Sequence[PromptSpec],
    multipliers: Sequence[float],
    sampling: SamplingConfig,
    encoder: PromptEncoder | None = None,
) -> None:
    """Write a PNG with a row for each prompt (at its seed, or the number of its row) and a column for each multiplier.

    Raises:
        UserError: if the file cannot be written.
    """
    encoder = encoder or PromptEncoder(model, network)
    rows, seeds = [], [row if prompt.seed is None else prompt.seed for row, prompt in enumerate(prompts)]
    for prompt, seed in zip(prompts, seeds, strict=True):
        count = len(multipliers)
        latents = sample(model, network, [prompt] * count, [seed] * count, multipliers, sampling=sampling, encoder=encoder)
        rows.append((decode(model, latents, sampling.batch_size).clamp(0, 1) * 255).round().byte())
    labels = [f"{prompt.prompt} (seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True)]
    atomic_write_bytes(path, multiplier_grid(rows, labels, multipliers))
