"""Tensors without values, and how many bytes of them are held: on torch's device "meta", where operations have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from library.models.packed import PackedConv2d, PackedLinear
from library.types import Conditioning


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that are made while it is on, by the part that is named, and of those that it is shown.

    Args:
        part: of what is made outside all others.

    Attributes:
        now: bytes that are held.
        peaks: the most that was held, by part.
        rises: that, less what was held when the part began.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self.now, self.part = 0, part
        self.peaks: dict[str, int] = {}
        self.rises: dict[str, int] = {}
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # an alpha, which has no value here
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:  # a view of what was not shown does not count
                self.show(tensor)
        return out

    def show(self, *tensors: Tensor) -> None:
        """Count these too, until they are gone."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._held:
                self._held[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                self.add(size)

    def add(self, size: int) -> None:
        """Bytes that come, or (below 0) go."""
        self.now += size
        self.peaks[self.part] = max(self.peaks.get(self.part, 0), self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._held[key]
        self.add(-size)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part, start = self.part, part, self.now
        self.add(0)
        try:
            yield
        finally:
            self.part = before
            self.rises[part] = max(self.rises.get(part, 0), self.peaks[part] - start)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """On the device "meta", attention is fused and autocast rounds as they do on CUDA; by themselves they do neither.

    Functions of torch are exchanged: a TorchFunctionMode would be off within `backward`, where checkpoints are computed again.
    """
    enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    autocast, attention = torch.autocast, F.scaled_dot_product_attention

    def rounded(function: Callable[..., Tensor], low: bool) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if (args or tuple(kwargs.values()))[0].is_meta and enabled("cpu"):
                dtype = autocast_dtype("cpu") if low else torch.float32
                args, kwargs = tree_map_only(Tensor, lambda one: one.to(dtype), (args, kwargs))
            return function(*args, **kwargs)

        return call

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return attention(query, key, value, attn_mask, *args, **kwargs)
        # of PyTorch's fused kernels, the one that knows the device: an output, and a number for each row
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, attn_mask=attn_mask)[0]

    changes = {(F, name): rounded(getattr(F, name), True) for name in ("linear", "conv2d")}
    changes |= {(F, name): rounded(getattr(F, name), False) for name in ("layer_norm", "group_norm", "softmax")}
    changes |= {(F, "scaled_dot_product_attention"): rounded(fused, True)}
    # torch raises for the device "meta", which stands for one that has autocast
    changes |= {(torch, "is_autocast_enabled"): lambda device="cpu": enabled("cpu")}
    changes |= {(torch, "autocast"): lambda device, *args, **kw: nullcontext() if device == "meta" else autocast(device, *args, **kw)}
    changes |= {(torch, "get_autocast_dtype"): lambda device="cpu": autocast_dtype("cpu")}
    before = {place: getattr(*place) for place in changes}
    try:
        for (owner, name), function in changes.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


class _ToMeta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros(gradients[0].shape, dtype=gradients[0].dtype)


class _FromMeta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0], device="meta")


def without_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """A network's function on the device "meta", to be called with real tensors, and with made-up ones coming out."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(arg.to("meta") if isinstance(arg, Conditioning) else arg for arg in args)
        args, kwargs = tree_map_only(Tensor, lambda one: one if one.is_meta else _ToMeta.apply(one), (args, kwargs))
        return tree_map_only(Tensor, _FromMeta.apply, function(*args, **kwargs))

    return call


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights on the device; those that are swapped are not there."""
    tensors = [*module.parameters(), *module.buffers()]
    for layer in module.modules():
        if isinstance(layer, (PackedLinear, PackedConv2d)) and not layer.packed.swapped:
            tensors += layer.packed.parts
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
