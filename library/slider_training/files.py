"""The files of a training run: slider weights with their metadata, and training states."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.atomic_files import atomic_write_bytes, remove_unfinished
from library.errors import UserError
from library.models.base import ModelSpec
from library.reports.plots import calibration_plot
from library.rollouts.prompt_encoder import Size
from library.settings.shared import NetworkConfig, SavingConfig
from library.slider_training.outcome import Outcome
from library.training.finite_losses import LastGood
from library.training.run_files import RunFiles
from library.training.run_state import RunState
from library.training.runtime import weight_dtype
from networks.lora import LoRANetwork
from networks.lora_metadata import LoRARecord, lora_metadata, write_sidecar

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SliderState(RunState):
    """A slider's training after `step` updates.

    Attributes:
        watched: whether the monitor has looked at the network after this update; a run that was interrupted before does it when it goes on.
    """

    unet_evaluations: int
    watched: bool


class SliderFiles(RunFiles):
    """Writes what a run leaves behind, under sd-scripts' file names.

    Args:
        training: more `ss_` metadata: learning rate, optimizer, seed and the like.
        size: (height, width) of the training pictures.
    """

    endings = RunFiles.endings + r"|\.json|_calibration\.png"

    def __init__(self, saving: SavingConfig, network: NetworkConfig, spec: ModelSpec, size: Size, training: dict[str, Any]) -> None:
        super().__init__(saving)
        self.saving, self.network, self.spec, self.size, self.training = saving, network, spec, size, training
        self.started_at = time.time()
        self.slider_path = self.weights_path()
        self.calibration_path = saving.output_dir / f"{saving.output_name}_calibration.png"

    def save(
        self,
        network: LoRANetwork,
        step: int,
        *,
        final: bool = False,
        outcome: Outcome | None = None,
    ) -> Path:
        """Write the LoRA as it is now, and delete what save_last_n_steps says is too old. The final file gets a sidecar card.

        Args:
            step: updates made.
            outcome: what the run came to; the calibration in it is already folded into the network's alphas. It goes into the metadata, the
                card and a plot.

        Raises:
            UserError: the file cannot be written, or a weight is not finite in the precision of the file; then none is written.
        """
        saving = self.saving
        height, width = self.size
        path = self.weights_path(None if final else step)
        dtype = weight_dtype(saving.save_precision)
        if not all(weight.to(dtype).isfinite().all() for weight in network.state_dict().values()):
            raise UserError(
                f"step {step}: the slider's weights are not finite in {saving.save_precision}, so {path.name} was not written; lower "
                "learning_rate, or use save_precision bf16 or float"
            )
        calibration = None if outcome is None else outcome.calibration
        usage_hint = None if outcome is None else outcome.note
        rank, alpha, network_args = self._dimensions(network)
        record = LoRARecord(
            output_name=saving.output_name,
            network_dim=rank,
            network_alpha=alpha,
            network_args=network_args,
            network_module=self.network.network_module,
            started_at=self.started_at,
            finished_at=time.time(),
            steps=step,
            resolution=(width, height),
            modelspec={"usage_hint": usage_hint},
            training={
                **self.training,
                **(outcome.metadata() if outcome is not None else {}),
                "training_comment": saving.training_comment,
            },
        )
        network.save_weights(path, dtype, lora_metadata(self.spec, record, no_metadata=saving.no_metadata))
        if final:
            weight = 1.0 if calibration is None else calibration.preferred_weight
            write_sidecar(path, self.spec, preferred_weight=weight, description=usage_hint or "", notes=saving.training_comment or "")
            if calibration is not None and calibration.curve is not None:
                atomic_write_bytes(self.calibration_path, calibration_plot(calibration, saving.output_name))
        else:
            self.prune_weights(step)
        return path

    def remove_unfinished(self) -> None:
        """Previews, too."""
        super().remove_unfinished()
        remove_unfinished(self.saving.output_dir / "sample", rf"{self._names}_\d{{6}}\.png")

    def save_interrupted(self, network: LoRANetwork, state: SliderState, step: int) -> None:
        """Write the slider as trained and the state, and say how to go on."""
        folder = self.save_state(state, step)
        path = self.save(network, step)
        logger.info("stopped after step %d; saved: %s and %s; the same command with --resume auto goes on from there", step, path, folder)

    def save_last_good(self, network: LoRANetwork, last_good: LastGood) -> str:
        """Write the weights before losses were not finite any more -> what was written, in words."""
        if last_good.step == 0:
            return " and no slider was written"
        last_good.restore(network)
        return f" and the weights of step {last_good.step}, the last good ones, were saved as {self.save(network, last_good.step)}"

    def _dimensions(self, network: LoRANetwork) -> tuple[int, float, dict[str, str]]:
        """Rank, alpha and network_args as they are in the weights: calibration scales alphas, and dim_from_weights brings its own."""
        loras = network.unet_loras or network.loras
        small = [lora for lora in loras if lora.lora_down.weight.shape[2:].numel() == 1]
        large = [lora for lora in loras if lora.lora_down.weight.shape[2:].numel() > 1]
        convs = {"conv_dim": f"{large[0].rank}", "conv_alpha": f"{large[0].alpha.item():g}"} if large else {}
        return (small or large)[0].rank, (small or large)[0].alpha.item(), {**self.network.network_kwargs, **convs}
