"""What a run will need of the graphics card's memory, counted before it: the run's own code on tensors without values.

The networks stand on torch's device "meta", where operations have shapes and no values, and no weight is read. What they are given and
what they put out is real, small and on the CPU, so that the run's own code goes through. Every tensor counts, from when it is made until
nobody holds it. Not counted: the workspace of convolutions, what the allocator rounds up, and the driver's own (`BESIDES`).
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from library.measuring.image_statistics import vae_features
from library.models.base import DiffusionModel
from library.models.packed import PackedConv2d, PackedLinear, pack_unet
from library.models.vae import VaeFingerprint
from library.rollouts.sample import DECODED_PIXELS, decode, model_autocast, sample
from library.scorers.io import load_scorer
from library.settings.shared import OptimizerConfig
from library.slider_training.setup import LecoScoreConfig, SliderParts, prepare
from library.training.optimizers import create_optimizer
from library.training.runtime import weight_dtype
from library.types import Conditioning

logger = logging.getLogger(__name__)

GIB = 2**30
BESIDES = 0.6  # GiB that CUDA, its libraries and their workspaces take; measured by nobody here, so a guess
LOAD, PROMPTS, START, STEP, SAMPLE, SCORE, DECODE, COMPARE = PARTS = (
    "load",
    "encode prompts",
    "start trajectories",
    "training step",
    "measure: sample",
    "measure: score",
    "measure: decode",
    "measure: compare",
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes.

    Attributes:
        weights: what stands on the device for the whole run or a part of it, by name.
        peaks: by part of `PARTS`, in the order in which a run goes through them; all that is held there, weights too.
        rises: how much of that came within the part.
        settings: what it was counted with.
    """

    weights: Mapping[str, int]
    peaks: Mapping[str, int]
    rises: Mapping[str, int]
    settings: Mapping[str, Any]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def __str__(self) -> str:
        held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.weights.items())
        where = max(self.peaks, key=lambda name: self.peaks[name])
        lines = [f"{name:20} {size / GIB:6.2f} GiB" for name, size in self.peaks.items()]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return "\n".join(
            [
                f"Counted, not run, with {settings}:",
                f"held, in GiB: {held}",
                *lines,
                f"The most is {self.peak / GIB:.2f} GiB, in the part {where!r}. CUDA and its libraries take some {BESIDES} GiB more.",
            ]
        )


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that are made while it is on, by the part that is named, and of those that it is shown.

    Attributes:
        now: bytes that are held.
        peaks: the most that was held, by part.
        rises: that, less what was held when the part began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.part = 0, LOAD
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
def _as_on_cuda() -> Iterator[None]:
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


def _without_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """A network's function on the device "meta", to be called with real tensors, and with made-up ones coming out."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(arg.to("meta") if isinstance(arg, Conditioning) else arg for arg in args)
        args, kwargs = tree_map_only(Tensor, lambda one: one if one.is_meta else _ToMeta.apply(one), (args, kwargs))
        return tree_map_only(Tensor, _FromMeta.apply, function(*args, **kwargs))

    return call


def _counted(model: DiffusionModel, allocations: Allocations, fingerprint: VaeFingerprint) -> DiffusionModel:
    """A model on the device "meta" that is used like one on the CPU, and whose parts come and go in the count as on a graphics card."""
    resting: set[int] = set()

    class Counted(type(model)):  # type: ignore[misc]
        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> Any:
            with allocations.within(PROMPTS):
                return _without_values(super()._hidden_states)(text_encoder, token_ids, *others)

        @contextmanager
        def _fetched(self, module: Any) -> Iterator[None]:
            size = _size(module) if id(module) in resting else 0
            allocations.add(size)
            try:
                yield
            finally:
                allocations.add(-size)

        def _rest(self, module: Any) -> None:
            if id(module) not in resting:
                resting.add(id(module))
                allocations.add(-_size(module))

        def rest_vae(self) -> None:
            self._rest(self.vae)

        def rest_text_encoders(self) -> None:
            for text_encoder in self.text_encoders:
                self._rest(text_encoder)

        def free_text_encoders(self) -> None:
            self.rest_text_encoders()
            super().free_text_encoders()

        def vae_fingerprint(self) -> VaeFingerprint:
            return fingerprint

    model.__class__ = Counted
    unet: Any = model.unet
    vae: Any = model.vae
    unet.forward, vae.decode, encode = _without_values(unet.forward), _without_values(vae.decode), vae.encode
    vae.encode = lambda pixels, **_: [SimpleNamespace(mode=lambda: _without_values(lambda own: encode(own)[0].mode())(pixels))]
    allocations.add(sum(map(_size, (model.unet, model.vae, *model.text_encoders))))
    return model


def _size(module: nn.Module) -> int:
    """Bytes of a module's weights on the device; those that are swapped are not there."""
    tensors = [*module.parameters(), *module.buffers()]
    for layer in module.modules():
        if isinstance(layer, (PackedLinear, PackedConv2d)) and not layer.packed.swapped:
            tensors += layer.packed.parts
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def optimizer_bytes(config: OptimizerConfig) -> float:
    """Bytes of an optimizer's states for each number that is trained, seen on a small one; those that are paged do not count."""
    if "paged" in config.optimizer_type.lower():
        return 0.0
    count = 2**16  # bitsandbytes keeps fewer than 4,096 in 32 bits
    parameter = nn.Parameter(torch.zeros(256, count // 256))
    optimizer = create_optimizer(config, [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(value.nbytes for value in states) / count


def estimate(config: LecoScoreConfig, load: Callable[..., DiffusionModel] | None = None) -> Estimate:
    """What a run with these settings needs, if it runs on a graphics card. Some 20 seconds for SD1, and a minute for SDXL.

    Args:
        load: makes the model, without values; None loads what the settings name.

    Raises:
        UserError: whatever the run itself would refuse.
    """
    precision = config.training.mixed_precision or "bf16"
    # two steps a trajectory are enough: what is held at once is the same
    config = replace(
        config,
        rollout=replace(config.rollout, max_denoising_steps=2),
        training=replace(config.training, seed=config.training.seed or 0, torch_compile=False, xformers=False),
    )
    model = (load or config.model.load)(dtype=weight_dtype(precision), device="meta")
    pack_unet(model.unet, config.memory.quantize_base, config.memory.blocks_to_swap, "meta")
    allocations = Allocations()
    with tempfile.TemporaryDirectory() as folder, _as_on_cuda(), allocations:
        config = replace(config, saving=replace(config.saving, output_dir=Path(folder)))
        fingerprints = [load_scorer(path, config.reward.allow_code).spec.vae for path in config.reward.scorer]
        model = _counted(model, allocations, fingerprints[0] if fingerprints else VaeFingerprint(1.0, ()))
        weights = {"U-Net": _size(model.unet), "text encoders": sum(map(_size, model.text_encoders)), "VAE": _size(model.vae)}
        process: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision, process_index=0, num_processes=1)
        with allocations.within(START):
            made = prepare(config, process, model)
        for scorer in made.context.reward.scorers:
            scorer.to("meta").forward = _without_values(scorer.forward)
        trained = sum(parameter.nbytes for parameter in made.network.parameters())
        states = round(optimizer_bytes(config.optimizer) * trained / 4)
        weights |= {
            "scorers": sum(map(_size, made.context.reward.scorers)),
            "LoRA": trained,
            "its gradients": trained,
            "optimizer": states,
        }
        allocations.add(states)
        training_step(made, allocations.within)
        if made.monitor.pictures.prompts:
            measurement(made, allocations.within)
    size = made.context.sampling.size
    settings = {"precision": precision, "train_batch_size": config.rollout.batch_size, "resolution": f"{size[1]}x{size[0]}"}
    peaks, rises = ({part: counted[part] for part in PARTS if part in counted} for counted in (allocations.peaks, allocations.rises))
    return Estimate(weights=weights, peaks=peaks, rises=rises, settings=settings)


def training_step(made: SliderParts, within: Callable[[str], AbstractContextManager[None]]) -> None:
    """The losses of one update and their gradients, in the part `STEP`."""
    with within(STEP):
        for term in made.terms.values():
            with model_autocast(made.model):
                out = term()
            out.loss.backward()
    made.network.zero_grad()


@torch.no_grad()
def measurement(made: SliderParts, within: Callable[[str], AbstractContextManager[None]]) -> None:
    """A batch of pictures, as the monitor makes and compares them, in the parts from `SAMPLE` on."""
    model, pictures = made.model, made.monitor.pictures
    sampling = replace(pictures.sampling, num_steps=2, sampler=pictures.measurer.sampling.sampler)
    prompt = pictures.prompts[0]
    size = sampling.of(prompt).size
    count = sampling.pictures_at_once(model, size)
    with within(SAMPLE):
        latents = sample(model, made.network, [prompt] * count, [0] * count, 1.0, sampling=sampling, encoder=made.context.encoder)
    with within(SCORE):
        cond = made.context.encoder.cond([prompt] * count, size)
        made.context.reward(latents, torch.zeros(count), cond, [prompt] * count)
    with within(DECODE):
        shown = decode(model, latents[: max(1, DECODED_PIXELS // (size[0] * size[1]))])  # as many as are decoded at once
    with within(COMPARE), model.vae_at_work():
        own = [vae_features(model.vae, shown[:1].expand(len(pictures.measurer.seeds[0]), -1, -1, -1)) for _ in range(2)]
    del own
