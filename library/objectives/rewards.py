"""Scorers and what is wanted of each: raise it, lower it, hold it where the frozen model has it, never let it pass a bound."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.prompt_syntax import plain_text
from library.scorers.base import Scorer, ScorerSpec
from library.scorers.worth import Worth, worth_of
from library.types import Conditioning, PromptSpec, RewardOutput


@dataclass(frozen=True)
class Limit:
    """How far a score may go.

    Attributes:
        kind: "hold" keeps it where the frozen model has it, "max" below and "min" above a bound.
        value: for "hold", the distance from the frozen model, in standard deviations (of `ScorerSpec`), above 0;
            for "max" and "min", the bound in the score's own units.
    """

    kind: str
    value: float

    @staticmethod
    def parse(word: str) -> "Limit | None":
        """ "none", "hold=0.2", "max=7.5" or "min=4". Raises UserError for anything else."""
        if word == "none":
            return None
        kind, _, text = word.partition("=")
        try:
            limit = Limit(kind, float(text))
        except ValueError:
            limit = None
        if limit is None or kind not in ("hold", "max", "min") or not abs(limit.value) < float("inf"):
            raise UserError(f"scorer_limits has {word!r}, but a limit is none, hold=0.2, max=7.5 or min=4 (with your numbers)")
        if kind == "hold" and limit.value <= 0:
            raise UserError(f"scorer_limits has {word!r}, but the distance must be above 0, such as hold=0.2")
        return limit


class ScorerEnsemble(Scorer):
    """Scorers of one opinion as one scorer, in the units of the first.

    The score is the mean of the members' standardised scores; the variance the members' mean variance plus the variance of their
    scores (Lakshminarayanan et al., arXiv 1612.01474).
    """

    def __init__(self, members: Sequence[Scorer]) -> None:
        specs = [member.spec for member in members]
        super().__init__(
            ScorerSpec(
                kind="ensemble",
                architecture={},
                vae=specs[0].vae,
                noise_aware=all(spec.noise_aware for spec in specs),
                uses_prompt=any(spec.uses_prompt for spec in specs),
                mean=specs[0].mean,
                std=specs[0].std,
            )
        )
        self.scorers = nn.ModuleList(members)
        self.name = "+".join(dict.fromkeys(member.name for member in members))

    def score(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return self.score_and_uncertainty(latents, sigmas, cond, prompts)[0]

    def score_and_uncertainty(
        self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        scores, variances = [], []
        for member in self.scorers:
            assert isinstance(member, Scorer)
            score, uncertainty = member.score_and_uncertainty(latents, sigmas, cond, prompts)
            scores.append((score - member.spec.mean) / member.spec.std)
            variances.append((uncertainty / member.spec.std).square())
        members = torch.stack(scores)
        variance = members.var(0, correction=0) + torch.stack(variances).mean(0)
        # the square root's slope is infinite where all members agree
        return members.mean(0) * self.spec.std + self.spec.mean, variance.clamp_min(1e-12).sqrt() * self.spec.std


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One score and what is wanted of it.

    Attributes:
        scorer: frozen, on the model's device.
        weight: how much it counts beside the others; below 0 when a positive slider is to lower it, 0 when it is only limited.
        limit: how far it may go; a held score is neither raised nor lowered, whatever its weight.
        pessimism: by how many standard deviations of the scorer's own uncertainty its score is taken to be worse.
    """

    scorer: Scorer
    weight: float = 1.0
    limit: Limit | None = None
    pessimism: float = 0.0

    @property
    def name(self) -> str:
        return self.scorer.name

    @property
    def held(self) -> bool:
        return self.limit is not None and self.limit.kind == "hold"

    @property
    def sign(self) -> float:
        """+1 when a positive slider raises the score, -1 when it lowers it, 0 when it does neither."""
        return 0.0 if self.held or self.weight == 0 else 1.0 if self.weight > 0 else -1.0

    def standardise(self, score: Tensor | float) -> Tensor | float:
        return (score - self.scorer.spec.mean) / self.scorer.spec.std

    def value(
        self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[PromptSpec], ascent: Tensor | None = None
    ) -> Tensor:
        """The score [B] in standard deviations of the scorer; differentiable in the latents.

        Args:
            ascent: +1 where the whole reward is to rise, -1 where it is to fall [B]. The score is then the pessimistic one: mean minus
                `pessimism` standard deviations where it is to rise, plus as many where it is to fall. None is the mean.
        """
        texts = [plain_text(prompt.prompt) for prompt in prompts]
        with torch.autocast(latents.device.type, enabled=False):  # half precision would round the gradient of a small change away
            latents, sigmas = latents.float(), sigmas.float()
            if ascent is None or not self.pessimism or not self.sign:
                score = self.scorer(latents, sigmas, cond, texts)
            else:
                mean, uncertainty = self.scorer.score_and_uncertainty(latents, sigmas, cond, texts)
                score = mean - self.pessimism * self.sign * ascent * uncertainty
        value = self.standardise(score)
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True)
class Reward:
    """The weighted sum of scores, each in its own standard deviations, so that weights mean the same for every scorer."""

    goals: Sequence[Goal]

    @property
    def scorers(self) -> list[Scorer]:
        return [goal.scorer for goal in self.goals]

    @property
    def members(self) -> list[Scorer]:
        """The scorers, those of an ensemble one by one."""
        return [scorer for goal in self.goals for scorer in _members(goal.scorer)]

    @property
    def worth(self) -> list[Worth]:
        """Of the scorers whose files say it."""
        found = [worth_of(scorer.spec, scorer.name) for scorer in self.members]
        return [worth for worth in found if worth is not None]

    @property
    def needs_frozen(self) -> bool:
        """Whether a goal cannot be judged without the frozen model's score."""
        return any(goal.held for goal in self.goals)

    def to(self, device: torch.device | str) -> "Reward":
        return Reward([replace(goal, scorer=goal.scorer.to(device)) for goal in self.goals])

    def __call__(
        self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[PromptSpec], ascent: Tensor | None = None
    ) -> RewardOutput:
        """Score variance-preserving latents [B, C, h, w] at sigmas [B]; differentiable in the latents.

        It says how high the scores are, not whether that is wanted: the directions of prompts and multipliers are left to the caller.

        Args:
            cond, prompts: what was asked for, B of each.
            ascent: as in `Goal.value`; None, for measurements, is the mean that each scorer states.

        Returns:
            `terms`: every goal's value [B]; `total`: the weighted sum of those that are to rise or fall [B].
        """
        terms = {goal.name: goal.value(latents, sigmas, cond, prompts, ascent) for goal in self.goals}
        total = torch.stack([goal.weight * terms[goal.name] for goal in self.goals if goal.sign]).sum(0)
        return RewardOutput(total, terms)


def _members(scorer: Scorer) -> list[Scorer]:
    if not isinstance(scorer, ScorerEnsemble):
        return [scorer]
    return [member for member in scorer.scorers if isinstance(member, Scorer)]


def score_gradients(
    reward: Reward,
    latents: Tensor,
    sigmas: Tensor,
    cond: Conditioning | None,
    prompts: Sequence[PromptSpec],
    ascent: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every goal's value and its gradient in the latents. Scorers are differentiated one by one: memory is that of the largest.

    Args:
        latents: variance-preserving [N, C, h, w]; they need not require a gradient, and get none.
        sigmas: their noise levels [N]. cond, prompts: N of each.
        ascent: +1 where the reward is to rise, -1 where it is to fall [N]; makes the scores pessimistic (`Goal.value`).

    Returns:
        By goal's name: values [N] and gradients d value / d latents [N, C, h, w], both float32.

    Raises:
        UserError: a scorer's value does not depend on the latents in torch's eyes.
    """
    latents = latents.detach().float()
    values, gradients = {}, {}
    for goal in reward.goals:
        with torch.enable_grad():
            own = latents.clone().requires_grad_()
            value = goal.value(own, sigmas, cond, prompts, ascent)
            (gradient,) = torch.autograd.grad(value.sum(), own, allow_unused=True) if value.requires_grad else (None,)
        if gradient is None:
            raise UserError(
                f"scorer {goal.name} has no gradient in the latents, so nothing can be trained with it: its code leaves torch (numpy, "
                "detach) or is constant; give another scorer, and this one as a judge"
            )
        gradients[goal.name] = gradient
        values[goal.name] = value.detach()
    return values, gradients


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample of [B, C, h, w]: [B]."""
    return x.square().mean((1, 2, 3)).sqrt()


def unit_rms(x: Tensor) -> Tensor:
    """Each sample of [B, C, h, w] scaled to RMS 1; one of zeros stays so."""
    return x / rms(x).clamp_min(1e-12).view(-1, 1, 1, 1)
