"""A VAE's large layers in strips of rows: the same numbers, to rounding, in a fraction of the memory.

A normalisation needs the whole picture, so its statistics are taken first. Then one strip of rows after the other is normalised and
convolved, with the rows above and below it that the convolution sees, and written over the layer's input, which nothing reads any more.
Nothing is blended, unlike in tiles whose normalisations do not know of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

STRIP = 2**22  # numbers in a strip
LARGE = 2**24  # numbers in a layer's output; smaller ones are computed at once
RowSource = Callable[[int, int], Tensor]  # from one row to before another -> [B, C, rows, W]


def for_pictures(vae: Any) -> None:
    """Let a VAE of films (Qwen-Image's, Wan's) know that it sees single frames: its causal convolutions are of height and width alone, for
    the frames before the first are zeros, and it keeps no layer's input for a frame to come. Other VAEs stay as they are."""
    if not hasattr(vae, "clear_cache") or vae.config.get("is_residual"):
        return
    vae.clear_cache = MethodType(_keep_nothing, vae)  # a bound method is copied with the module
    for module in vae.modules():
        if type(module).__name__ in ("QwenImageCausalConv3d", "WanCausalConv3d"):
            module.forward = MethodType(_of_one_frame, module)


def _keep_nothing(vae: Any) -> None:
    vae._feat_map = vae._enc_feat_map = None


def _of_one_frame(conv: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if cache_x is not None or x.shape[2] != 1:
        return type(conv).forward(conv, x, cache_x)
    padding = conv._padding[2], conv._padding[0]
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], padding)[:, :, None]


@contextmanager
def in_slices(vae: AutoencoderKL) -> Iterator[None]:
    """Within the block, layers of large pictures are computed in strips, unless a gradient may be asked for."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    sliced = {ResnetBlock2D: _resnet, Upsample2D: _upsample}
    changed = [module for module in vae.modules() if type(module) in sliced and "forward" not in vars(module)]
    for module in changed:
        module.forward = _either(module, module.forward, sliced[type(module)])
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _either(module: nn.Module, whole: Callable[..., Tensor], sliced: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    factor = 4 if sliced is _upsample else 1  # of numbers that come out for one that goes in

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() or factor * x.numel() <= LARGE:
            return whole(x, *args, **kwargs)
        return sliced(module, x)

    return forward


def _resnet(block: Any, x: Tensor) -> Tensor:
    """diffusers' ResnetBlock2D, as VAEs have it: no embedding of a timestep, no change of size."""
    hidden, channels = x.new_empty(len(x), block.conv1.out_channels, *x.shape[2:]), block.conv1.out_channels
    for top, bottom, strip in _convolved(block.conv1, _normalised(block.norm1, x), x.shape):
        hidden[:, :, top:bottom] = strip
    out = x[:, :channels] if channels <= x.shape[1] else torch.empty_like(hidden)
    for top, bottom, strip in _convolved(block.conv2, _normalised(block.norm2, hidden), hidden.shape):
        own = x[:, :, top:bottom]
        shortcut = own if block.conv_shortcut is None else block.conv_shortcut(own)
        out[:, :, top:bottom] = (shortcut + strip) / block.output_scale_factor
    del hidden
    return out.clone() if channels < x.shape[1] else out  # a part of x would hold all of it


def _upsample(layer: Any, x: Tensor) -> Tensor:
    """diffusers' Upsample2D: twice as high and wide, each position four times, then a convolution."""
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    out = x.new_empty(len(x), layer.conv.out_channels, height, width)

    def doubled(low: int, high: int) -> Tensor:
        part = x[:, :, low // 2 : (high + 1) // 2].repeat_interleave(2, 2).repeat_interleave(2, 3)
        return part[:, :, low % 2 :][:, :, : high - low]

    for top, bottom, strip in _convolved(layer.conv, doubled, (len(x), x.shape[1], height, width)):
        out[:, :, top:bottom] = strip
    return out


def _normalised(norm: nn.GroupNorm, x: Tensor) -> RowSource:
    """Rows of silu(norm(x)), until x is written to."""
    exact = torch.promote_types(x.dtype, torch.float32)
    groups = [torch.var_mean(group.to(exact), (1, 2, 3), correction=0) for group in x.unflatten(1, (norm.num_groups, -1)).unbind(1)]
    variance, mean = (torch.stack(parts, 1).repeat_interleave(x.shape[1] // norm.num_groups, 1) for parts in zip(*groups, strict=True))
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    scale, shift = (part[:, :, None, None].to(x.dtype) for part in (scale, shift))
    return lambda low, high: F.silu(torch.addcmul(shift, x[:, :, low:high], scale))


def _convolved(conv: nn.Conv2d, rows: RowSource, shape: torch.Size | tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    """A 3 x 3 convolution with a border of zeros, of `rows`, strip after strip: its first row, the row after its last, and its output."""
    count, channels, height, width = shape
    step = max(1, STRIP // (count * max(channels, conv.out_channels) * width))
    for top in range(0, height, step):
        bottom = min(top + step, height)
        low, high = max(top - 1, 0), min(bottom + 1, height)
        strip = F.pad(rows(low, high), (0, 0, low - (top - 1), bottom + 1 - high))
        yield top, bottom, F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))
