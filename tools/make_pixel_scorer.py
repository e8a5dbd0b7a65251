"""Make a scorer file of a ready-made image scorer: an aesthetic predictor, a classifier, PickScore, an ONNX file, your own class ...

    python tools/make_pixel_scorer.py --pretrained_model_name_or_path sd15.safetensors --image_model "classifier:nsfw_folder?class=nsfw" \
        --reference_dir pictures --output nsfw.safetensors

The file holds a decoder and the image scorer, and train_leco_score.py takes it like any other; since it never saw noise, use
score_estimator x0. docs/pixel_scorers.md lists what there is and how it is written. Prints whether a gradient reaches the latents.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, so that the script runs from anywhere

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from library.errors import UserError
from library.models.folder_parts import read_json
from library.models.loading import load_vae
from library.models.vae import Autoencoder, LatentSpace, VaeFingerprint, encode_images, place_vae, probe_picture
from library.objectives.known_noise import caption_of
from library.scorer_data.encoding import UNREADABLE
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.records import FilePicture, Skipped, SkipReport
from library.scorer_training.config import VaeConfig
from library.scorers.base import BackboneScorer, ScorerSpec
from library.scorers.image_models.base import IMAGE_MODELS, read_image_model
from library.scorers.io import save_scorer
from library.settings.cli import parse_config, run_main
from library.settings.options import check_at_least, check_not_set, option
from library.training.output_files import check_outputs, keep_earlier_file
from library.training.runtime import set_num_threads

logger = logging.getLogger("make_pixel_scorer")


@dataclass(frozen=True, kw_only=True)
class PixelScorerConfig:
    """What looks at the picture, how it is decoded, and what its scores are measured on."""

    image_model: str | None = option(None, help="Image scorer, family:argument?key=value&key=value; see docs/pixel_scorers.md.")
    decoder: str = option("vae", help="vae, the model's own, or the folder of a tiny autoencoder such as TAESD, which is far faster.")
    decode_tile: int = option(0, help="Side in latents of the tiles that are decoded; 0 for whole pictures. Bounds memory.")
    decode_batch: int = option(1, help="Tiles or pictures decoded at a time; 0 for all.")
    decode_checkpointing: bool = option(True, help="Decode again in the backward pass rather than to keep activations.")
    reference_dir: Path | None = option(None, help="Pictures whose scores' mean and standard deviation become the unit of the reward.")
    num_reference: int | None = option(None, help="How many of them to take, evenly over the folder; not set: 200.")
    resolution: int | None = option(None, help="Longer side in pixels at which they are scored; not set: the model's own size.")
    output: Path = option(Path("pixel_scorer.safetensors"), help="The scorer file to write.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")

    def __post_init__(self) -> None:
        if self.image_model is None:
            raise UserError(f"image_model is not set; it is one of {', '.join(IMAGE_MODELS)}, such as {IMAGE_MODELS['classifier'].example}")
        if self.output.suffix != ".safetensors":
            raise UserError(f"output is {self.output}; give a file that ends in .safetensors")
        if 0 < self.decode_tile < 8:
            raise UserError(f"decode_tile is {self.decode_tile}; it must be 0, or at least 8 latents")
        if self.reference_dir is None:
            check_not_set(self, "there is no reference_dir", "num_reference")
        check_at_least(self, 0, "decode_tile", "decode_batch")
        check_at_least(self, 1, "num_threads")
        check_at_least(self, 2, "num_reference")
        check_at_least(self, 64, "resolution")


@dataclass(frozen=True, kw_only=True)
class MakePixelScorerConfig:
    vae: VaeConfig
    pixel_scorer: PixelScorerConfig


def main() -> None:
    config = parse_config(MakePixelScorerConfig, description="Make a scorer file of a ready-made image scorer.")
    settings = config.pixel_scorer
    check_outputs(settings.output)
    if settings.reference_dir is not None and not settings.reference_dir.is_dir():
        raise UserError(f"reference_dir {settings.reference_dir} is not a folder; give a folder of pictures")
    set_num_threads(settings.num_threads)
    vae = load_vae(config.vae.path, family=config.vae.model_family)
    scorer = make_scorer(vae, settings, settings.resolution or native_size(config.vae, vae))
    keep_earlier_file(settings.output)
    save_scorer(settings.output, scorer)
    print(f"wrote {settings.output}")


def native_size(model: VaeConfig, vae: Autoencoder) -> int:
    """Side in pixels of the pictures that the model makes: its U-Net's if that is in a folder, else that of its family's VAE."""
    unet = Path(model.pretrained_model_name_or_path or "") / "unet" / "config.json"
    if unet.is_file() and type(size := read_json(unet, "download the model again").get("sample_size")) is int:
        return size * LatentSpace.of(vae).downsampling
    return vae.config.get("sample_size", 1024)


def make_scorer(vae: Autoencoder, settings: PixelScorerConfig, resolution: int) -> BackboneScorer:
    """Build, measure and describe the scorer; `resolution` is the longer side in pixels of what it is measured on."""
    from library.scorers.kinds.pixel import RUNS_VAE, measure_gradient, ready_made
    from library.scorers.pixel_decoder import load_tiny_autoencoder

    assert settings.image_model is not None
    image_model = read_image_model(settings.image_model)
    decoder = vae if settings.decoder == RUNS_VAE else load_tiny_autoencoder(settings.decoder)
    if LatentSpace.of(decoder).channels != LatentSpace.of(vae).channels:
        raise UserError(f"decoder {settings.decoder} is for other latents than this model's; give one that belongs to this VAE")
    architecture, backbone = ready_made(
        image_model,
        vae,
        decoder,
        decode_tile=settings.decode_tile,
        decode_batch=settings.decode_batch,
        decode_checkpointing=settings.decode_checkpointing,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place_vae(vae, device)
    backbone.to(device).eval().requires_grad_(False)

    gradient = measure_gradient(backbone, test_latents(vae, resolution))
    print(gradient)
    scores = torch.tensor(list(reference_scores(vae, backbone, settings, resolution)))
    if len(scores):
        mean, std = float(scores.mean()), float(scores.std(correction=0))
        if std == 0:
            raise UserError(f"all {len(scores)} pictures of reference_dir have the score {mean:g}; give pictures that differ in it")
        print(f"scores of {len(scores)} pictures: mean {mean:.4g}, standard deviation {std:.4g}")
    else:
        mean, std = 0.0, 1.0
        print("no reference_dir: the reward's unit is 1 of this score, so its weight is not comparable with other scorers'")
    if not gradient.reaches_latents:
        raise UserError(
            f"image_model {settings.image_model} has no gradient that reaches the latents, so nothing can be trained with it and no file "
            "is written; a function of pixels must stay in torch, without numpy, detach() or no_grad; as a judge it can do without"
        )
    spec = ScorerSpec(
        kind="pixel",
        architecture=architecture,
        vae=VaeFingerprint.of(vae),
        noise_aware=False,
        uses_prompt=backbone.image_model.uses_prompt,
        mean=mean,
        std=std,
        training={"image_model": settings.image_model, "reference_pictures": len(scores), "gradient": gradient.to_dict()},
    )
    scorer = BackboneScorer(spec, backbone)
    passed_on = {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}
    scorer.heads.load_state_dict({f"{spec.score_head}.members.0.{name}": tensor for name, tensor in passed_on.items()})
    return scorer.cpu()


@torch.no_grad()
def test_latents(vae: Autoencoder, resolution: int) -> Tensor:
    """Latents [1, C, h, w] of a synthetic picture in landscape, 4 to 3."""
    size = (resolution * 3 // 4 // 8 * 8, resolution // 8 * 8)
    return encode_images(vae, F.interpolate(probe_picture().to(vae.device), size, mode="bilinear"))


@torch.no_grad()
def reference_scores(vae: Autoencoder, backbone: torch.nn.Module, settings: PixelScorerConfig, resolution: int) -> Iterator[float]:
    """Scores of the reference pictures, through VAE and decoder as those of a training run are. A prompt is read from a .txt beside."""
    if settings.reference_dir is None:
        return
    files = sorted(file for file in settings.reference_dir.rglob("*") if file.suffix.lower() in Image.registered_extensions())
    if len(files) < 2:
        raise UserError(f"reference_dir {settings.reference_dir} has {len(files)} pictures; give at least two, best a few hundred")
    count, skipped = min(settings.num_reference or 200, len(files)), SkipReport()
    for file in tqdm([files[index * len(files) // count] for index in range(count)], desc="reference pictures", unit="picture"):
        try:
            picture = read_picture(FilePicture(file.absolute()))
        except UserError as error:
            skipped.add(Skipped(str(error), UNREADABLE))
            continue
        scale = resolution / max(picture.size)
        width, height = (max(8, round(side * scale / 8) * 8) for side in picture.size)
        latents = encode_images(vae, to_pixels([cover(picture, (width, height))]).to(vae.device))
        score = float(backbone(latents, latents.new_zeros(1), prompts=[caption_of(file, "")]))
        if math.isfinite(score):
            yield score
        else:
            skipped.add(Skipped(f"picture {file}: its score is {score}", "picture has no finite score"))
    skipped.log(logger)
    if len(skipped) > count - 2:
        raise UserError(f"of {count} pictures of reference_dir, {count - len(skipped)} have a score; give at least two ({skipped.first()})")


if __name__ == "__main__":
    run_main(main)
