"""The files of a training run: slider weights with their metadata, and training states."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open

from library.atomic_files import atomic_write_bytes, expendable, remove_unfinished
from library.errors import UserError
from library.models.base import ModelSpec
from library.models.config import ModelConfig
from library.reports.plots import calibration_plot, jpeg_url, png_bytes
from library.rollouts.prompt_encoder import Size
from library.settings.shared import NetworkConfig, SavingConfig
from library.slider_training.outcome import Outcome
from library.slider_training.previews import card_picture
from library.training.finite_losses import LastGood
from library.training.output_files import check_outputs
from library.training.run_files import RunFiles
from library.training.run_state import RunState
from library.training.runtime import weight_dtype
from networks.lora import LoRANetwork
from networks.lora_metadata import Card, LoRARecord, lora_metadata, model_file_hashes, write_cards

logger = logging.getLogger(__name__)

THUMBNAIL = 256  # pixels of the longer side, as ModelSpec recommends


@dataclass(frozen=True, kw_only=True)
class SliderState(RunState):
    """A slider's training after `step` updates.

    Attributes:
        watched: whether the monitor has looked at the network after this update; a run that was interrupted before does it when it goes on.
    """

    unet_evaluations: int
    watched: bool
    trained = "a slider"


class SliderFiles(RunFiles):
    """Writes what a run leaves behind, under sd-scripts' file names.

    Args:
        training: more `ss_` metadata: learning rate, optimizer, seed and the like.
        size: (height, width) of the training pictures.
        model: where the model came from.
        timesteps: (lowest, highest) that were trained on; None for all.
        modelspec: more `modelspec.` metadata: author, license and the like.
    """

    endings = RunFiles.endings + r"|(\.metadata)?\.json|\.preview\.png|_calibration\.png"

    def __init__(
        self,
        saving: SavingConfig,
        network: NetworkConfig,
        spec: ModelSpec,
        size: Size,
        training: dict[str, Any],
        model: ModelConfig | None = None,
        timesteps: tuple[int, int] | None = None,
        modelspec: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(saving)
        self.saving, self.network, self.spec, self.size, self.training = saving, network, spec, size, training
        self.model, self.timesteps, self.modelspec = model, timesteps, modelspec
        self.started_at = time.time()
        self.slider_path = self.weights_path()
        self.calibration_path = saving.output_dir / f"{saving.output_name}_calibration.png"
        self.preview_path = self.slider_path.with_suffix(".preview.png")

    def save(
        self,
        network: LoRANetwork,
        step: int,
        *,
        final: bool = False,
        outcome: Outcome | None = None,
    ) -> Path:
        """Write the LoRA as it is now, and delete what save_last_n_steps says is too old. The final file gets its cards.

        Args:
            step: updates made.
            outcome: what the run came to; the calibration in it is already folded into the network's alphas. It goes into the metadata, the
                cards, a picture and a plot.

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
        card = Card(notes=saving.training_comment or "") if outcome is None else outcome.card(saving.training_comment)
        picture = None if outcome is None else card_picture(outcome)
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
            modelspec=self._modelspec(outcome, card, None if picture is None else jpeg_url(picture, THUMBNAIL, 85)),
            training={
                **self.training,
                **(self._model_files() if final else {}),
                **(outcome.metadata() if outcome is not None else {}),
                "training_comment": saving.training_comment,
            },
        )
        self.keep_earlier()
        network.save_weights(path, dtype, lora_metadata(self.spec, record, no_metadata=saving.no_metadata))
        if final:
            with expendable("what stands beside the slider"):
                write_cards(path, self.spec, card)
                calibration = None if outcome is None else outcome.calibration
                plot = (
                    calibration_plot(calibration, saving.output_name) if calibration is not None and calibration.curve is not None else None
                )
                for beside, content in (
                    (self.preview_path, None if picture is None else png_bytes(picture)),
                    (self.calibration_path, plot),
                ):
                    if content is None:
                        beside.unlink(missing_ok=True)  # of an earlier run of this name
                    else:
                        atomic_write_bytes(beside, content)
        else:
            self.prune_weights(step)
        if not final or outcome is not None:  # the last one as it was trained is soon replaced
            self.uploads.send(path, wait=final)
        return path

    def is_finished(self) -> bool:
        """Whether the slider of the run's end is there, with what the run came to."""
        try:
            with safe_open(self.slider_path, framework="pt") as file:
                return self.saving.no_metadata or "ss_leco_conclusion" in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def check_outputs(self, space: int = 0) -> None:
        """Previews and card, too."""
        super().check_outputs(space)
        check_outputs(self.slider_path.with_suffix(".json"), self.calibration_path, folders=[self.saving.output_dir / "sample"])

    def remove_unfinished(self) -> None:
        """Previews, too."""
        super().remove_unfinished()
        remove_unfinished(self.saving.output_dir / "sample", rf"{self._names}_\d{{6}}\.png")

    def save_interrupted(self, network: LoRANetwork, state: SliderState, step: int) -> None:
        """Write the slider as trained and the state, and say how to go on."""
        self.uploads.stop()
        path = self.save(network, step)  # first, since it is the smaller one of the two
        folder = self.save_state(state, step)
        logger.info("stopped after step %d; saved: %s and %s; the same command with --resume auto goes on from there", step, path, folder)

    def save_last_good(self, network: LoRANetwork, last_good: LastGood) -> str:
        """Write the weights before losses were not finite any more -> what was written, in words."""
        if last_good.step == 0:
            return " and no slider was written"
        last_good.restore(network)
        return f" and the weights of step {last_good.step}, the last good ones, were saved as {self.save(network, last_good.step)}"

    def _modelspec(self, outcome: Outcome | None, card: Card, picture: str | None) -> dict[str, str | None]:
        clip_skip = None if self.model is None else self.model.clip_skip
        return {
            "usage_hint": card.hint or None,
            "description": None if outcome is None else outcome.note,
            "thumbnail": picture,
            "encoder_layer": None if clip_skip is None else str(clip_skip),
            "timestep_range": None if self.timesteps is None else "{},{}".format(*self.timesteps),
            **self.modelspec,
        }

    def _model_files(self) -> dict[str, Any]:
        """Names and hashes of the files that were trained on, as A1111 knows them."""
        if self.model is None:
            return {}
        vae = self.model.vae
        return {
            **model_file_hashes(Path(self.model.pretrained_model_name_or_path)),
            "vae_name": None if vae is None else vae.name,
        }

    def check_space(self, network: LoRANetwork, num_steps: int) -> None:
        """Raises UserError if there is less space than the run will take for sure: its sliders, and of states the weights alone."""
        saving = self.saving
        kept = self.num_on_the_way(num_steps)
        weights = sum(weight.numel() for weight in network.state_dict().values())
        states = kept + 1 if saving.save_state else int(saving.save_state_on_train_end)
        space = (kept + 1) * weights * weight_dtype(saving.save_precision).itemsize + 4 * states * weights
        self.check_outputs(space=space)

    def _dimensions(self, network: LoRANetwork) -> tuple[int, float, dict[str, str]]:
        """Rank, alpha and network_args as they are in the weights: calibration scales alphas, and dim_from_weights brings its own."""
        loras = network.unet_loras or network.loras
        small = [lora for lora in loras if lora.lora_down.weight.shape[2:].numel() == 1]
        large = [lora for lora in loras if lora.lora_down.weight.shape[2:].numel() > 1]
        convs = {"conv_dim": f"{large[0].rank}", "conv_alpha": f"{large[0].alpha.item():g}"} if large else {}
        return (small or large)[0].rank, (small or large)[0].alpha.item(), {**self.network.network_kwargs, **convs}
