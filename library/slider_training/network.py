"""From settings to a network that is attached to a model and ready to train."""

import importlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from library.errors import UserError
from library.models.base import DiffusionModel
from library.settings.shared import NetworkConfig
from library.training.optimizers import evaluating
from networks.lora import LoRANetwork, create_network_from_weights

logger = logging.getLogger(__name__)


def build_network(config: NetworkConfig, model: DiffusionModel, generator: torch.Generator, *, gradient_checkpointing: bool) -> LoRANetwork:
    """Make the network that the settings ask for, attach it to the model and freeze everything else.

    Args:
        generator: for the initial weights.
        gradient_checkpointing: turn it on in the U-Net, in a way that keeps per-sample multipliers right.

    Raises:
        UserError: no such module or argument, or weights that do not fit the model.
    """
    module = _network_module(config.network_module)
    text_encoders = model.text_encoders if config.trains_text_encoders else []
    if config.network_weights is not None:
        _check_file("network_weights", config.network_weights, "give the LoRA file to start from")
    makers = module.create_network, module.create_network_from_weights
    taken = {"generator"}.union(*(inspect.signature(maker).parameters for maker in makers))
    for name in config.network_kwargs:  # a name of their own arguments would be a TypeError
        if name in taken:
            raise UserError(f"network_args: {name} is not an option of {config.network_module}; dropout is network_dropout")
    settings: dict[str, Any] = {"neuron_dropout": config.network_dropout, **config.network_kwargs}
    if config.dim_from_weights:
        network, _ = module.create_network_from_weights(1.0, config.network_weights, model.vae, text_encoders, model.unet, **settings)
    else:
        rank, alpha = config.network_dim, config.network_alpha
        network = module.create_network(1.0, rank, alpha, model.vae, text_encoders, model.unet, generator=generator, **settings)
    if config.network_train_text_encoder_only and config.dim_from_weights and network.unet_loras:
        logger.warning(
            "%s: its %d modules of the U-Net are left out, which is not trained", config.network_weights, len(network.unet_loras)
        )
    network.apply_to(text_encoders, model.unet, apply_unet=not config.network_train_text_encoder_only)
    if config.network_weights is not None and not config.dim_from_weights:
        network.load_weights(config.network_weights)
    if config.trains_text_encoders and not model.trains_text:
        raise UserError(f"{model.spec.name} has a language model, which no LoRA is put on; leave network_train_unet_only on")
    model.freeze()
    network.prepare_grad_etc(text_encoders, model.unet)
    network.to(model.unet.device)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
    network.train()
    size = sum(parameter.numel() for parameter in network.parameters())
    logger.info("LoRA: %d modules, %.2f M parameters", len(network.loras), size / 1e6)
    return network


@contextmanager
def in_use(network: LoRANetwork, optimizer: object) -> Iterator[None]:
    """The network as its user will have it: no dropout, and a schedule-free optimizer's averaged weights."""
    network.eval()
    try:
        with evaluating(optimizer):
            yield
    finally:
        network.train()


def merge_base_weights(config: NetworkConfig, model: DiffusionModel) -> None:
    """Merge the LoRA files of `base_weights` into the model, for good. Raises UserError for one that is not there."""
    for file, multiplier in config.base_loras:
        _check_file("base_weights", file, "give LoRA files that are merged into the model")
        network, _ = create_network_from_weights(multiplier, file, model.vae, model.text_encoders, model.unet, for_inference=True)
        network.merge_to(model.text_encoders, model.unet)
        logger.info("merged %s at %g into the model: %d modules", file.name, multiplier, len(network.loras))


def _check_file(option: str, path: Path, wanted: str) -> None:
    if not path.is_file():
        raise UserError(f"{option} {path} {'is a folder' if path.is_dir() else 'does not exist'}; {wanted}")


def _network_module(name: str) -> ModuleType:
    if name.startswith("lycoris"):
        raise UserError(
            f"network_module {name} has one multiplier for a whole batch, and a slider is trained with one for each sample; use "
            "networks.lora, with conv_dim in network_args for LoCon"
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"network_module {name} cannot be imported ({error}); use networks.lora") from error
    network_class = getattr(module, "LoRANetwork", None)
    if network_class is None or not issubclass(network_class, LoRANetwork):
        raise UserError(f"network_module {name} has no per-sample multipliers, which a slider is trained with; use networks.lora")
    return module
