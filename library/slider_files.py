"""The files of a training run: slider weights with their metadata, and training states."""

import time
from pathlib import Path
from typing import Any

from library.checkpoints import prune_steps, save_state, state_path, weights_path
from library.config import NetworkConfig, SavingConfig
from library.lora_metadata import lora_metadata, write_sidecar
from library.models.base import ModelSpec
from library.runtime import weight_dtype
from library.sampling import Size
from networks.lora import LoRANetwork


class SliderFiles:
    """Writes what a run leaves behind, under sd-scripts' file names.

    Args:
        training: more `ss_` metadata: learning rate, optimizer, seed and the like.
        size: (height, width) of the training pictures.
    """

    def __init__(self, saving: SavingConfig, network: NetworkConfig, spec: ModelSpec, size: Size, training: dict[str, Any]) -> None:
        self.saving, self.network, self.spec, self.size, self.training = saving, network, spec, size, training
        self.started_at = time.time()

    def save(self, network: LoRANetwork, step: int, *, final: bool = False, usage_hint: str | None = None) -> Path:
        """Write the LoRA as it is now, and delete what save_last_n_steps says is too old. The final file gets a sidecar card.

        Args:
            step: updates made.
            usage_hint: one sentence for the metadata and the card: what weight 1 does.
        """
        saving = self.saving
        height, width = self.size
        metadata = lora_metadata(
            self.spec,
            output_name=saving.output_name,
            network_dim=self.network.network_dim,
            network_alpha=float(network.unet_loras[0].alpha) if network.unet_loras else self.network.network_alpha,
            network_args=self.network.network_kwargs,
            network_module=self.network.network_module,
            started_at=self.started_at,
            finished_at=time.time(),
            steps=step,
            resolution=(width, height),
            modelspec={"usage_hint": usage_hint},
            training={**self.training, "training_comment": saving.training_comment},
            no_metadata=saving.no_metadata,
        )
        path = weights_path(saving.output_dir, saving.output_name, None if final else step)
        network.save_weights(path, weight_dtype(saving.save_precision), metadata)
        if final:
            write_sidecar(path, self.spec, preferred_weight=1.0, description=usage_hint or "", notes=saving.training_comment or "")
        elif saving.save_last_n_steps is not None:
            prune_steps(saving.output_dir, saving.output_name, step=step, last_n_steps=saving.save_last_n_steps)
        return path

    def save_state(self, state: dict[str, Any], step: int, *, final: bool = False) -> Path:
        """Write a training state, and delete the states that are too old."""
        saving = self.saving
        path = state_path(saving.output_dir, saving.output_name, None if final else step)
        save_state(path, state)
        if not final and saving.save_last_n_steps is not None:
            prune_steps(saving.output_dir, saving.output_name, step=step, last_n_steps=saving.save_last_n_steps, states=True)
        return path
