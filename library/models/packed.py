"""Frozen weights of a U-Net in 8 or 4 bits, or in the computer's memory: a layer unpacks its own when it computes, and again for the
backward pass, which would otherwise hold every unpacked weight until then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale in nf4
NF4 = (  # quantiles of the normal distribution, from bitsandbytes
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023),
    *(1.0,),
)
SMALLEST = 4096  # weights with fewer numbers stay as they are
# of diffusers; what blocks_to_swap counts
SWAPPED = ("ResnetBlock2D", "BasicTransformerBlock", "ZImageTransformerBlock", "CosmosTransformerBlock")
PARTS = ("down_blocks", "mid_block", "up_blocks", "noise_refiner", "context_refiner", "layers", "transformer_blocks")  # that hold blocks


@dataclass(frozen=True)
class PackedWeight:
    """A weight, and how it is brought back.

    Attributes:
        parts: tensors that hold it.
        restore: from the parts, on the device that computes, to the weight in a dtype.
        shape: of the weight.
        swapped: whether the parts stay on the CPU.
    """

    parts: tuple[Tensor, ...]
    restore: Callable[[tuple[Tensor, ...], torch.dtype], Tensor]
    shape: torch.Size
    swapped: bool

    def unpacked(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        parts = tuple(part.to(device, non_blocking=True) for part in self.parts)
        return self.restore(parts, dtype).reshape(self.shape)

    def placed(self, device: torch.device, swapped: bool) -> PackedWeight:
        """Where it is to stay: on the device, or on the CPU, from where it is copied without a wait if that can be."""
        if not swapped:
            return PackedWeight(tuple(part.to(device) for part in self.parts), self.restore, self.shape, swapped)
        parts = tuple(part.cpu() if device.type != "meta" else part for part in self.parts)
        if device.type == "cuda":
            parts = tuple(part.pin_memory() for part in parts)
        return PackedWeight(parts, self.restore, self.shape, swapped)


def pack_whole(weight: Tensor) -> PackedWeight:
    return PackedWeight((weight,), lambda parts, dtype: parts[0].to(dtype), weight.shape, False)


def pack_fp8(weight: Tensor) -> PackedWeight:
    """float8_e4m3 with a scale for each output channel."""
    return _pack_rows(weight, torch.finfo(torch.float8_e4m3fn).max, lambda rows: rows.to(torch.float8_e4m3fn))


def pack_int8(weight: Tensor) -> PackedWeight:
    """Whole numbers from -127 to 127 with a scale for each output channel."""
    return _pack_rows(weight, 127, lambda rows: rows.round().to(torch.int8))


def pack_nf4(weight: Tensor) -> PackedWeight:
    """4-bit NormalFloat with a scale for 64 weights (arXiv 2305.14314), two to a byte."""
    flat = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).unflatten(0, (-1, BLOCK))
    scales = flat.abs().amax(1, keepdim=True).clamp_min(1e-12)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(flat / scales, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()

    count = weight.numel()

    def restore(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, scales, levels = parts
        pairs = torch.stack([codes >> 4, codes & 15], 1).int()
        return (levels.to(dtype)[pairs].view(-1, BLOCK) * scales.to(dtype)).flatten()[:count]

    return PackedWeight((codes[::2] << 4 | codes[1::2], scales, levels), restore, weight.shape, False)


PACKERS = {"fp8": pack_fp8, "int8": pack_int8, "nf4": pack_nf4}


def _pack_rows(weight: Tensor, largest: float, rounded: Callable[[Tensor], Tensor]) -> PackedWeight:
    rows = weight.detach().float().flatten(1)
    scales = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / largest
    codes = rounded(rows / scales)
    return PackedWeight((codes, scales), lambda parts, dtype: parts[0].to(dtype) * parts[1].to(dtype), weight.shape, False)


class _Frozen(torch.autograd.Function):
    """A layer's output, and the gradient to its input; neither holds the unpacked weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear | PackedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x, layer.packed.unpacked(x.device, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.layer.to_input(gradient, ctx.layer.packed.unpacked(gradient.device, gradient.dtype), ctx.shape), None


class _Packed(nn.Module):
    """A frozen layer, before the class of torch that it stands in for. `weight` unpacks."""

    packed: PackedWeight
    bias: Any

    @property
    def weight(self) -> Tensor:
        return self.packed.unpacked(self.packed.parts[0].device, torch.float32)

    def bias_of(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):  # which does not see through a function of our own
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return _Frozen.apply(input, self)  # type: ignore[return-value]


class PackedLinear(_Packed, nn.Linear):  # type: ignore[misc]
    def __init__(self, linear: nn.Linear, packed: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self.packed = linear.in_features, linear.out_features, linear.bias, packed

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias_of(x))

    def to_input(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class PackedConv2d(_Packed, nn.Conv2d):  # type: ignore[misc]
    def __init__(self, conv: nn.Conv2d, packed: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(conv).items() if not name.startswith("_")})
        self._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        self.bias, self.packed = conv.bias, packed

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias_of(x))

    def to_input(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return torch.nn.grad.conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


@torch.no_grad()
def pack_unet(unet: Any, precision: str | None, blocks_to_swap: int, device: torch.device | str) -> int:
    """Put packed layers in the places of a network's Linear and Conv2d layers inside its blocks -> how many blocks are swapped.

    Args:
        precision: "fp8", "int8", "nf4"; None leaves the weights as they are, and packs those that are swapped only.
        blocks_to_swap: so many of its residual and transformer blocks, the largest first, keep their weights on the CPU.
        device: where the others' weights go. The rest of the network is not moved.
    """
    blocks = [block for block in unet.modules() if type(block).__name__ in SWAPPED]
    blocks.sort(key=lambda block: -sum(parameter.numel() for parameter in block.parameters()))
    swapped = {id(module) for block in blocks[:blocks_to_swap] for module in block.modules()}
    pack, device = PACKERS[precision] if precision else pack_whole, torch.device(device)
    made: dict[int, nn.Module] = {}  # a layer may have two names
    for part in (getattr(unet, name) for name in PARTS if hasattr(unet, name)):
        for parent, name in [(module, name) for module in part.modules() for name in module._modules]:
            layer: Any = getattr(parent, name)
            if type(layer) not in (nn.Linear, nn.Conv2d) or layer.weight.numel() < SMALLEST:
                continue
            own = id(layer) in swapped
            if not (precision or own):
                continue
            if id(layer) not in made:
                packed = pack(layer.weight.detach()).placed(device, own)
                made[id(layer)] = PackedLinear(layer, packed) if isinstance(layer, nn.Linear) else PackedConv2d(layer, packed)
                layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)  # free it now
            setattr(parent, name, made[id(layer)])
    return min(blocks_to_swap, len(blocks))
