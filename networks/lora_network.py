"""LoRA beside the Linear and Conv2d layers of a network and its text encoders, with the interface of sd-scripts' networks.lora.

    y = W x + multiplier * alpha / rank * up(down(x))        (Hu et al. 2021, arXiv 2106.09685)

The multiplier may be a tensor, one value per sample: +m, -m and 0, the frozen model, then share one batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from library.atomic_files import atomic_save_safetensors
from library.errors import UserError
from networks.lora_files import read_lora
from networks.lora_metadata import hash_metadata
from networks.lora_module import LoRAModule, Strength
from networks.lora_targets import TextEncoders, parts_of

_CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"  # of blocks in diffusers and layers in transformers


class LoRANetwork(nn.Module):
    """All branches of one LoRA file. Its state dict is the file, keys, shapes and all, but for a transformer's (`file_tensors`).

    It does nothing until `apply_to`; then every call of the U-Net has it in, at `multiplier`, but inside `disabled()`.
    """

    def __init__(self, loras: Sequence[LoRAModule], strength: Strength) -> None:
        super().__init__()
        self._strength = strength
        self._applied = False
        self._replaced_checkpoints: list[tuple[nn.Module, Any]] = []
        for lora in loras:
            assert lora.name not in self._modules, f"two modules named {lora.name}"
            self.add_module(lora.name, lora)

    @property
    def loras(self) -> list[LoRAModule]:
        return [module for module in self.children() if isinstance(module, LoRAModule)]

    @property
    def unet_loras(self) -> list[LoRAModule]:
        return [lora for lora in self.loras if lora.part == "unet"]

    @property
    def text_encoder_loras(self) -> list[LoRAModule]:
        return [lora for lora in self.loras if lora.part != "unet"]

    # --- Strength ---

    @property
    def multiplier(self) -> float | Tensor:
        return self._strength.multiplier

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """A float, or one value per sample [B]; calls on k*B rows (cond and uncond stacked) repeat it k times.

        The float 0 leaves the branches out: the output is the plain model's to the last bit, at no cost.
        """
        if isinstance(multiplier, torch.Tensor):
            assert multiplier.ndim <= 1, f"one multiplier per sample, not a tensor of shape {tuple(multiplier.shape)}"
            device = next((parameter.device for parameter in self.parameters()), multiplier.device)
            # A copy: written to later in place, the caller's tensor would change a forward that backward() has yet to repeat.
            multiplier = multiplier.detach().to(device=device, dtype=torch.float32, copy=True).reshape(-1)
        self._strength.multiplier = multiplier

    def disabled(self) -> AbstractContextManager[None]:
        """`with network.disabled():` the plain model. Nests; the one switch there is."""
        return self._strength.disabled()

    # --- Attaching ---

    def apply_to(self, text_encoder: TextEncoders, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach to these models; the branches of a part that is not applied are dropped, from the file too."""
        assert not self._applied, "already applied"
        for lora in self.loras:
            if not (apply_unet if lora.part == "unet" else apply_text_encoder):
                delattr(self, lora.name)
        for lora, base in self._pairs(text_encoder, unet):
            lora.attach(base)
        self._parts = parts_of(text_encoder, unet)
        self._applied = True

    def remove(self) -> None:
        """Undo apply_to."""
        assert self._applied, "not applied"
        for lora in self.loras:
            lora.detach()
        while self._replaced_checkpoints:
            block, function = self._replaced_checkpoints.pop()
            setattr(block, _CHECKPOINT_FUNCTION, function)
        self._applied = False

    def enable_gradient_checkpointing(self) -> None:
        """To be called after apply_to and after the model's own: what is recomputed in backward() gets the multiplier of its forward."""
        assert self._applied, "apply_to comes first"
        for part in self._parts.values():
            for block in part.modules():
                checkpoint = getattr(block, _CHECKPOINT_FUNCTION, None)
                if checkpoint is not None:
                    self._replaced_checkpoints.append((block, checkpoint))
                    setattr(block, _CHECKPOINT_FUNCTION, self._capturing(checkpoint))

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """torch.utils.checkpoint for a function that calls the models: recomputed with the multiplier of now."""
        return self._capturing(torch.utils.checkpoint.checkpoint)(function, *args, use_reentrant=False)

    def _capturing(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        return lambda function, *args, **kwargs: checkpoint(self._strength.capture(function), *args, **kwargs)

    def _pairs(self, text_encoder: TextEncoders, unet: nn.Module) -> Iterator[tuple[LoRAModule, nn.Module]]:
        parts = parts_of(text_encoder, unet)
        for lora in self.loras:
            yield lora, parts[lora.part].get_submodule(lora.path)

    # --- Training ---

    def prepare_optimizer_params(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups, one per model, learning rate of its own and factor of it, and their names for the log.

        None takes default_lr; 0 freezes the model's branches and leaves the group out. text_encoder_lr may be one per text encoder.
        """
        text_encoder_lrs = text_encoder_lr if isinstance(text_encoder_lr, Sequence) else [text_encoder_lr]
        rates = {"unet": unet_lr, "text_encoder": text_encoder_lrs[0], "text_encoder_2": text_encoder_lrs[-1]}
        groups, descriptions = [], []
        for part, rate in rates.items():
            rate = default_lr if rate is None else rate
            by_rate: dict[tuple[float, float], list[nn.Parameter]] = {}
            for lora in self.loras:
                if lora.part == part:
                    own = rate if lora.own_lr is None or rate == 0 else lora.own_lr
                    for parameter, factor in zip(lora.parameters(), lora.lr_factors, strict=True):
                        parameter.requires_grad_(own * factor != 0)
                        by_rate.setdefault((own, factor), []).append(parameter)
            for (own, factor), parameters in by_rate.items():
                if own * factor == 0:
                    continue
                groups.append({"params": parameters, "lr": own * factor})
                name = part.replace("text_encoder", "textencoder").replace("_", " ")
                name = name if own == rate else f"{name} at {own:g}"
                descriptions.append(name if factor == 1 else f"{name} x{factor:g}")
        if not groups:
            raise UserError("nothing is left to train: every learning rate is 0 or its model has no LoRA modules; set unet_lr above 0")
        return groups, descriptions

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: nn.Module) -> None:
        """Freeze the models; the branches train but for those that prepare_optimizer_params froze."""
        for part in parts_of(text_encoder, unet).values():
            part.requires_grad_(False)

    def on_epoch_start(self, text_encoder: TextEncoders, unet: nn.Module) -> None:
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: torch.device | str | None = None) -> tuple[int, float, float]:
        """Shrink every branch whose delta has a Frobenius norm above max_norm to it -> (how many, mean norm, largest norm).

        sd-scripts' --scale_weight_norms; down and up share the factor. `device`: where the norms are computed.
        """
        norms = torch.stack([lora.delta().to(device).norm() for lora in self.loras])
        factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
        for lora, factor in zip(self.loras, factors.sqrt(), strict=True):
            lora.lora_down.weight.mul_(factor.to(lora.alpha.device))
            lora.lora_up.weight.mul_(factor.to(lora.alpha.device))
        norms = norms * factors
        return int((factors < 1).sum()), norms.mean().item(), norms.max().item()

    @torch.no_grad()
    def scale_alpha(self, factor: float) -> None:
        """Fold a multiplier into the network: from now on multiplier 1 does what `factor` did."""
        for lora in self.loras:
            lora.set_alpha(lora.alpha.item() * factor)

    # --- Files ---

    def save_weights(self, file: str | Path, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """Write a .safetensors file in `dtype` (None: float32), whole or not at all, with metadata and the hashes of its tensors."""
        if Path(file).suffix != ".safetensors":
            raise UserError(f"{file}: LoRA files are written as .safetensors; give a name that ends so")
        tensors = {key: value.detach().to("cpu", dtype or torch.float32).contiguous() for key, value in self.file_tensors().items()}
        metadata = dict(metadata or {})
        atomic_save_safetensors(tensors, file, metadata | hash_metadata(tensors, metadata))

    def file_tensors(self) -> dict[str, Tensor]:
        """The state dict as the file has it. With dotted names alpha is multiplied into lora_B: diffusers refuses alphas in such files."""
        tensors = self.state_dict()
        for lora in self.loras:
            if lora.dotted is not None:
                down, up, alpha = (tensors.pop(f"{lora.name}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
                tensors |= {f"{lora.dotted}.lora_A.weight": down, f"{lora.dotted}.lora_B.weight": up * (alpha / lora.rank)}
        return tensors

    def load_weights(self, file: str | Path) -> Any:
        """Copy a file's weights into these modules, in float32 -> load_state_dict's missing and unexpected keys.

        Every style of naming that `networks.lora_files` reads. What of the file has no place here, and what begins at zero, is named in
        one warning. Raises UserError if no module of the file is here, or a rank or shape differs.
        """
        placed = read_lora(file).place(self.loras)
        ranks = {(len(branch.down), self.get_submodule(name).rank) for name, branch in placed.branches.items()}
        if other := sorted((theirs, ours) for theirs, ours in ranks if theirs != ours):
            raise UserError(f"{file} has rank {other[0][0]} where this network has {other[0][1]}; set dim_from_weights, or that rank")
        placed.warn_of_the_rest(missing_begin_at_zero=True)
        return self.load_state_dict(placed.state, strict=False)

    def is_mergeable(self) -> bool:
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add multiplier * delta to the models' own weights, for good. Not for a network that is applied.

        Args:
            weights_sd: loaded first; None merges what the network holds.
            dtype: the sum is rounded to it before it is stored in the model's own; the sum itself is made in float32.
            device: where the sum is made; None is the model's.
        """
        assert not self._applied, "merged and applied, the LoRA would count twice: remove() it first"
        assert not isinstance(self.multiplier, Tensor), "a weight has one multiplier, not one per sample"
        if weights_sd is not None:
            self.load_state_dict(weights_sd)
        for lora, base in self._pairs(text_encoder, unet):
            weight = base.weight
            assert isinstance(weight, Tensor)
            where = weight.device if device is None else torch.device(device)
            merged = weight.to(where, torch.float32) + self.multiplier * lora.delta().to(where)
            weight.copy_(merged.to(dtype or weight.dtype))
