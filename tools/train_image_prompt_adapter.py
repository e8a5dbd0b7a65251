"""Train the adapter that lets pictures stand in for prompts, from prompts alone.

    python tools/train_image_prompt_adapter.py --pretrained_model_name_or_path sd15.safetensors --clip_model clip-vit-large-patch14 \
        --prompts_file many_prompts.txt --pictures pictures_of_all_kinds --output sd15_adapter.safetensors

It learns to turn CLIP's embedding of a prompt into an encoding under which the frozen U-Net does what it does under the prompt itself.
Since CLIP puts pictures where it puts their descriptions, the adapter then takes pictures: train_leco_score.py --image_prompts.
A tenth of the prompts is held out, and what is measured on them is printed. docs/text_free.md explains it.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, so that the script runs from anywhere

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

import torch
from tqdm import tqdm

from library.errors import UserError
from library.models.config import ModelConfig
from library.prompts.files import load_prompts
from library.settings.cli import parse_config, run_main, setup_logging
from library.settings.options import check_at_least, option
from library.text_free.adapter import ImagePromptAdapter, save_adapter
from library.text_free.adapter_training import AdapterRecipe, Errors, new_adapter, train_adapter, validation_errors
from library.text_free.clip_pair import ClipPair, find_pictures
from library.training.output_files import check_outputs, keep_earlier_file
from library.training.runtime import choose_precision, generator, set_num_threads, weight_dtype

logger = logging.getLogger("train_image_prompt_adapter")
HELD_OUT = 10  # every so many prompts, one is not trained on


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Prompts, CLIP, pictures, and the machine."""

    prompts_file: Path | None = option(None, help="Prompts like those that pictures will stand in for; thousands, of many kinds.")
    clip_model: Path | None = option(None, help="Folder of a CLIPModel, such as openai/clip-vit-large-patch14.")
    pictures: Path | None = option(None, help="Folder or table of pictures of all kinds, without captions, to learn where pictures lie.")
    num_pictures: int = option(2000, help="At most so many of them.", only_with="pictures")
    output: Path = option(Path("image_prompt_adapter.safetensors"), help="The file to write.")
    resolution: int | None = option(None, help="Side in pixels of what it samples, a multiple of 8; default the model's own.")
    mixed_precision: str | None = option(
        None,
        choices=("no", "fp16", "bf16"),
        help="Precision of the diffusion model (the adapter is float32). no: float32. "
        "Not set: bf16 on a GPU that has it, else fp16; float32 on a CPU.",
    )
    gradient_checkpointing: bool = option(False, help="Recompute the U-Net's activations in the backward pass: less memory, slower.")
    seed: int = option(0, help="Seed of every random draw.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")

    def __post_init__(self) -> None:
        if self.prompts_file is None or self.clip_model is None:
            raise UserError("prompts_file and clip_model must both be set: prompts to train on, and the folder of a CLIPModel")
        if self.output.suffix != ".safetensors":
            raise UserError(f"output is {self.output}; give a file that ends in .safetensors")
        check_at_least(self, 1, "num_pictures", "num_threads")
        if self.resolution is not None and (self.resolution <= 0 or self.resolution % 8):
            raise UserError(f"resolution is {self.resolution}; it must be a positive multiple of 8")


@dataclass(frozen=True, kw_only=True)
class TrainImagePromptAdapterConfig:
    model: ModelConfig
    adapter: AdapterConfig
    recipe: AdapterRecipe


def main() -> None:
    setup_logging()
    train(parse_config(TrainImagePromptAdapterConfig, description=__doc__))


def train(config: TrainImagePromptAdapterConfig) -> ImagePromptAdapter:
    """Train and write the adapter. Raises UserError for bad input."""
    settings, recipe = config.adapter, config.recipe
    assert settings.prompts_file is not None and settings.clip_model is not None
    check_outputs(settings.output)
    set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)  # the adapter's initial weights
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = config.model.load(dtype=weight_dtype(choose_precision(settings.mixed_precision, device)), device=device)
    if settings.gradient_checkpointing:
        model.unet.train().enable_gradient_checkpointing()  # diffusers checkpoints in training mode only; this U-Net has no dropout
    clip = ClipPair.load(settings.clip_model).to(device)
    prompts = list(dict.fromkeys(prompt.prompt for prompt in load_prompts(settings.prompts_file)))
    if len(prompts) < 2 * HELD_OUT:
        raise UserError(f"{settings.prompts_file} holds {len(prompts)} different prompts; give at least {2 * HELD_OUT}, best thousands")
    held_out, seen = prompts[::HELD_OUT], [prompt for index, prompt in enumerate(prompts) if index % HELD_OUT]
    adapter = new_adapter(model, clip, seen, recipe, generator(settings.seed, "fit"))
    if settings.pictures is not None:
        found = find_pictures(settings.pictures, settings.num_pictures)
        embeddings = [embedding for _, embedding in tqdm(clip.embed_pictures(found), total=len(found), desc="pictures")]
        if len(embeddings) < 2:
            raise UserError(f"{settings.pictures} has {len(embeddings)} pictures that can be read; give hundreds, of all kinds")
        adapter.image_mean.copy_(torch.stack(embeddings).mean(0))
        gap = float((adapter.image_mean - adapter.text_mean).norm())
        logger.info("the means of pictures and texts are %.2f apart (all embeddings have length 1)", gap)
    side = settings.resolution or model.spec.resolution
    size = (side, side)
    with tqdm(total=recipe.max_train_steps, desc="adapter") as bar:
        train_adapter(
            *(adapter, model, clip, seen, recipe, generator(settings.seed, "adapter"), size),
            log=lambda step, errors: _show(bar, step, errors),
        )
    errors = validation_errors(adapter, model, clip, held_out, recipe, generator(settings.seed, "held out"), size)
    logger.info("on %d prompts held out: the U-Net's error is %.3f of what a prompt changes", len(held_out), float(errors.eps))
    logger.info("and the encodings' error is %.3f of their variance (0 is the prompt itself)", float(errors.hidden))
    adapter.spec.training.update(eps_error=float(errors.eps), hidden_error=float(errors.hidden))
    keep_earlier_file(settings.output)
    save_adapter(settings.output, adapter)
    logger.info("adapter saved to %s", settings.output)
    return adapter


def _show(bar: tqdm, step: int, errors: Errors) -> None:
    bar.update()
    if step % 10 == 0:
        bar.set_postfix(eps=f"{float(errors.eps):.3f}", hidden=f"{float(errors.hidden):.3f}")


if __name__ == "__main__":
    run_main(main)
