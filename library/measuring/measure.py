"""Measuring a slider: prompts x seeds x multipliers are sampled, decoded and scored, and become one `EvaluationRecord`.

P prompts, S seeds of each, M multipliers, K of them not 0. The base model's pictures (multiplier 0) are made once and shared by all
measurements of the same pictures, whatever the network. A slider may be measured on a part of them first, and on the rest if that does
not answer the question (`EvaluationRecord.joined`); the unit of its gains is that of all pictures of the base model in any case.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError
from library.measuring.against_base import as_shown, beside_base, mean_of, picture_statistics, statistics_of
from library.measuring.judges import Judges
from library.measuring.pictures import BasePictures, Part, PromptPictures
from library.measuring.record import REWARD, EvaluationRecord
from library.measuring.statistics import summarise_response, within_prompt_std
from library.models.base import DiffusionModel
from library.models.prompt_syntax import plain_text
from library.objectives.rewards import Reward
from library.rollouts.sample import PromptEncoder, SamplingConfig, decode, sample
from library.scorers.base import Scorer
from library.training.tracking import progress_bar
from library.types import PromptSpec
from networks.lora import LoRANetwork


@dataclass(frozen=True, kw_only=True)
class Raters:
    """What scores the pictures.

    Attributes:
        reward: what a training follows; its scores are in the scorers' standard deviations.
        scorers: training scores on their own, by name, in their own units.
        judges: what training does not follow.
    """

    reward: Reward = field(default_factory=lambda: Reward([]))
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    judges: Judges = field(default_factory=Judges)

    @property
    def names(self) -> tuple[str, ...]:
        return (*(goal.name for goal in self.reward.goals), *self.scorers, *self.judges.names)

    def __post_init__(self) -> None:
        if both := {*self.scorers, *(goal.name for goal in self.reward.goals)} & {*self.judges.names}:
            raise UserError(f"a scorer and a judge are both called {', '.join(sorted(both))}; give each a name of its own")


@dataclass(kw_only=True)
class Measurer:
    """Measures networks on fixed prompts and seeds.

    Attributes:
        prompts: neighbours of one size and number of steps are sampled together.
        seeds: [P][S], S at least 2.
        sampling: how the pictures are made; `batch_size` bounds what is sampled, decoded or scored at once.
        encoder: holds the prompts' conditioning; None encodes them for each network.
        pixels: decode the pictures for the statistics of pixels; judges that are functions of pixels need them in any case.
        num_pictures: of how many prompts a record keeps the pictures of the first seed.
    """

    model: DiffusionModel
    raters: Raters
    prompts: Sequence[PromptSpec]
    seeds: Sequence[Sequence[int]]
    sampling: SamplingConfig
    encoder: PromptEncoder | None = None
    pixels: bool = True
    num_pictures: int = 0
    _base: BasePictures | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for count in {len(row) for row in self.seeds}:
            if count < 2:
                raise UserError(f"{count} seed per prompt cannot tell a slider from chance; give at least 2 seeds per prompt")

    @property
    def everything(self) -> Part:
        return Part(range(len(self.prompts)), slice(None))

    @torch.no_grad()
    def base(self, network: LoRANetwork) -> BasePictures:
        """The base model's pictures, made at the first call. `network` is the one that is attached to the model; it is switched off."""
        if self._base is None:
            scores, alone, latents, shown = [], [], [], []
            with network.disabled():
                for made in self._sampled(network, [0.0], "sampling the base model", self.everything):
                    scores.append({name: score[:, 0] for name, score in made.scores.items()})
                    alone.append(picture_statistics(made.latents[:, 0], None if made.decoded is None else made.decoded[:, 0]))
                    latents.append(made.latents[:, 0])
                    if made.decoded is not None:
                        shown.append(as_shown(made.decoded[:, 0]))
            self._base = BasePictures(scores=_stack(scores), statistics=alone, latents=latents, shown=shown)
        return self._base

    @torch.no_grad()
    def measure(
        self,
        network: LoRANetwork,
        multipliers: Sequence[float],
        *,
        name: str = "slider",
        part: Part | None = None,
    ) -> EvaluationRecord:
        """Sample, score and compare with the base model. A network that does nothing yet is not sampled.

        Args:
            network: attached to the model.
            multipliers: of the network; 0, the base model, is added where it is missing.
            name: of the record, and of the progress bar.
            part: of the prompts and seeds; None is all.

        Raises:
            UserError: no multiplier besides 0.
        """
        others = sorted({*map(float, multipliers)} - {0.0})
        if not others:
            raise UserError("the only multiplier is 0, the base model; give at least one other, for example -1 0 1")
        part = part or self.everything
        units = {key: within_prompt_std(table) for key, table in self.base(network).scores.items()}
        base = self.base(network).part(part.rows, part.places)
        zero = sum(strength < 0 for strength in others)
        visibility: list[np.ndarray] = []
        if _is_null(network):
            scores = {key: np.repeat(table[:, :, None], len(others), axis=2) for key, table in base.scores.items()}
            nothing = dict.fromkeys(
                ["latent_drift", "latent_statistics", *(("pixel_drift", "perceptual_distance") if base.shown else ())], 0.0
            )
            alone, distances = [[mean_of(base.statistics)]] * len(others), [[nothing]] * len(others)
            pictures = [shown[:1].repeat(len(others) + 1, 1, 1, 1) for shown in base.shown[: self.num_pictures]]
            if base.shown:
                visibility = [np.zeros((len(shown), len(others))) for shown in base.shown]
        else:
            tables, pictures = [], []
            alone, distances = [[] for _ in others], [[] for _ in others]
            for made in self._sampled(network, others, f"measuring {name}", part):
                tables.append(made.scores)
                shown = base.shown[made.row] if made.decoded is not None else None
                found, seen = beside_base(self.model, made.latents, made.decoded, base.latents[made.row], shown)
                for place in range(len(others)):
                    decoded = None if made.decoded is None else made.decoded[:, place]
                    alone[place].append(picture_statistics(made.latents[:, place], decoded))
                    distances[place].append({key: value[:, place].mean().item() for key, value in found.items()})
                if made.decoded is not None and seen is not None:
                    visibility.append(seen.double().numpy())
                    if len(pictures) < self.num_pictures:
                        own = as_shown(made.decoded[0])
                        pictures.append(torch.cat([own[:zero], base.shown[made.row][:1], own[zero:]]))
            scores = _stack(tables)
        strengths = (*others[:zero], 0.0, *others[zero:])
        prompts = [self.prompts[row] for row in part.rows]
        directions, rng = np.array([prompt.direction for prompt in prompts]), np.random.default_rng(0)
        responses = {}
        for key, values in scores.items():
            table = np.insert(values, zero, base.scores[key], axis=2)
            role = self.raters.judges.roles.get(key, "judge") if key in self.raters.judges.names else "scorer"
            responses[key] = summarise_response(key, role, table, strengths, rng, directions, units[key])
        base_statistics = mean_of(base.statistics)
        return EvaluationRecord(
            name=name,
            multipliers=strengths,
            prompts=tuple(prompt.prompt for prompt in prompts),
            seeds=tuple(tuple(map(int, self.seeds[row][part.places])) for row in part.rows),
            responses=responses,
            statistics=statistics_of(base_statistics, [*map(mean_of, alone)], [*map(mean_of, distances)], zero),
            seed_distance=base_statistics["latent_diversity"],
            visibility=np.insert(np.stack(visibility), zero, 0.0, axis=2) if visibility else None,
            settings={
                "num_steps": self.sampling.num_calls,
                "guidance_scale": self.sampling.guidance_scale,
                "solver": self.sampling.sampler,
                "timesteps": self.sampling.spacing or "the model's own",
                "guidance_rescale": self.sampling.guidance_rescale,
                "resolution": f"{self.sampling.size[1]}x{self.sampling.size[0]}",
            },
            pictures=tuple(pictures),
        )

    def state_dict(self) -> dict[str, Any]:
        """The base model's pictures, for a run that goes on."""
        base = self._base
        if base is None:
            return {"of": self._identity(), "base": None}
        scores = {name: torch.from_numpy(table) for name, table in base.scores.items()}
        parts = {
            "scores": scores,
            "statistics": [dict(own) for own in base.statistics],
            "latents": list(base.latents),
            "shown": list(base.shown),
        }
        return {"of": self._identity(), "base": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the base model's pictures over, if they are of the same prompts, seeds, sampling and raters."""
        if state["base"] is not None and state["of"] == self._identity():
            scores = {name: table.numpy() for name, table in state["base"]["scores"].items()}
            self._base = BasePictures(**{**state["base"], "scores": scores})

    def _identity(self) -> str:
        return repr((self.prompts, self.seeds, self.sampling, self.pixels, *self.raters.names))

    def _sampled(self, network: LoRANetwork, multipliers: Sequence[float], label: str, part: Part) -> Iterator[PromptPictures]:
        """One prompt's pictures after the other's, scored. At most a batch of pictures, or those of one prompt, is held at a time."""
        encoder, count = self.encoder or PromptEncoder(self.model, network), len(multipliers)
        encoder.expect(self.prompts)
        wanted = [self.prompts[row] for row in part.rows]
        chosen = [self.seeds[row][part.places] for row in part.rows]
        per_prompt = len(chosen[0]) * count
        total = per_prompt * sum(self.sampling.of(prompt).num_calls for prompt in wanted)
        with progress_bar(total=total, desc=label, leave=False, unit="step") as bar:
            for chunk in self._chunks(wanted, per_prompt):
                pairs = [(wanted[row], seed) for row in chunk for seed in chosen[row] for _ in multipliers]
                prompts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
                strengths = [*multipliers] * (len(pairs) // count)
                latents = sample(
                    self.model, network, prompts, seeds, strengths, sampling=self.sampling, encoder=encoder, progress=bar.update
                ).cpu()
                decoded = decode(self.model, latents) if self.pixels or self.raters.judges.functions else None
                at_once = self._at_once(prompts[0])
                batches = [slice(start, start + at_once) for start in range(0, len(pairs), at_once)]
                rated = [self._rate(prompts[rows], latents[rows], None if decoded is None else decoded[rows], encoder) for rows in batches]
                scores = {key: torch.cat([part[key] for part in rated]).unflatten(0, (len(chunk), -1, count)) for key in rated[0]}
                latents = latents.unflatten(0, (len(chunk), -1, count))
                decoded = None if decoded is None else decoded.unflatten(0, (len(chunk), -1, count))
                for place, row in enumerate(chunk):
                    own = {key: score[place] for key, score in scores.items()}
                    yield PromptPictures(row, latents[place], None if decoded is None else decoded[place], own)

    def _rate(self, prompts: Sequence[PromptSpec], latents: Tensor, decoded: Tensor | None, encoder: PromptEncoder) -> dict[str, Tensor]:
        """Scores [B] by name, on the CPU, of pictures of one size."""
        reward, judges = self.raters.reward, self.raters.judges
        texts = [plain_text(prompt.prompt) for prompt in prompts]
        scorers = {**self.raters.scorers, **judges.scorers}
        scores = {}
        if reward.goals or scorers:
            latents = latents.to(self.model.device)
            sigmas = latents.new_zeros(len(latents))
            # What was asked for, in the base model's words: a LoRA of the text encoder must not talk to its own judge.
            cond = encoder.cond(prompts, self.sampling.of(prompts[0]).size, [0.0] * len(prompts))
            if reward.goals:
                total = reward(latents, sigmas, cond, prompts)
                scores = {REWARD: total.total, **total.terms}
            scores |= {name: scorer(latents, sigmas, cond, texts) for name, scorer in scorers.items()}
        if decoded is not None:
            scores |= {name: judge(decoded.clamp(0, 1), texts) for name, judge in judges.functions.items()}
        return {name: score.cpu() for name, score in scores.items()}

    def _at_once(self, prompt: PromptSpec) -> int:
        return self.sampling.pictures_at_once(self.model, self.sampling.of(prompt).size)

    def _chunks(self, prompts: Sequence[PromptSpec], per_prompt: int) -> Iterator[list[int]]:
        """Runs of neighbouring prompts of one size and number of steps, as many as are sampled at once (at least 1)."""
        kinds = [(own.size, own.num_steps) for own in map(self.sampling.of, prompts)]
        chunk: list[int] = []
        for row, kind in enumerate(kinds):
            if chunk and ((len(chunk) + 1) * per_prompt > self._at_once(prompts[row]) or kind != kinds[chunk[0]]):
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk


def seed_table(prompts: Sequence[PromptSpec], count: int, first: int = 0, offset: int = 0) -> list[list[int]]:
    """Seeds [P][S]: no two pairs of prompt and seed share one, counted from `first`; but a prompt that brings a seed begins with that.
    `offset` is added to all."""
    firsts = [first + row * count if prompt.seed is None else prompt.seed for row, prompt in enumerate(prompts)]
    return [[offset + own + number for number in range(count)] for own in firsts]


def _is_null(network: LoRANetwork) -> bool:
    """Whether it does nothing, as before training."""
    return not any(lora.lora_up.weight.any() for lora in network.loras)


def _stack(scores: Sequence[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """Scores of P prompts as [P, ...], by name."""
    return {name: torch.stack([own[name] for own in scores]).double().numpy() for name in scores[0]}
