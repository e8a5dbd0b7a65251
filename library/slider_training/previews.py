"""What the slider does, in pictures: a grid written while it trains, and the picture of the finished file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from library.atomic_files import atomic_write_bytes
from library.models.base import DiffusionModel
from library.models.vae import Autoencoder
from library.reports.plots import image_grid, multiplier_grid, signed
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, sample
from library.slider_training.outcome import Outcome
from library.types import PromptSpec
from networks.lora import LoRANetwork

CARD_PROMPTS = 4  # rows of the picture
THUMBNAIL = 256  # pixels of the longer side, as ModelSpec recommends


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
    tiny: Autoencoder | None = None,
) -> None:
    """Write a PNG with a row for each prompt (at its seed, or the number of its row) and a column for each multiplier.
    `tiny` decodes in place of the model's VAE.

    Raises:
        UserError: if the file cannot be written.
    """
    encoder = encoder or PromptEncoder(model, network)
    rows, seeds = [], [row if prompt.seed is None else prompt.seed for row, prompt in enumerate(prompts)]
    for prompt, seed in zip(prompts, seeds, strict=True):
        count = len(multipliers)
        latents = sample(model, network, [prompt] * count, [seed] * count, multipliers, sampling=sampling, encoder=encoder)
        rows.append((decode(model, latents, tiny).clamp(0, 1) * 255).round().byte())
    labels = [f"{prompt.prompt} (seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True)]
    atomic_write_bytes(path, multiplier_grid(rows, labels, multipliers))


def card_picture(outcome: Outcome) -> Image.Image | None:
    """The pictures nearest to the weights -1, 0 and +1 that measuring made, a row a prompt, with their weights above; None without any."""
    record = outcome.record
    if record is None or not record.pictures:
        return None
    unit = 1.0 if outcome.calibration is None else outcome.calibration.pictured_at
    places = sorted({*record.ends, record.base})
    rows = [pictures[places] for pictures in record.pictures[:CARD_PROMPTS]]
    return image_grid(rows, None, [signed(round(record.multipliers[place] * unit, 1)) for place in places])


def thumbnail(picture: Image.Image) -> str:
    """A small copy as ModelSpec has it: a data URL."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.save(buffer, format="jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
