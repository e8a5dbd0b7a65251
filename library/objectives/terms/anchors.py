"""Anchors: prompts whose pictures the slider must leave alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from library.errors import UserError
from library.objectives.base import TERMS, Term, TrainingContext
from library.objectives.predictions import predict_plain
from library.objectives.regression import as_output, min_snr_weights, squared_errors
from library.prompts.files import load_prompts
from library.rollouts.belt import Belt
from library.settings.options import option
from library.types import LossOutput, PromptSpec

BATCH_SIZE = 2  # trajectories of anchor prompts; each costs about as much as one of train_batch_size


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """What must not move."""

    anchor_prompts_file: str = option("", help="Prompts whose pictures must not change, in any format of prompts_file. Turns anchors on.")


@TERMS.register("anchors")
class AnchorsTerm(Term):
    """Squared distance of the U-Net's output with the LoRA, at +1 and -1 in turn, from that of the frozen model.

    On a belt of its own, so that it is measured where the slider leads pictures of the anchor prompts: a trajectory takes 3
    evaluations to train on, 1 for the frozen model and 1 for the unconditional branch that moves it on, where guided. The latents of
    another term's belt would save that last one, but they are pictures of other prompts, on which an anchor says little.
    """

    config_class: ClassVar[type | None] = AnchorConfig

    @classmethod
    def build(cls, context: TrainingContext, settings: AnchorConfig) -> "AnchorsTerm":
        if not settings.anchor_prompts_file:
            raise UserError("anchors have no prompts: set anchor_prompts_file to a file of prompts that must not change")
        return cls(context, load_prompts(settings.anchor_prompts_file))

    def __init__(self, context: TrainingContext, prompts: Sequence[PromptSpec]) -> None:
        self.context = context
        context.encoder.encode_ahead(prompts, context.sampling.size)
        self.belt = Belt(context.trajectories(prompts, context.generator("anchors"), BATCH_SIZE))

    def __call__(self) -> LossOutput:
        model, network = self.context.model, self.context.network
        batch = self.belt.next_batch()
        plain = predict_plain(model, network, batch, self.context.encoder.frozen_cond(batch.prompts, batch.cond))
        assert plain.frozen is not None
        network.set_multiplier(batch.multipliers)
        eps = model.predict_eps(batch.latents, batch.timesteps, batch.cond)
        output, frozen = (as_output(model, batch.latents, part, batch.timesteps) for part in (eps, plain.frozen))
        errors = squared_errors(output, frozen)
        losses = errors * min_snr_weights(model, batch.timesteps, self.context.min_snr_gamma)

        self.belt.advance(self.belt.trajectories.guided(batch, eps.detach(), plain.uncond))
        return LossOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            samples=[
                f"anchor {prompt.prompt!r} at timestep {int(timestep)}" for prompt, timestep in zip(batch.prompts, batch.times, strict=True)
            ],
            metrics={"drift": errors.detach().mean().sqrt()},
        )

    def renew_broken(self) -> None:
        self.belt.renew_broken()

    def state_dict(self) -> dict[str, Any]:
        return self.belt.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.belt.load_state_dict(state)
