"""The first half of a U-Net, and its taps: the outputs of its blocks, which a scorer reads."""

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from library.errors import UserError

MID_BLOCK = "mid_block"
NEEDED = ("down_block_types", "block_out_channels", "cross_attention_dim")  # read by name here
IRRELEVANT = ("self", "sample_size", "out_channels", "up_block_types")  # to the first half


def tap_names(taps: str, config: Mapping[str, Any]) -> list[str]:
    """Which blocks are read, in the order in which the U-Net runs them.

    Args:
        taps: "all" of the down and mid blocks (LRM, arXiv 2502.01051), or "first_third" of the network's down, mid and up blocks (which is
            enough for PAVRM, arXiv 2511.21541).
        config: of the U-Net.

    Raises:
        UserError: another word.
    """
    downs = [f"down_blocks.{index}" for index in range(len(config["down_block_types"]))]
    blocks = [*downs, MID_BLOCK]
    if taps not in ("all", "first_third"):
        raise UserError(f"scorer_args: taps is {taps!r}; it can be all or first_third")
    return blocks if taps == "all" else blocks[: max(1, round((2 * len(downs) + 1) / 3))]


def tap_channels(taps: Sequence[str], config: Mapping[str, Any]) -> list[int]:
    """Channels of each tap."""
    widths = config["block_out_channels"]
    return [widths[-1] if tap == MID_BLOCK else widths[int(tap.rpartition(".")[2])] for tap in taps]


def distinctive_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """What sets the first half of a U-Net apart from diffusers' default one, as plain JSON values; `build_first_half` takes them."""
    config = {}
    for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items():
        value = json.loads(json.dumps(unet.config.get(name)))  # a tuple has become a list here and there
        if name in NEEDED or (name in unet.config and name not in IRRELEVANT and value != json.loads(json.dumps(parameter.default))):
            config[name] = value
    return config


def build_first_half(config: Mapping[str, Any], last_block: str) -> UNet2DConditionModel:
    """A U-Net with random weights that ends at a down block or at the mid block.

    Its own forward runs as ever and finds nothing to do after that block. The other blocks have shapes for a moment, never memory.
    """
    device = torch.get_default_device()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config, up_block_types=("UpBlock2D",) * len(config["down_block_types"]))
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out = unet.conv_act = None
    unet.conv_out = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    if last_block != MID_BLOCK:
        unet.mid_block = None  # pyright: ignore[reportAttributeAccessIssue]
        unet.down_blocks = unet.down_blocks[: int(last_block.rpartition(".")[2]) + 1]  # pyright: ignore[reportAttributeAccessIssue]
    unet.to_empty(device=device)
    for module in unet.modules():
        if reset := getattr(module, "reset_parameters", None):
            reset()
    return unet


@contextlib.contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What these modules return while the block lasts, in the order of their calls; of a tuple, its first element."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
