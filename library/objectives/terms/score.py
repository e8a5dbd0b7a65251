"""The score as a term of training: a rollout, and the objective on what it hands out."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from library.errors import UserError
from library.objectives.base import TERMS, Term, TrainingContext
from library.objectives.estimator import ESTIMATORS
from library.objectives.score import ScoreConfig, ScoreObjective
from library.objectives.terms.images import encode_folder
from library.prompts.contents import GIVE_PROMPTS
from library.rollouts.base import ROLLOUTS, Rollout
from library.rollouts.noised import NoisedRollout, given_pictures
from library.types import Finished, LossOutput, PromptSpec, RolloutBatch


@TERMS.register("score")
class ScoreTerm(Term):
    """Latents of the context's prompts, or of pictures from a folder.

    Attributes:
        watch: is shown every batch, what came of it, and the trajectories that it finished.
    """

    config_class: ClassVar[type | None] = ScoreConfig

    @classmethod
    def build(cls, context: TrainingContext, settings: ScoreConfig) -> "ScoreTerm":
        if not context.reward.goals:
            raise UserError("scorer is not set; give the .safetensors file that train_latent_scorer.py wrote")
        return cls(context, settings)

    def __init__(self, context: TrainingContext, config: ScoreConfig) -> None:
        self.generator = context.generator("views")
        self.watch: Callable[[RolloutBatch, LossOutput, Finished | None], None] | None = None
        self.rollout = score_rollout(context, config)
        times = {time for pool in self.rollout.trajectories.pools for time in pool.times[:-1]}
        if not any(config.min_timestep <= time < config.max_timestep for time in times):
            own = ", ".join(f"{time:g}" for time in sorted(times, reverse=True)[:20])
            raise UserError(
                f"no step of the sampler is from min_timestep {config.min_timestep} to below max_timestep {config.max_timestep}, so "
                f"nothing would be trained: its steps are at {own}; widen the two, or raise max_denoising_steps"
            )
        self.objective = ScoreObjective(context, config)

    def __call__(self) -> LossOutput:
        batch = self.rollout.next_batch()
        while not len(self.objective.trained(batch).latents):  # all are outside of the timesteps that are trained
            self.rollout.pass_over(batch)
            batch = self.rollout.next_batch()
        out, eps = self.objective(batch, self.generator)
        finished = self.rollout.advance(eps)
        if self.watch is not None:
            self.watch(self.objective.trained(batch), out, finished)
        return out

    def renew_broken(self) -> None:
        self.rollout.renew_broken()

    def state_dict(self) -> dict[str, Any]:
        return {"rollout": self.rollout.state_dict(), "views": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollout.load_state_dict(state["rollout"])
        self.generator.set_state(state["views"])


def rollout_name(context: TrainingContext, config: ScoreConfig) -> str:
    """The rollout that the user set, else the one that the estimator needs, else the belt. Raises UserError if the two differ."""
    given, needed = context.rollout.rollout, ESTIMATORS[config.score_estimator].rollout
    if given is not None and needed is not None and given != needed:
        raise UserError(f"score_estimator {config.score_estimator} needs rollout {needed}, not {given}; leave rollout out")
    return given or needed or "belt"


def score_rollout(context: TrainingContext, config: ScoreConfig) -> Rollout:
    """Where the latents come from that are scored. Raises UserError if there are neither prompts nor pictures."""
    name, generator = rollout_name(context, config), context.generator("rollout")
    settings = context.settings.get(name)
    images = context.settings.get("images")
    if config.score_estimator == "direct_align" and images is not None and images.images_dir is not None:
        pictures = encode_folder(context, images.images_dir, images.images_prompt)
        own = [(picture.latents, PromptSpec(prompt=picture.prompt)) for picture in pictures]
        context.encoder.encode_ahead([prompt for _, prompt in own], context.sampling.size)
        prompts, chosen = given_pictures(own, context.model.spec.vae_scale_factor)
        return NoisedRollout(context.trajectories(prompts, generator), settings, chosen)
    if not context.prompts:
        raise UserError(f"prompts_file is not set; {GIVE_PROMPTS}")
    context.encoder.encode_ahead(context.prompts, context.sampling.size)
    return ROLLOUTS[name](context.trajectories(context.prompts, generator), settings)
