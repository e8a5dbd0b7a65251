"""Is there a signal to train on? One gradient step on one prompt, and what it says of the run; the network is left as it was."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.objectives.base import Term, TrainingContext
from library.objectives.rewards import rms, score_gradients
from library.objectives.score import ScoreConfig
from library.objectives.terms.score import ScoreTerm
from library.rollouts.sample import model_autocast
from library.scorers.worth import Worth
from library.settings.options import option
from library.settings.shared import OptimizerConfig
from library.training.optimizers import create_optimizer
from library.types import PromptSpec, RolloutBatch

PROBES = 8  # places on the schedule
ROUNDING = 1e-6  # standard deviations: the rounding of a step's gain
FLAT_GRADIENT = 1e-7  # standard deviations of the score per unit of a latent
LOSS_SCALE = 2.0**12  # small gradients underflow in fp16
EXPLODING_DRIFT = 1.0  # RMS of eps after one step: the prediction has changed by its own size


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What can be asked before the training."""

    check_reward: bool = option(
        False, help="Make one gradient step on one prompt, say what it tells of the run, and end; nothing is trained or written."
    )
    estimate: bool = option(
        False, help="Say how much of a graphics card's memory the run will need, part by part, and end; no weights are read."
    )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one place of the schedule says: sigma, RMS of the score's gradient in the scored latents, and how far eps moves them."""

    sigma: float
    gradient: float
    sensitivity: float


@dataclass(frozen=True, kw_only=True)
class RewardCheck:
    """The report.

    Attributes:
        probes: by falling sigma.
        norms: of each term's gradient in the network, weighted, by the term's name.
        gain_up, gain_down: of one optimizer step, on the same latents, in the wanted direction, in standard deviations of the score, at
            multiplier 1 and -1; a step of the sampler, not a whole picture.
        drift: RMS that eps moved in that step.
        worth: of the scorers, where their files say it.
        faults: what is wrong, in words.
    """

    prompt: str
    probes: Sequence[Probe]
    norms: dict[str, float]
    gain_up: float
    gain_down: float
    drift: float
    worth: Sequence[Worth]
    faults: Sequence[str]

    @property
    def passed(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        lines = [f"check_reward on {self.prompt!r}", "", "   sigma   gradient RMS   d latents / d eps"]
        lines += [f"{one.sigma:8.3g}   {one.gradient:12.3g}   {one.sensitivity:17.3g}" for one in self.probes]
        total = sum(self.norms.values()) or 1.0
        shares = ", ".join(f"{name} {norm:.3g} ({norm / total:.0%})" for name, norm in self.norms.items())
        lines += [
            "",
            f"gradient norm of each term: {shares}",
            f"one optimizer step, on the same latents: the score gains {self.gain_up:+.4f} standard deviations at +1 and "
            f"{self.gain_down:+.4f} at -1 in the wanted direction; the prediction moves by {self.drift:.3g} (RMS)",
        ]
        lines += map(str, self.worth)
        result = [f"fault: {fault}" for fault in self.faults] or ["the reward can be trained"]
        return "\n".join([*lines, "", *result])


def check_reward(
    context: TrainingContext,
    terms: Mapping[str, Term],
    score: ScoreConfig,
    optimizer: OptimizerConfig,
    prompt: PromptSpec,
) -> RewardCheck:
    """Measure the score's gradient along one prompt's trajectory, make one step with the run's own optimizer, and undo it.

    How strong the slider will be is not predicted: what one step gains was 2 to 10 times too much (docs/experiments.md). The run says it of
    itself as it trains.

    Args:
        prompt: whose encoding the context's encoder holds.

    Raises:
        UserError: the objective has no score.
    """
    if not context.reward.goals:
        raise UserError("check_reward looks at a score, and no scorer is given; set scorer, or leave check_reward out")
    network = context.network
    before = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    sampling = replace(context.sampling, batch_size=PROBES)
    probe = ScoreTerm(replace(context, sampling=sampling, prompts=[replace(prompt, weight=1.0)]), score)
    with model_autocast(context.model):
        batch = probe.rollout.next_batch().evaluated_whole()
        probes = _probes(probe, batch)

    norms: dict[str, float] = {}
    for name, term in terms.items():
        _backward(context, lambda term=term: term().loss * term.weight)
        norms[name] = _norm(network.parameters())
    groups, _ = network.prepare_optimizer_params(optimizer.text_encoder_lr, optimizer.unet_lr, optimizer.learning_rate)
    stepper = create_optimizer(optimizer, groups)
    view_noise = partial(context.generator, "check_reward")  # the same for every measurement
    start = [_measured_at(probe, batch, sign, view_noise()) for sign in (1.0, -1.0)]
    _backward(context, lambda: probe.objective(batch, view_noise())[0].loss)
    if optimizer.max_grad_norm:
        nn.utils.clip_grad_norm_(network.parameters(), optimizer.max_grad_norm)
    stepper.step()
    network.zero_grad()
    stepped = [_measured_at(probe, batch, sign, view_noise()) for sign in (1.0, -1.0)]
    network.load_state_dict(before)

    gains = [after - at for (at, _), (after, _) in zip(start, stepped, strict=True)]
    drift = float(torch.stack([(after - at).square().mean() for (_, at), (_, after) in zip(start, stepped, strict=True)]).mean().sqrt())
    faults = _faults(probes, gains, drift, score, context)
    return RewardCheck(
        prompt=prompt.prompt,
        probes=probes,
        norms=norms,
        gain_up=gains[0],
        gain_down=gains[1],
        drift=drift,
        worth=context.reward.worth,
        faults=faults + [str(worth) for worth in context.reward.worth if worth.interval[0] <= 0],
    )


def _probes(term: ScoreTerm, batch: RolloutBatch) -> list[Probe]:
    """The score's gradient at each of the batch's places, where the model's own prediction leads."""
    predicted = term.objective.predict_frozen(batch)
    _, gradients = score_gradients(term.objective.reward, predicted.latents, predicted.sigmas, batch.cond, batch.prompts)
    goals = [goal for goal in term.objective.reward.goals if goal.sign]
    raw = torch.stack([goal.weight * gradients[goal.name] for goal in goals]).sum(0)  # [B, C, h, w]
    columns = (batch.sigmas, rms(raw), (predicted.sensitivity * batch.guidance_scales).abs())
    order = torch.argsort(batch.sigmas, descending=True)
    rows = zip(*(column[order].tolist() for column in columns), strict=True)
    return [Probe(sigma=sigma, gradient=size, sensitivity=moved) for sigma, size, moved in rows]


def _faults(probes: Sequence[Probe], gains: Sequence[float], drift: float, score: ScoreConfig, context: TrainingContext) -> list[str]:
    """What is wrong, and the likely reason."""
    sizes = [one.gradient for one in probes]
    lora = context.network.loras[0]
    if not all(map(math.isfinite, [*sizes, *gains])):
        return ["the score or its gradient is not finite: the scorer's file is damaged, or half precision overflows (use bf16)"]
    found = []
    blind = [one.sigma for one in probes if one.gradient < FLAT_GRADIENT]
    if len(blind) == len(probes):
        return [
            "the score does not change with the latents: the scorer says the same of everything, or its gradient does not reach them "
            "(tools/make_pixel_scorer.py says whether it does)"
        ]
    if blind:
        found.append(f"the score has no gradient at sigma {', '.join(f'{sigma:.3g}' for sigma in blind)}: it was not trained on such noise")
    if not math.isnan(drift) and drift > EXPLODING_DRIFT:
        found.append(f"one step moves the prediction by {drift:.3g} (RMS), which is as much as it is: lower learning_rate")
    for gain, sign in zip(gains, ("+1", "-1"), strict=True):
        if gain < -ROUNDING:
            found.append(f"a step lowers the score at {sign}, against what is wanted: learning_rate is too high for its gradient to hold")
    if not found and max(map(abs, gains)) < ROUNDING:
        found.append(
            "the run would gain next to nothing: raise learning_rate, max_train_steps or network_alpha (the network's "
            f"output is multiplied with alpha / dim = {lora.alpha.item() / lora.rank:.3g}); or the score is where reward_loss lets it rest"
        )
    return found


@torch.no_grad()
def _measured_at(term: ScoreTerm, batch: RolloutBatch, sign: float, views: torch.Generator) -> tuple[float, Tensor]:
    """With the network at multipliers of one sign: the mean reward in the wanted direction, in standard deviations of the score, and the
    prediction [B, C, h, w]."""
    own = term.rollout.trajectories
    model, network, encoder = own.model, own.network, own.encoder
    multipliers = batch.multipliers.abs() * sign
    height, width = (side * model.spec.vae_scale_factor for side in batch.latents.shape[-2:])
    network.eval()  # without dropout
    with model_autocast(model):
        cond = encoder.cond(batch.prompts, (height, width), multipliers.tolist())
        uncond = encoder.uncond(batch.prompts, (height, width), multipliers.tolist())
        batch = replace(batch, multipliers=multipliers, cond=cond, uncond=uncond)
        reward = term.objective(batch, views)[0].metrics["reward"]
        network.set_multiplier(multipliers)
        eps = model.predict_eps(batch.latents, batch.timesteps, cond)
    network.train()
    return float(batch.directions[0] * reward), eps


def _backward(context: TrainingContext, loss: Callable[[], Tensor]) -> None:
    """Leave the loss's gradient in the network."""
    context.network.zero_grad()
    with model_autocast(context.model):
        value = loss()
    (value * LOSS_SCALE).backward()
    for parameter in context.network.parameters():
        if parameter.grad is not None:
            parameter.grad /= LOSS_SCALE


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Of all gradients together."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(torch.stack([grad.norm() for grad in grads]).norm()) if grads else 0.0
