"""From latents to pixels with a gradient, in as little memory as is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.models.vae import Autoencoder, LatentSpace, vae_class
from library.scorers.image_models.preprocessing import even_starts

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

SPACE = "latent_space"  # of an autoencoder whose configuration does not say it
OVERLAP = 0.25  # of a tile, that its neighbour shows too


class PixelDecoder(nn.Module):
    """The decoder of a VAE, or of a tiny one such as TAESD, frozen.

    A decoder may see the latents in tiles, some at a time, whose pixels are blended where they overlap. With checkpointing, every such
    portion is decoded once more in the backward pass, so that the activations of one portion are all that is ever held.

    Args:
        config: of the autoencoder, and its class.
        tile: side of a tile in latents; 0 decodes whole pictures.
        batch: tiles (or pictures) decoded at a time; 0 for all.
        checkpointing: whether to decode again in the backward pass rather than to keep activations.
    """

    def __init__(self, config: Mapping[str, Any], *, tile: int = 0, batch: int = 0, checkpointing: bool = True) -> None:
        super().__init__()
        self.tile, self.batch, self.checkpointing = tile, batch, checkpointing
        config = dict(config)
        space = config.pop(SPACE, None)
        autoencoder: Any = vae_class(config["_class_name"]).from_config(config)
        if checkpointing and autoencoder._supports_gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        self.decoder, self.post_quant = autoencoder.decoder, post_quant_of(autoencoder)
        self.space = LatentSpace.of(autoencoder) if space is None else LatentSpace.from_dict(space)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PixelDecoder:
        return super().train(False)  # it is never trained

    def take_weights(self, autoencoder: Autoencoder) -> None:
        """Copy the weights of an autoencoder of the same configuration, rounded to the fp16 in which they are stored."""
        state = {f"decoder.{name}": tensor for name, tensor in autoencoder.decoder.state_dict().items()}
        state |= {f"post_quant.{name}": tensor for name, tensor in post_quant_of(autoencoder).state_dict().items()}
        self.load_state_dict({name: tensor.half() for name, tensor in state.items()})

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W], about 0..1, not clamped."""
        dtype = next(self.decoder.parameters()).dtype
        with torch.autocast(latents.device.type, enabled=False):
            latents = self.space.denormalise(latents.to(dtype))
            height, width = latents.shape[-2:]
            if self.tile == 0 or max(height, width) <= self.tile:
                return self._decode_in_portions(latents)
            tile = min(self.tile, height), min(self.tile, width)
            corners = [(top, left) for top in tile_starts(height, tile[0]) for left in tile_starts(width, tile[1])]
            tiles = torch.cat([latents[..., top : top + tile[0], left : left + tile[1]] for top, left in corners])
            decoded = self._decode_in_portions(tiles)
            return blend(decoded.unflatten(0, (len(corners), -1)), corners, decoded.shape[-1] // tile[1])

    def _decode_in_portions(self, latents: Tensor) -> Tensor:
        portions = latents.split(self.batch or len(latents))
        if self.checkpointing and torch.is_grad_enabled() and latents.requires_grad and len(portions) > 1:
            return torch.cat([checkpoint(self._decode, portion, use_reentrant=False) for portion in portions])
        return torch.cat([self._decode(portion) for portion in portions])

    def _decode(self, latents: Tensor) -> Tensor:
        pixels = self.decoder(self.post_quant(latents))
        return (pixels[:, :, 0] if self.space.has_frames else pixels) / 2 + 0.5


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length and overlap by at least OVERLAP of a tile."""
    overlap = round(OVERLAP * tile)
    return even_starts(length - overlap, tile - overlap)


def blend(tiles: Tensor, corners: Sequence[tuple[int, int]], ratio: int) -> Tensor:
    """Decoded tiles [N, B, 3, H, W] to whole pictures [B, 3, ...]: the mean of what overlaps, weighted less towards a tile's edges.

    Args:
        corners: the tiles' upper left corners, in latents. ratio: pixels to a latent.
    """
    height, width = tiles.shape[-2:]
    bottom, right = (max(starts) * ratio for starts in zip(*corners, strict=True))
    total = tiles.new_zeros(bottom + height, right + width)
    canvas = tiles.new_zeros(*tiles.shape[1:3], *total.shape)
    window = torch.outer(_ramp(height), _ramp(width)).to(tiles)
    for tile, (top, left) in zip(tiles, corners, strict=True):
        rows, columns = slice(top * ratio, top * ratio + height), slice(left * ratio, left * ratio + width)
        canvas[..., rows, columns] += tile * window
        total[rows, columns] += window
    return canvas / total


def _ramp(length: int) -> Tensor:
    """Rises linearly over OVERLAP of the length to 1, and falls again."""
    place = torch.arange(length) + 0.5
    return (torch.minimum(place, length - place) / (OVERLAP * length)).clamp_max(1)


def load_tiny_autoencoder(folder: str, setting: str = "decoder", otherwise: str = "vae for the run's own VAE") -> AutoencoderTiny:
    """A tiny autoencoder such as TAESD, from the folder of diffusers' AutoencoderTiny.

    Raises:
        UserError: the folder, given as `setting`, is none.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{setting} {folder} is not the folder of a tiny autoencoder such as TAESD: it has no config.json")
    from diffusers import AutoencoderTiny

    config: Any = AutoencoderTiny.load_config(folder)
    if config.get("_class_name") != "AutoencoderTiny":
        raise UserError(f"{setting} {folder} is not the folder of a tiny autoencoder such as TAESD; give that, or {otherwise}")
    try:
        return AutoencoderTiny.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{setting} {folder} cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def check_decodes(autoencoder: Autoencoder, vae: Autoencoder, given: str) -> None:
    """Raises UserError, by the name of what was `given`, if an autoencoder cannot decode the latents of a VAE."""
    own, wanted = LatentSpace.of(autoencoder), LatentSpace.of(vae)
    if (own.channels, own.downsampling) != (wanted.channels, wanted.downsampling):
        raise UserError(
            f"{given} is for latents of {own.channels} channels, {own.downsampling} pixels wide, and the model makes {wanted.name} "
            f"({wanted.channels} channels, {wanted.downsampling} pixels); give one that belongs to this VAE"
        )


def post_quant_of(autoencoder: Autoencoder) -> nn.Module:
    """The convolution before its decoder, which not all have."""
    return getattr(autoencoder, "post_quant_conv", None) or nn.Identity()


def decoder_config(autoencoder: Autoencoder) -> dict[str, Any]:
    """The arguments that it was made with, as JSON values, the name of its class, and the latents where they do not follow from those."""
    arguments = inspect.signature(type(autoencoder).__init__).parameters
    config = {key: value for key, value in dict(autoencoder.config).items() if key in arguments}
    space = LatentSpace.of(autoencoder)
    own = {SPACE: asdict(space)} if space.packing > 1 else {}
    return {**config, "_class_name": type(autoencoder).__name__, **own}
