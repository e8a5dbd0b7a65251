"""What a VAE does, and how to tell whether two of them share an encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Relative RMS between the probe latents of one encoder in another precision stays near 0.001 (fp16 weights) and 0.01 (bf16 weights and
# activations); that of two unrelated encoders is about sqrt(2). See tests/test_models.py.
PROBE_TOLERANCE = 0.05


def move(module: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """`module.to`, without the warning that diffusers adds to every cast, modules to be kept in float32 or not."""
    nn.Module.to(module, device=device, dtype=dtype)  # pyright: ignore[reportCallIssue, reportArgumentType] (None is allowed)


def place_vae(vae: AutoencoderKL, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """Move a VAE, but hold it in float32 when its config says force_upcast: SDXL's overflows in fp16."""
    if dtype is not None and vae.config.get("force_upcast", True):
        dtype = torch.float32
    move(vae, device, dtype)


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> scaled latents [B, C, H/8, W/8] float32: the mean of the posterior, no draw. Differentiable."""
    with torch.autocast(pixels.device.type, enabled=False):
        return vae.encode(pixels.to(vae.dtype), return_dict=False)[0].mode().float() * vae.config["scaling_factor"]


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] -> pixels [B, 3, 8h, 8w] float32, about -1..1, not clamped. Differentiable."""
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode((latents / vae.config["scaling_factor"]).to(vae.dtype), return_dict=False)[0].float()


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
        scaling_factor: what latents are multiplied with after encoding.
        probe: the unscaled latents of `probe_picture`, flattened, rounded to 4 decimals.
    """

    scaling_factor: float
    probe: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, vae: AutoencoderKL) -> VaeFingerprint:
        picture = probe_picture().to(vae.device)
        latents = encode_images(vae, picture) / vae.config["scaling_factor"]
        return cls(vae.config["scaling_factor"], tuple(round(value, 4) for value in latents.flatten().tolist()))

    def matches(self, other: VaeFingerprint) -> bool:
        """Whether both encode alike: the same scaling factor, and probes within `PROBE_TOLERANCE` (relative RMS)."""
        if len(self.probe) != len(other.probe) or not math.isclose(self.scaling_factor, other.scaling_factor, rel_tol=1e-4):
            return False
        return math.dist(self.probe, other.probe) <= PROBE_TOLERANCE * max(math.hypot(*self.probe), math.hypot(*other.probe))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"scaling_factor": self.scaling_factor, "probe": list(self.probe)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VaeFingerprint:
        return cls(float(data["scaling_factor"]), tuple(float(value) for value in data["probe"]))
