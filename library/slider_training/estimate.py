"""What a run will need of the graphics card's memory, counted before it: the run's own code on tensors without values.

The networks stand on torch's device "meta", where operations have shapes and no values, and no weight is read. What they are given and
what they put out is real, small and on the CPU, so that the run's own code goes through. Every tensor counts, from when it is made until
nobody holds it. Not counted: the workspace of convolutions, what the allocator rounds up, and the driver's own (`BESIDES`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from library.measuring.image_statistics import features_at_once, vae_features
from library.models.base import DiffusionModel
from library.models.packed import pack_unet
from library.models.vae import VaeFingerprint
from library.rollouts.sample import DECODED_PIXELS, decode, model_autocast, sample
from library.scorers.io import load_scorer
from library.settings.shared import OptimizerConfig
from library.slider_training.counted_memory import Allocations, as_on_cuda, module_bytes, without_values
from library.slider_training.setup import LecoScoreConfig, SliderParts, prepare
from library.training.optimizers import create_optimizer
from library.training.runtime import weight_dtype

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


def _counted(model: DiffusionModel, allocations: Allocations, fingerprint: VaeFingerprint) -> DiffusionModel:
    """A model on the device "meta" that is used like one on the CPU, and whose parts come and go in the count as on a graphics card."""
    resting: set[int] = set()

    class Counted(type(model)):  # type: ignore[misc]
        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> Any:
            with allocations.within(PROMPTS):
                return without_values(super()._hidden_states)(text_encoder, token_ids, *others)

        @contextmanager
        def _fetched(self, module: Any) -> Iterator[None]:
            size = module_bytes(module) if id(module) in resting else 0
            allocations.add(size)
            try:
                yield
            finally:
                allocations.add(-size)

        def _rest(self, module: Any) -> None:
            if id(module) not in resting:
                resting.add(id(module))
                allocations.add(-module_bytes(module))

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
    unet.forward, vae.decode, encode = without_values(unet.forward), without_values(vae.decode), vae.encode
    vae.encode = lambda pixels, **_: [SimpleNamespace(mode=lambda: without_values(lambda own: encode(own)[0].mode())(pixels))]
    allocations.add(sum(map(module_bytes, (model.unet, model.vae, *model.text_encoders))))
    return model


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
    allocations = Allocations(LOAD)
    with tempfile.TemporaryDirectory() as folder, as_on_cuda(), allocations:
        config = replace(config, saving=replace(config.saving, output_dir=Path(folder)))
        fingerprints = [load_scorer(path, config.reward.allow_code).spec.vae for path in config.reward.scorer]
        model = _counted(model, allocations, fingerprints[0] if fingerprints else VaeFingerprint(1.0, ()))
        weights = {
            "U-Net": module_bytes(model.unet),
            "text encoders": sum(map(module_bytes, model.text_encoders)),
            "VAE": module_bytes(model.vae),
        }
        process: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision, process_index=0, num_processes=1)
        with allocations.within(START):
            made = prepare(config, process, model)
        for scorer in made.context.reward.scorers:
            scorer.to("meta").forward = without_values(scorer.forward)
        trained = sum(parameter.nbytes for parameter in made.network.parameters())
        states = round(optimizer_bytes(config.optimizer) * trained / 4)
        weights |= {
            "scorers": sum(map(module_bytes, made.context.reward.scorers)),
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
        held = min(features_at_once(*size), len(pictures.measurer.seeds[0]))
        own = [vae_features(model.vae, shown[:1].expand(held, -1, -1, -1)) for _ in range(2)]
        del own
