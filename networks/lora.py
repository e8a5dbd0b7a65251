"""The functions by which sd-scripts makes a network: a fresh one, and the one that is in a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from networks.lora_files import parse_lora, read_lora
from networks.lora_module import LoRAModule, Strength
from networks.lora_network import LoRANetwork
from networks.lora_options import NetworkOptions
from networks.lora_targets import TextEncoders, find_targets


def create_network(
    multiplier: float | Tensor,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A fresh network that changes nothing yet.

    Every Linear and 1x1 Conv2d inside a Transformer2DModel and every Linear inside CLIPAttention and CLIPMLP; with conv_dim also
    every Linear and Conv2d inside ResnetBlock2D, Downsample2D and Upsample2D. Of a transformer, attention and MLP of its main layers.

    Args:
        network_dim, network_alpha: rank and alpha; None is 4 and 1.
        vae: not used; sd-scripts passes it.
        text_encoder: one, a list (SDXL), or None.
        **kwargs: --network_args by the names of `networks.lora_options`; and `generator`, a torch.Generator on the CPU for the initial
            values.
    """
    generator = kwargs.pop("generator", None)
    options = NetworkOptions.of(kwargs, neuron_dropout, dim=network_dim, alpha=network_alpha, unet=unet)
    strength = Strength(1.0)
    loras = []
    for target in find_targets(text_encoder, unet, with_convs=options.has_convs):
        rank, alpha = options.rank_and_alpha(target)
        if rank:
            rates: dict[str, Any] = {"lr_factors": options.lr_factors(target), "own_lr": options.own_lr(target)}
            loras.append(LoRAModule(target, strength, rank=rank, alpha=alpha, dropouts=options.dropouts, generator=generator, **rates))
    if not loras:
        raise UserError("network_args leave no module to train: every rank or learning rate is 0, or everything is excluded")
    network = LoRANetwork(loras, strength)
    network.set_multiplier(multiplier)
    return network


def create_network_from_weights(
    multiplier: float | Tensor,
    file: str | Path | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """The network that is in a file (or in weights_sd), its modules, ranks and alphas -> it and its weights under our names.

    Modules that these models do not have, and those of a text encoder when text_encoder is None, are named in one warning.
    for_inference: no gradients, no dropout; and files of LoHa, LoKr, DoRA and the like are taken as well, each module's change of its
    weight as a branch of full rank. Of --network_args those that do not speak of ranks. Raises UserError for keys that are no LoRA.
    """
    kwargs.pop("generator", None)  # every value comes from the file
    options = NetworkOptions.of(kwargs, neuron_dropout, unet=unet, from_file=True)
    assert weights_sd is not None or file is not None, "file or weights_sd"
    lora_file = parse_lora(weights_sd, fixed=for_inference) if weights_sd is not None else read_lora(str(file), fixed=for_inference)
    targets = {target.name: target for target in find_targets(text_encoder, unet, with_convs=True)}
    placed = lora_file.place(targets.values())
    placed.warn_of_the_rest(missing_begin_at_zero=False)
    strength = Strength(1.0)
    loras = []
    for name, branch in placed.branches.items():
        target, rank, alpha = targets[name], len(branch.down), branch.alpha
        rates: dict[str, Any] = {"lr_factors": options.lr_factors(target), "own_lr": options.own_lr(target)}
        loras.append(LoRAModule(target, strength, rank=rank, alpha=alpha, dropouts=options.dropouts, **rates))
    network = LoRANetwork(loras, strength)
    network.set_multiplier(multiplier)
    network.load_state_dict(placed.state)
    if for_inference:
        network.requires_grad_(False).eval()
    return network, placed.state
