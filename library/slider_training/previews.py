"""What the slider does, in pictures: a grid written while it trains, and the picture of the finished file."""

from collections.abc import Sequence
from dataclasses import dataclass
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

PREVIEW_PROMPTS, PREVIEW_WEIGHTS = 4, (-1.0, 0.0, 1.0)
CARD_PROMPTS = 4  # rows of the picture


@dataclass(frozen=True, kw_only=True)
class Previews:
    """A grid of pictures while the slider trains: a row a prompt, at its seed or the number of its row, and a column a weight.

    Attributes:
        sampling: as the training samples.
        encoder: holds the prompts' conditioning.
        tiny: decodes in place of the model's VAE.
    """

    model: DiffusionModel
    network: LoRANetwork
    prompts: Sequence[PromptSpec]
    sampling: SamplingConfig
    encoder: PromptEncoder
    tiny: Autoencoder | None = None

    def write(self, output_dir: Path, output_name: str, step: int) -> Path:
        """Write {output_dir}/sample/{output_name}_{step:06d}.png, where sd-scripts puts its samples.

        Raises:
            UserError: if the file cannot be written.
        """
        path = output_dir / "sample" / f"{output_name}_{step:06d}.png"
        rows, seeds = [], [row if prompt.seed is None else prompt.seed for row, prompt in enumerate(self.prompts)]
        count = len(PREVIEW_WEIGHTS)
        for prompt, seed in zip(self.prompts, seeds, strict=True):
            latents = sample(
                self.model,
                self.network,
                [prompt] * count,
                [seed] * count,
                PREVIEW_WEIGHTS,
                sampling=self.sampling,
                encoder=self.encoder,
            )
            rows.append((decode(self.model, latents, self.tiny).clamp(0, 1) * 255).round().byte())
        labels = [f"{prompt.prompt} (seed {seed})" for prompt, seed in zip(self.prompts, seeds, strict=True)]
        atomic_write_bytes(path, multiplier_grid(rows, labels, PREVIEW_WEIGHTS))
        return path


def card_picture(outcome: Outcome) -> Image.Image | None:
    """The pictures nearest to the weights -1, 0 and +1 that measuring made, a row a prompt, with their weights above; None without any."""
    record = outcome.record
    if record is None or not record.pictures:
        return None
    unit = 1.0 if outcome.calibration is None else outcome.calibration.pictured_at
    places = sorted({*record.ends, record.base})
    rows = [pictures[places] for pictures in record.pictures[:CARD_PROMPTS]]
    return image_grid(rows, None, [signed(round(record.multipliers[place] * unit, 1)) for place in places])
