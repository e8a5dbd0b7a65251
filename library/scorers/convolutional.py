"""What it takes to read latents with a convolutional network that was made for photographs of 224 pixels."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


def first_convolution(module: nn.Module) -> nn.Conv2d:
    """The convolution that reads the input: the first in the order in which the parts were made."""
    return next(part for part in module.modules() if isinstance(part, nn.Conv2d))


def set_stem_stride(module: nn.Module, stride: int) -> None:
    """Give the first convolution within `module` another stride, and padding with which a side of n becomes ceil(n / stride)."""
    name = next(name for name, part in module.named_modules() if isinstance(part, nn.Conv2d))
    conv = first_convolution(module)
    before, after = (conv.kernel_size[0] - 1) // 2, conv.kernel_size[0] // 2
    conv.stride, conv.padding = (stride, stride), (before, before)
    if before != after:  # an even kernel: a convolution pads both ends alike
        conv.padding = (0, 0)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Sequential(nn.ZeroPad2d((before, after, before, after)), conv))


def adapt_first_weights(weight: Tensor, in_channels: int) -> Tensor:
    """Weights [C, 3, k, k] of a convolution over colours for other inputs [C, in_channels, k, k]: repeated, as timm repeats them, and
    scaled so that the outputs stay about as large.

    Which colour meets which latent channel means nothing; the patterns in space are what is kept.
    """
    colours = weight.shape[1]
    return weight.repeat(1, math.ceil(in_channels / colours), 1, 1)[:, :in_channels] * (colours / in_channels)


class PadToEven(nn.Module):
    """Repeats the last row and column of maps with odd sides [B, C, h, w], so that halving them loses nothing and 1 cell can be halved."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")


def pad_before_halving(module: nn.Module) -> None:
    """Put a PadToEven before every convolution within `module` that cuts its input into patches of 2 x 2."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.kernel_size == child.stride == (2, 2):
            setattr(module, name, nn.Sequential(PadToEven(), child))
        else:
            pad_before_halving(child)
