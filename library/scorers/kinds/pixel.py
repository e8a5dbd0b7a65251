"""Scorers that decode latents and look at the picture: networks trained on it, and ready-made image scorers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.vae import Autoencoder, LatentSpace
from library.scorers.base import SCORER_KINDS, Backbone, ModelSource, check_scorer_args
from library.scorers.conditioning import FiLM, SigmaEmbedding
from library.scorers.image_models.base import Loaded, build_image_model, read_image_model
from library.scorers.image_models.preprocessing import Preprocessing
from library.scorers.image_models.trainable import CONFIGURATIONS
from library.scorers.pixel_decoder import PixelDecoder, check_decodes, decoder_config, load_tiny_autoencoder
from library.types import Conditioning

RUNS_VAE = "vae"
TIMM = "timm:"
PROBE_PROMPT = "a photo of a cat on a chair in a garden"


@SCORER_KINDS.register("pixel")
class PixelBackbone(Backbone):
    """A decoder and an image model.

    Trained on latents of every noise level, it is given sigma: its features are normalised and modulated by it. Ready-made, an image
    model's score is its one feature.

    It has no presets: its sizes are those of `trainable.CONFIGURATIONS`, and an architecture needs a decoder too.

    Args:
        in_channels: latent channels.
        decoder: configuration of the decoder's autoencoder.
        image_model: family and arguments of the image model.
        knows_sigma: whether sigma is one of its inputs.
        decode_tile, decode_batch, decode_checkpointing: `tile`, `batch` and `checkpointing` of PixelDecoder.
        decoder_folder, pretrained: where `initialise` takes weights from: the folder of a tiny autoencoder (empty: the run's VAE), and
            the image model's specification (empty: random weights).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        decoder: Mapping[str, Any],
        image_model: Mapping[str, Any],
        knows_sigma: bool = True,
        decode_tile: int = 0,
        decode_batch: int = 4,
        decode_checkpointing: bool = True,
        decoder_folder: str = "",
        pretrained: str = "",
    ) -> None:
        super().__init__()
        self.decoder = PixelDecoder(decoder, tile=decode_tile, batch=decode_batch, checkpointing=decode_checkpointing)
        assert in_channels == self.decoder.space.channels, "the decoder is for other latents"
        self.image_model = build_image_model(image_model)
        self.feature_width = self.image_model.feature_width
        self.knows_sigma = knows_sigma
        self.decoder_folder, self.pretrained = decoder_folder, pretrained
        if knows_sigma:
            width = min(self.feature_width, 256)
            self.sigma_embedding = SigmaEmbedding(width, width)
            self.norm = nn.LayerNorm(self.feature_width)
            self.film = FiLM(width, self.feature_width)

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        pixels = self.decode(latents)
        features = self.run(self.image_model, pixels, prompts)  # the decoder has a setting of its own
        return self.film(self.norm(features), self.sigma_embedding(sigmas)) if self.knows_sigma else features

    def decode(self, latents: Tensor) -> Tensor:
        """The pixels [B, 3, H, W] that the image model is shown, about 0..1; within 0..1 for one that was not trained here."""
        pixels = self.decoder(latents)  # noisy ones as they are: their variance is that of clean ones; docs/pixel_scorers.md
        # A picture in a file is clamped. The gradient passes all the same, or white and black areas could never change.
        return pixels if self.knows_sigma else pixels + (pixels.clamp(0, 1) - pixels).detach()

    @classmethod
    def architecture_for(
        cls,
        size: str,
        source: ModelSource,
        *,
        decoder: str = RUNS_VAE,
        image_size: int | None = None,
        pretrained: str | bool = "",
        **options: Any,
    ) -> dict[str, Any]:
        """As the base class has it.

        Args:
            size: one of CONFIGURATIONS, or `timm:NAME`.
            decoder: "vae", the run's own, or the folder of a tiny autoencoder such as TAESD.
            image_size: side of the square that pictures are resized to; 0 leaves them as they are; None is as the image model has it, and 0
                for CONFIGURATIONS.
            pretrained: weights to start from, in place of random ones: the local folder of an image model of transformers, which then is
                the architecture too; with `timm:NAME`, True for timm's own weights, or a checkpoint file.
            options: `decode_tile`, `decode_batch`, `decode_checkpointing`.
        """
        autoencoder = source.vae if decoder == RUNS_VAE else load_tiny_autoencoder(decoder)
        check_decodes(autoencoder, source.vae, f"decoder {decoder}")
        specification = _specification(size, pretrained)
        if specification:
            image_model = read_image_model(specification).architecture
        else:
            image_model = {"family": "backbone", "config": CONFIGURATIONS[size], "preprocessing": Preprocessing().to_dict()}
        if image_size is not None:
            image_model = {**image_model, "preprocessing": {**image_model["preprocessing"], "size": image_size}}
        own = ("decoder", "image_size", "pretrained")
        check_scorer_args("pixel", [*options], (*own, "decode_tile", "decode_batch", "decode_checkpointing"))
        return {
            "in_channels": LatentSpace.of(autoencoder).channels,
            "decoder": decoder_config(autoencoder),
            "image_model": image_model,
            "decoder_folder": "" if decoder == RUNS_VAE else decoder,
            "pretrained": specification if pretrained else "",
            **options,
        }

    def initialise(self, source: ModelSource) -> None:
        self.decoder.take_weights(load_tiny_autoencoder(self.decoder_folder) if self.decoder_folder else source.vae)
        if self.pretrained:
            self.image_model.load_state_dict(read_image_model(self.pretrained).weights)

    def saved_state(self) -> dict[str, Tensor]:
        state = self.state_dict()
        return {name: tensor.half() if name.startswith("decoder.") else tensor for name, tensor in state.items()}


def _specification(size: str, pretrained: str | bool) -> str:
    """The image model to train as `read_image_model` takes it; empty for one of CONFIGURATIONS with random weights."""
    if size.startswith(TIMM):
        weights = "weights=random" if not pretrained else "" if pretrained is True else f"checkpoint={pretrained}"
        return f"{size}?score=features&{weights}"
    if size not in CONFIGURATIONS:
        raise UserError(f"scorer kind pixel has no size {size!r}; it can be {', '.join(CONFIGURATIONS)}, or {TIMM}NAME")
    return f"backbone:{pretrained}" if pretrained else ""


def ready_made(image_model: Loaded, vae: Autoencoder, decoder: Autoencoder, **options: Any) -> tuple[dict[str, Any], PixelBackbone]:
    """A backbone whose one feature is the score of an image model, and its architecture.

    Args:
        vae: whose latents it reads. decoder: what decodes them, the same or a tiny one.
        options: `decode_tile`, `decode_batch` and `decode_checkpointing` of PixelBackbone.
    """
    architecture = {
        "in_channels": LatentSpace.of(vae).channels,
        "decoder": decoder_config(decoder),
        "image_model": image_model.architecture,
        "knows_sigma": False,
        **options,
    }
    backbone = PixelBackbone(**architecture)
    assert backbone.feature_width == 1, "a ready-made scorer puts out one number"
    backbone.decoder.take_weights(decoder)
    backbone.image_model.load_state_dict(image_model.weights)
    return architecture, backbone


# -- whether an image scorer can be learned from: many turn their gradient off, or look at the middle only ---------------------


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """How a score's gradient is spread.

    Attributes:
        reaches_latents: whether it arrives at the latents, finite and somewhere other than 0.
        regions: its mean absolute value at the pixels of the four corners and the centre, as a multiple of the whole picture's mean.
            0 is a blind spot.
    """

    reaches_latents: bool
    regions: dict[str, float]

    @property
    def is_everywhere(self) -> bool:
        """Whether the score can be raised by every part of the picture."""
        return self.reaches_latents and min(self.regions.values()) > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.reaches_latents:
            return "no gradient reaches the latents: this scorer can rank pictures, but nothing can be trained with it"
        shares = ", ".join(f"{name} {share:.2f}" for name, share in self.regions.items())
        blind = "" if self.is_everywhere else "; where it is 0, the scorer is blind"
        return f"the gradient reaches the latents; at the pixels, relative to its mean: {shares}{blind}"


def measure_gradient(backbone: PixelBackbone, latents: Tensor) -> GradientReport:
    """The gradient of a ready-made score of one picture's clean latents [1, C, h, w], which best are not square."""
    assert len(latents) == 1
    latents = latents.detach().clone().requires_grad_()
    pixels = backbone.decode(latents)
    score = backbone.image_model(pixels, [PROBE_PROMPT]).sum()
    none = GradientReport(reaches_latents=False, regions={})
    if not score.requires_grad:
        return none
    at_latents, at_pixels = torch.autograd.grad(score, [latents, pixels], allow_unused=True)
    if at_latents is None or at_pixels is None or not at_latents.isfinite().all() or not at_latents.any():
        return none
    strength = at_pixels[0].abs().sum(0)
    height, width = strength.shape
    part_height, part_width = height // 8, width // 8
    starts = {
        "top left": (0, 0),
        "top right": (0, width - part_width),
        "bottom left": (height - part_height, 0),
        "bottom right": (height - part_height, width - part_width),
        "centre": ((height - part_height) // 2, (width - part_width) // 2),
    }
    regions = {
        name: float(strength[top : top + part_height, left : left + part_width].mean() / strength.mean())
        for name, (top, left) in starts.items()
    }
    return GradientReport(reaches_latents=True, regions=regions)
