"""--network_args, by the names that sd-scripts gave them: which modules get a branch, its rank and alpha, dropouts, learning rates."""

import ast
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.errors import UserError
from networks.lora_keys import block_index, is_transformer, num_blocks
from networks.lora_targets import TargetModule

_DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
_RATES = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "block_lr_zero_threshold")
_SIDES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")  # a number for each block of one direction, or the name of a curve
_BLOCKS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")  # a number for each block
_BY_NAME = ("network_reg_dims", "network_reg_lrs")  # numbers, each with a regular expression that is searched for in a module's name
_PATTERNS = ("exclude_patterns", "include_patterns")  # regular expressions that a module's whole path matches
NETWORK_ARGS = ("conv_dim", "conv_alpha", *_DROPOUTS, *_RATES, *_SIDES, *_BLOCKS, *_BY_NAME, *_PATTERNS)
_NOT_FROM_FILE = ("conv_dim", "conv_alpha", "network_reg_dims", *_BLOCKS, *_PATTERNS)
_ELSEWHERE: Mapping[str, str] = dict.fromkeys(
    ("algo", "preset", "factor", "dora_wd"), "it is LyCORIS', whose LoCon is conv_dim here; leave it out"
)
_CURVES = {
    "sine": lambda share: math.sin(math.pi * share / 2),
    "cosine": lambda share: math.sin(math.pi * (1 - share) / 2),
    "linear": lambda share: share,
    "reverse_linear": lambda share: 1 - share,
    "zeros": lambda share: 0.0,
}


@dataclass(frozen=True)
class Dropouts:
    """Probabilities in training, from 0 to below 1; None for none.

    Attributes:
        neuron: of each value between down and up.
        rank: of each of the rank's channels, for a whole row.
        module: of the branch as a whole, in one call.
    """

    neuron: float | None = None
    rank: float | None = None
    module: float | None = None

    def __post_init__(self) -> None:
        for name, probability in vars(self).items():
            if probability is not None and not 0 <= probability < 1:
                raise UserError(f"{name}_dropout is {probability}: it is a probability, from 0 to below 1")


@dataclass(frozen=True)
class NetworkOptions:
    """What --network_args say of each module. `values` are those given, as numbers, lists of numbers and patterns."""

    values: Mapping[str, Any]
    dim: int
    alpha: float
    dropouts: Dropouts
    config: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        kwargs: Mapping[str, Any],
        neuron_dropout: float | None,
        *,
        unet: nn.Module,
        dim: int | None = None,
        alpha: float | None = None,
        from_file: bool = False,
    ) -> "NetworkOptions":
        """From --network_args, whose values are strings. Raises UserError for an unknown name, a bad value, or two that contradict."""
        config: Mapping[str, Any] = unet.config  # type: ignore[assignment]
        values = {key: _parsed(key, value, config) for key, value in kwargs.items() if value is not None}
        if from_file and (given := [key for key in _NOT_FROM_FILE if key in values]):
            raise UserError(
                f"network_args: {given[0]} is given, but modules and ranks come from the file with dim_from_weights; leave it out"
            )
        if neuron_dropout is not None and "dropout" in values:
            raise UserError("network_dropout and dropout in network_args are two names of one setting; leave one of them out")
        for alphas, dims in (("conv_alpha", ("conv_dim", "conv_block_dims")), ("conv_block_alphas", ("conv_dim", "conv_block_dims"))):
            if alphas in values and not values.keys() & set(dims):
                raise UserError(
                    f"network_args: {alphas} is given without conv_dim: it is of convolutions, which conv_dim adds; give both or neither"
                )
        neuron = values.get("dropout", neuron_dropout)
        dropouts = Dropouts(neuron, values.get("rank_dropout"), values.get("module_dropout"))
        return cls(values, _rank("network_dim", 4 if dim is None else dim), 1.0 if alpha is None else alpha, dropouts, config)

    @property
    def has_convs(self) -> bool:
        return bool(self.values.keys() & {"conv_dim", "conv_block_dims"})

    def rank_and_alpha(self, target: TargetModule) -> tuple[int, float]:
        """Rank 0: the module gets no branch."""
        excluded, included = (any(pattern.fullmatch(target.path) for pattern in self.values.get(name, ())) for name in _PATTERNS)
        if (excluded and not included) or self.lr_factors(target)[0] == 0:
            return 0, 0.0
        rank, alpha, prefix = self.dim, self.alpha, ""
        if target.is_large_conv:
            rank, alpha, prefix = self.values.get("conv_dim", 0), self.values.get("conv_alpha", 1.0), "conv_"
        if target.part == "unet" and not is_transformer(self.config):
            block = block_index(target.path, self.config)
            rank = self.values[f"{prefix}block_dims"][block] if f"{prefix}block_dims" in self.values else rank
            alpha = self.values[f"{prefix}block_alphas"][block] if f"{prefix}block_alphas" in self.values else alpha
        own = self._by_name("network_reg_dims", target)
        return (int(rank), alpha) if own is None else (int(own), self.alpha)

    def own_lr(self, target: TargetModule) -> float | None:
        """The learning rate that network_reg_lrs give a module in place of its model's."""
        return self._by_name("network_reg_lrs", target)

    def _by_name(self, key: str, target: TargetModule) -> float | None:
        return next((number for pattern, number in self.values.get(key, ()) if pattern.search(target.name)), None)

    def lr_factors(self, target: TargetModule) -> tuple[float, float]:
        """What the learning rate is multiplied with, for down and for up: weights of the blocks, and LoRA+ (arXiv 2402.12354)."""
        weight = 1.0
        if target.part == "unet" and self.values.keys() & set(_SIDES) and self.own_lr(target) is None:
            sides = [self.values.get(name, [1.0] * length) for name, length in zip(_SIDES, num_blocks(self.config), strict=True)]
            ahead = 1 if len(sides[1]) == 3 else 0  # SDXL counts a block before the first
            weight = [1.0] * ahead + [weight for side in sides for weight in side]
            weight = weight[block_index(target.path, self.config)]
            weight = weight if weight > self.values.get("block_lr_zero_threshold", 0.0) else 0.0
        own = f"loraplus_{'unet' if target.part == 'unet' else 'text_encoder'}_lr_ratio"
        return weight, weight * self.values.get(own, self.values.get("loraplus_lr_ratio", 1.0))


def _numbers_by_pattern(key: str, value: str) -> Sequence[tuple[re.Pattern[str], float]]:
    found = []
    for pair in filter(None, map(str.strip, value.split(","))):
        pattern, _, number = pair.rpartition("=")
        try:
            found.append((re.compile(pattern), _rank(key, float(number)) if key == "network_reg_dims" else float(number)))
        except (re.error, ValueError) as error:
            raise UserError(
                f"network_args: {key} has {pair!r} ({error}); write pattern=number, for example {key}=attn1=8,ff_net=4"
            ) from error
    return found


def _parsed(key: str, value: Any, config: Mapping[str, Any]) -> Any:
    if key not in NETWORK_ARGS:
        nearest = difflib.get_close_matches(key, NETWORK_ARGS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(NETWORK_ARGS)}"
        raise UserError(f"network_args: {key} is not an option of networks.lora; {_ELSEWHERE.get(key, hint)}")
    if key in (*_SIDES, *_BLOCKS, "conv_dim", "conv_alpha", "block_lr_zero_threshold") and is_transformer(config):
        raise UserError(f"network_args: {key} is of a U-Net, and this model is a transformer; use network_reg_dims or network_reg_lrs")
    if key in _BY_NAME:
        return _numbers_by_pattern(key, str(value))
    if key in _PATTERNS:
        return _patterns(key, str(value))
    sizes: dict[str, int] = dict(zip(_SIDES, num_blocks(config), strict=True))
    if key in sizes and (str(value).partition("+")[0] in _CURVES):
        name, _, base = str(value).partition("+")
        last = max(sizes[key] - 1, 1)
        return [_CURVES[name](index / last) + float(base or 0) for index in range(sizes[key])]
    try:
        numbers = [float(part) for part in str(value).split(",")]
    except ValueError:
        curves = f", or one of {', '.join(_CURVES)}" if key in sizes else ""
        raise UserError(f"network_args: {key}={value} is not a number; write for example {key}=4{curves}") from None
    if key not in (*_SIDES, *_BLOCKS):
        if len(numbers) > 1:
            raise UserError(f"network_args: {key}={value} is a list; it is one number for all blocks")
        return _rank(key, numbers[0]) if key == "conv_dim" else numbers[0]
    length = sizes.get(key, sum(sizes.values()) + (2 if sizes["mid_lr_weight"] == 3 else 0))
    if len(numbers) != length:
        raise UserError(f"network_args: {key} has {len(numbers)} values; this model takes {length}, one for each block")
    return [_rank(key, number, least=0) for number in numbers] if key.endswith("dims") else numbers


def _patterns(key: str, value: str) -> Sequence[re.Pattern[str]]:
    try:
        given = ast.literal_eval(value)  # sd-scripts' form, ['.*attn1.*', ...]
    except (ValueError, SyntaxError):
        given = value
    try:
        return [re.compile(pattern) for pattern in ([given] if isinstance(given, str) else given)]
    except (re.error, TypeError) as error:
        raise UserError(f"network_args: {key}={value} is no list of regular expressions ({error}); write {key}=['.*attn1.*']") from error


def _rank(option: str, value: float, least: int = 1) -> int:
    if value < least or value != int(value):
        raise UserError(f"{option} is {value}: it is a rank, a whole number from {least} up")
    return int(value)
