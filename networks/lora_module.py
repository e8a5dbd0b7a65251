"""One low-rank branch, and the multiplier that all branches of a network obey."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.lora_options import Dropouts
from networks.lora_targets import TargetModule

LARGEST_RANK = 4096  # more would take more than a machine's memory, and no weight of these models has as much to it


class Strength:
    """The multiplier in force: a float, or one value per sample [B].

    Gradient checkpointing runs a forward again inside backward(), when the multiplier may have changed or a `disabled()` block
    may have ended; the gradient would be silently wrong. A function that went through `capture` is run again with the
    multiplier of its first run, and a module that is run again without that is an error.
    """

    def __init__(self, multiplier: float | Tensor) -> None:
        self.multiplier = multiplier
        self._num_disabled = 0
        self._captured = False
        self._per_row_of: Tensor | None = None
        self._per_row: dict[tuple[int, int, torch.dtype, float], Tensor] = {}

    def per_row(self, multiplier: Tensor, rows: int, ndim: int, dtype: torch.dtype, scale: float) -> Tensor:
        """scale * multiplier for each of `rows` rows, a multiple of its B, as a factor of a tensor of `ndim` dimensions.

        Modules of one shape and scale share it, as long as the multiplier is in force.
        """
        assert rows % len(multiplier) == 0, f"{rows} rows for {len(multiplier)} multipliers"
        compiling = torch.compiler.is_compiling()  # which fuses it into the kernel that needs it
        if self._per_row_of is not multiplier and not compiling:
            self._per_row_of, self._per_row = multiplier, {}
        key = rows, ndim, dtype, scale
        if compiling or key not in self._per_row:
            factor = (multiplier * scale).repeat(rows // len(multiplier)).reshape(rows, *[1] * (ndim - 1)).to(dtype)
            if compiling:
                return factor
            self._per_row[key] = factor
        return self._per_row[key]

    def in_force(self) -> float | Tensor:
        # torch.utils.checkpoint itself asks like this. torch.compile cannot trace it, and would compile each module on its own, to give up
        # after eight; while it traces, no backward is running.
        inside_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        assert self._captured or not inside_backward, (
            "a checkpoint recomputes LoRA modules in backward() without the multiplier of the forward: call "
            "network.enable_gradient_checkpointing() after the model's, or use network.checkpoint(function, *args)"
        )
        return 0.0 if self._num_disabled else self.multiplier

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self._num_disabled += 1
        try:
            yield
        finally:
            self._num_disabled -= 1

    def capture(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, bound to the multiplier of this moment however often and whenever it is run."""
        now = self.multiplier, self._num_disabled, True

        @functools.wraps(function, updated=())
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.multiplier, self._num_disabled, self._captured
            self.multiplier, self._num_disabled, self._captured = now
            try:
                return function(*args, **kwargs)
            finally:
                self.multiplier, self._num_disabled, self._captured = before

        return run


def _take_scale(module: nn.Module, keys: object) -> None:
    """Of the alpha that was loaded; of one without a value, on meta tensors, there is none."""
    assert isinstance(module, LoRAModule)
    if not module.alpha.is_meta:
        module.scale = module.alpha.item() / module.rank


class LoRAModule(nn.Module):
    """up(down(x)) * multiplier * alpha / rank, added to what a Linear or Conv2d returns.

    The weights are float32 whatever the base module is in; half-precision updates of a small matrix round to nothing.

    Args:
        target: which module; its shape is copied, and it is neither held nor changed before `attach`.
        alpha: 0 stands for rank, that is scale 1.
        dropouts: they draw from torch's global generator, the only one that gradient checkpointing rewinds.
        lr_factors: what the learning rate is multiplied with, for down and for up.
        own_lr: the learning rate in place of the model's; None for that.
        generator: for the initial values, on the CPU; None is torch's global one.
    """

    alpha: Tensor

    def __init__(
        self,
        target: TargetModule,
        strength: Strength,
        *,
        rank: int,
        alpha: float,
        dropouts: Dropouts,
        lr_factors: tuple[float, float] = (1.0, 1.0),
        own_lr: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank > LARGEST_RANK:
            raise UserError(f"{target.path} would have rank {rank}, and {LARGEST_RANK} is the largest: a branch would outgrow its module")
        self.name, self.aliases, self.part, self.path, self.dotted = target.name, target.aliases, target.part, target.path, target.dotted
        self.rank = rank
        self.lr_factors, self.own_lr = lr_factors, own_lr
        self.dropouts = dropouts
        self._strength = strength
        self._base: tuple[nn.Module, Any] | None = None  # in a tuple, so that it does not become a submodule
        base = target.base
        kind: dict[str, Any] = {"bias": False, "dtype": torch.float32, "device": "cpu"}
        if isinstance(base, nn.Linear):
            self.lora_down: nn.Linear | nn.Conv2d = nn.Linear(base.in_features, rank, **kind)
            self.lora_up: nn.Linear | nn.Conv2d = nn.Linear(rank, base.out_features, **kind)
        else:
            assert isinstance(base, nn.Conv2d) and base.groups == 1, f"{target.path}: {base}"
            window: dict[str, Any] = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
            self.lora_down = nn.Conv2d(base.in_channels, rank, base.kernel_size, **window, **kind)  # type: ignore[arg-type]
            self.lora_up = nn.Conv2d(rank, base.out_channels, 1, **kind)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        self.scale = float(alpha or rank) / rank  # as a number, which is not waited for
        self.register_load_state_dict_post_hook(_take_scale)

    def set_alpha(self, alpha: float) -> None:
        """What the branch's output is multiplied with, over its rank."""
        self.alpha.fill_(alpha)
        self.scale = alpha / self.rank

    def attach(self, base: nn.Module) -> None:
        """Run with every call of `base` from now on."""
        assert self._base is None, f"{self.name} is already attached"
        self._base = base, base.__dict__.get("forward")
        self._base_forward = base.forward
        base.forward = self.forward

    def detach(self) -> None:
        assert self._base is not None, f"{self.name} is not attached"
        base, overridden = self._base
        if overridden is None:
            del base.forward
        else:
            base.forward = overridden
        self._base = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the base module's weight."""
        return len(self.lora_up.weight), *self.lora_down.weight.shape[1:]

    def delta(self) -> Tensor:
        """What the branch adds to the base module's weight at multiplier 1, in that weight's shape."""
        down, up = self.lora_down.weight, self.lora_up.weight
        product = up.flatten(1) @ down.flatten(1) * self.scale
        return product.reshape(up.shape[0], *down.shape[1:])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [rows, ...], where rows is a multiple of the multiplier's B -> the base module's output, in its dtype."""
        base_output = self._base_forward(x, *args, **kwargs)
        multiplier = self._strength.in_force()
        if not isinstance(multiplier, torch.Tensor) and multiplier == 0:
            return base_output
        if self.training and self.dropouts.module and torch.rand(()) < self.dropouts.module:
            return base_output
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_down.weight.dtype)
        hidden = self._drop(self.lora_down(x))
        # Scaled between down and up, where the activation is smallest.
        if isinstance(multiplier, torch.Tensor):
            hidden = hidden * self._strength.per_row(multiplier.to(x.device), len(hidden), hidden.ndim, hidden.dtype, self.scale)
        else:
            hidden = hidden * (multiplier * self.scale)
        if isinstance(self.lora_up, nn.Linear) and hidden.dtype == base_output.dtype:  # one kernel for the product and the sum
            flat = torch.addmm(base_output.flatten(0, -2), hidden.flatten(0, -2), self.lora_up.weight.t())
            return flat.view_as(base_output)
        return base_output + self.lora_up(hidden).to(base_output.dtype)

    def _drop(self, hidden: Tensor) -> Tensor:
        if self.training and self.dropouts.neuron:
            hidden = nn.functional.dropout(hidden, self.dropouts.neuron)
        if self.training and self.dropouts.rank:
            # One mask over the rank per row: channels are last for Linear, second for Conv2d.
            rank_dim = 1 if isinstance(self.lora_down, nn.Conv2d) else hidden.ndim - 1
            shape = [size if dim in (0, rank_dim) else 1 for dim, size in enumerate(hidden.shape)]
            hidden = hidden * nn.functional.dropout(torch.ones(shape, dtype=hidden.dtype, device=hidden.device), self.dropouts.rank)
        return hidden
