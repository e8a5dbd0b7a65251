"""What a VAE does, which latents it makes, and how to tell whether two of them share an encoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError

Autoencoder = Any  # of diffusers, of a class in VAE_CLASSES: one interface, and no class for it
VAE_CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLWan", "AutoencoderTiny")

# Relative RMS between the probe latents of one encoder in another precision stays near 0.001 (fp16 weights) and 0.01 (bf16 weights and
# activations); that of two unrelated encoders is about sqrt(2). See tests/test_models.py.
PROBE_TOLERANCE = 0.05


def vae_class(name: str) -> Any:
    """The class of diffusers. Raises UserError if it is none of `VAE_CLASSES`."""
    import diffusers

    if name not in VAE_CLASSES:
        raise UserError(f"The VAE is {name[:60]}; those that can be used are {', '.join(VAE_CLASSES)}.")
    return getattr(diffusers, name)


def move(module: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """`module.to`, without the warning that diffusers adds to every cast, modules to be kept in float32 or not."""
    nn.Module.to(module, device=device, dtype=dtype)  # pyright: ignore[reportCallIssue, reportArgumentType] (None is allowed)


def place_vae(vae: Autoencoder, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """Move a VAE, but hold it in float32 when its config says force_upcast: SDXL's overflows in fp16."""
    if dtype is not None and vae.config.get("force_upcast", True):
        dtype = torch.float32
    move(vae, device, dtype)


@dataclass(frozen=True)
class LatentSpace:
    """The latents that a VAE makes, as diffusion models and scorers see them: [B, channels, H / downsampling, W / downsampling].

    They are (raw - shift) * factor of the raw ones that the VAE itself puts out.

    Attributes:
        shift, factor: one number, or one for each channel; with packing, for each channel and place in a patch.
        packing: side of the patches that the statistics are of; nothing else is packed here.
        has_frames: whether the raw latents and pixels have an axis of frames, of length 1 for a picture.
    """

    channels: int
    downsampling: int
    shift: tuple[float, ...]
    factor: tuple[float, ...]
    packing: int = 1
    has_frames: bool = False

    @classmethod
    def of(cls, vae: Autoencoder) -> LatentSpace:
        """From a VAE's configuration; of FLUX.2's, from the statistics that it has as a batch normalisation."""
        return cls.of_config(vae.config, getattr(vae, "bn", None))

    @classmethod
    def of_config(cls, config: Mapping[str, Any], norm: Any = None) -> LatentSpace:
        """The same of a configuration alone; all but FLUX.2's say what is needed."""
        if norm is not None:
            shift, deviations = norm.running_mean.tolist(), (norm.running_var + config["batch_norm_eps"]).sqrt().tolist()
        elif config.get("latents_mean"):
            shift, deviations = config["latents_mean"], config["latents_std"]
        else:
            shift, deviations = [config.get("shift_factor") or 0.0], None
        is_video = "z_dim" in config
        halvings = len(config["temperal_downsample"]) if is_video else len(config["block_out_channels"]) - 1
        patch = (config.get("patch_size") or 1) if is_video else 1  # Wan 2.2's VAE begins with patches
        factor = config["scaling_factor"] if deviations is None else 1.0
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in (*shift, factor)):
            raise UserError("The VAE's config.json has a scaling_factor or a shift that is no finite number; download it again.")
        return cls(
            channels=config["z_dim"] if is_video else config["latent_channels"],
            downsampling=patch * 2**halvings,
            shift=tuple(shift),
            factor=(factor,) if deviations is None else tuple(1 / deviation for deviation in deviations),
            packing=1 if norm is None else config["patch_size"][0],
            has_frames=is_video,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatentSpace:
        """From `dataclasses.asdict` by way of JSON."""
        return cls(**{**data, "shift": tuple(data["shift"]), "factor": tuple(data["factor"])})

    @property
    def scaling_factor(self) -> float:
        """The factor of all channels, or 1 where each has its own."""
        return self.factor[0] if len(self.factor) == 1 else 1.0

    @property
    def name(self) -> str:
        """What people call it: the first models that had it."""
        if self.packing > 1:
            return "FLUX.2 latents"
        if self.has_frames:
            return "Qwen-Image and Wan latents" if self.channels == 16 else f"{self.channels}-channel video latents"
        known = {(4, 0.18215): "SD1 and SD2", (4, 0.13025): "SDXL", (16, 0.3611): "FLUX.1", (16, 1.5305): "SD3"}
        name = known.get((self.channels, round(self.scaling_factor, 5)))
        return f"{name} latents" if name else f"{self.channels}-channel latents scaled by {self.scaling_factor:g}"

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents [B, C, (1,) h, w] -> normalised ones [B, C, h, w]."""
        raw = raw[:, :, 0] if self.has_frames else raw
        if len(self.factor) == 1:
            return (raw - self.shift[0]) * self.factor[0]
        shift, factor = self._statistics(raw)
        return F.pixel_shuffle((F.pixel_unshuffle(raw, self.packing) - shift) * factor, self.packing)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        if len(self.factor) == 1:
            raw = latents / self.factor[0] + self.shift[0]
        else:
            shift, factor = self._statistics(latents)
            raw = F.pixel_shuffle(F.pixel_unshuffle(latents, self.packing) / factor + shift, self.packing)
        return raw[:, :, None] if self.has_frames else raw

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return _columns(self.shift, like.device, like.dtype), _columns(self.factor, like.device, like.dtype)


@lru_cache
def _columns(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:  # [P, 1, 1], sent to a device once
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


def encode_images(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> normalised latents [B, C, h, w] float32: the mean of the posterior, no draw. Differentiable."""
    space = LatentSpace.of(vae)
    with torch.autocast(pixels.device.type, enabled=False):
        pixels = pixels.to(vae.dtype)
        encoded = vae.encode(pixels[:, :, None] if space.has_frames else pixels, return_dict=False)[0]
        raw = encoded if isinstance(encoded, Tensor) else encoded.mode()  # a tiny autoencoder has no posterior
        return space.normalise(raw.float())


def decode_latents(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Normalised latents [B, C, h, w] -> pixels [B, 3, H, W] float32, about -1..1, not clamped but by Qwen's and Wan's. Differentiable."""
    space = LatentSpace.of(vae)
    with torch.autocast(latents.device.type, enabled=False):
        pixels = vae.decode(space.denormalise(latents).to(vae.dtype), return_dict=False)[0].float()
        return pixels[:, :, 0] if space.has_frames else pixels


def decode_pictures(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Normalised latents [B, C, h, w] -> pixels [B, 3, H, W] in 0..1, as a file would hold them."""
    return (decode_latents(vae, latents) / 2 + 0.5).clamp(0, 1)


def probe_picture(size: int = 64) -> Tensor:
    """A fixed picture [1, 3, size, size] in -1..1 with flat, smooth and sharp parts in every channel."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    waves = torch.sin(2 * math.pi * torch.stack([2 * x + y, 3 * y - x, 5 * x * y]))
    squares = torch.where((4 * x).floor() % 2 == (4 * y).floor() % 2, 0.8, -0.6)
    return (0.6 * waves + 0.4 * squares)[None]


@dataclass(frozen=True)
class VaeFingerprint:
    """Tells whether a scorer may read a model's latents.

    Attributes:
        scaling_factor: what latents are multiplied with after encoding; 1 where each channel has a factor of its own.
        probe: the latents of `probe_picture` over `scaling_factor`, flattened, rounded to 4 decimals.
        space: `LatentSpace.name`; "" in files of earlier versions.
    """

    scaling_factor: float
    probe: tuple[float, ...]
    space: str = ""

    @classmethod
    @torch.no_grad()
    def of(cls, vae: Autoencoder) -> VaeFingerprint:
        """Raises UserError for a VAE whose latents are not finite, which would match nothing, not even itself."""
        space, picture = LatentSpace.of(vae), probe_picture().to(vae.device)
        latents = encode_images(vae, picture) / space.scaling_factor
        if not latents.isfinite().all() and vae.dtype != torch.float32:  # half precision may be too narrow for it
            latents = encode_images(copy.deepcopy(vae).float(), picture) / space.scaling_factor
        if not latents.isfinite().all():
            raise UserError("the VAE makes NaN or infinity of a picture, so its file is broken; download or copy it again")
        return cls(space.scaling_factor, tuple(round(value, 4) for value in latents.flatten().tolist()), space.name)

    @property
    def name(self) -> str:
        """What the latents are called."""
        if self.space:
            return self.space
        channels = max(1, len(self.probe) // 64)  # earlier versions knew 8 x down-sampling alone
        return LatentSpace(channels, 8, (0.0,), (self.scaling_factor,)).name

    def may_be_of(self, space: LatentSpace) -> bool:
        """Whether it may be that of such latents, as far as their number and their scaling tell."""
        numbers = space.channels * (probe_picture().shape[-1] // space.downsampling) ** 2
        return len(self.probe) == numbers and math.isclose(self.scaling_factor, space.scaling_factor, rel_tol=1e-4)

    def matches(self, other: VaeFingerprint) -> bool:
        """Whether both encode alike: the same scaling factor, and probes within `PROBE_TOLERANCE` (relative RMS)."""
        if len(self.probe) != len(other.probe) or not math.isclose(self.scaling_factor, other.scaling_factor, rel_tol=1e-4):
            return False
        return math.dist(self.probe, other.probe) <= PROBE_TOLERANCE * max(math.hypot(*self.probe), math.hypot(*other.probe))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"scaling_factor": self.scaling_factor, "probe": list(self.probe)} | ({"space": self.space} if self.space else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VaeFingerprint:
        return cls(float(data["scaling_factor"]), tuple(float(value) for value in data["probe"]), str(data.get("space", "")))
