"""The record of a measured slider: scores, statistics of the pictures, and how it was sampled. P prompts, S seeds, M multipliers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from library.measuring.statistics import Interval, Response, nan_to_none, none_to_nan, summarise_response

FORMAT = "leco_score.evaluation/2"
REWARD = "reward"  # what the weighted sum of the training scores is called among the scores
FIRM_GAIN = 0.5  # within-prompt standard deviations; a score that moved less is not yet worth a ratio


def hack_index(score_gain: float, judge_gain: float, kept: float = 1.0) -> float:
    """The share of the training score's gain that the judges do not see: (score - kept * judge) / score.

    0: the judges gain as much. 1: they do not move. 2: they lose what the score gains. Below 0: they gain more. A score that gained less
    than `FIRM_GAIN` is divided by that instead, so that the index is finite, and 0 at the start. Gains are in within-prompt standard
    deviations, in the wanted direction.

    Args:
        kept: the share of the pictures that still show what was asked for. What judges gain on the others is no gain: a judge is taken in
            by pictures such as nobody has ever rated.
    """
    return (score_gain - judge_gain * (kept if judge_gain > 0 else 1.0)) / max(score_gain, FIRM_GAIN)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationRecord:
    """All that was measured on one slider. A `place` is an index among the multipliers.

    Attributes:
        name: the slider's.
        multipliers: ascending, 0 among them.
        prompts: the P prompts.
        seeds: [P][S].
        responses: by name; first the training scores (the reward before its parts), then the judges.
        statistics: means over the pictures, by name, one a multiplier. Distances from the base model's picture of the same prompt and seed:
            pixel_drift (RMS, 0..1), latent_drift (RMS), latent_statistics, perceptual_distance. Over the base model's own: saturation,
            edges, nyquist, latent_nyquist, pixel_diversity, latent_diversity. clipped is a share. Those of pixels are missing where none
            were decoded.
        seed_distance: RMS distance between the latents of two seeds of one prompt without the slider.
        settings: how it was sampled.
        origin: what the slider's file says of how it was made.
        visibility: root of each picture's perceptual distance (a square) from the base model's, over that of a visible change of brightness
            (`against_base.NOTICEABLE`) [P, S, M]; None where no pixels were decoded. Above 1, a person tells the two apart.
        pictures: of the first seed of the first prompts, uint8 [M, 3, H, W] each; not part of the dictionary.
        elsewhere: the same slider measured otherwise, at its ends; their names say how.
    """

    name: str
    multipliers: tuple[float, ...]
    prompts: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]
    responses: Mapping[str, Response]
    statistics: Mapping[str, tuple[float, ...]]
    seed_distance: float = math.nan
    settings: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    visibility: np.ndarray | None = field(default=None, repr=False)
    pictures: tuple[Tensor, ...] = field(default=(), repr=False)
    elsewhere: tuple["EvaluationRecord", ...] = ()

    def joined(self, other: "EvaluationRecord") -> "EvaluationRecord":
        """With the pictures of `other`, which are of other prompts, or of other seeds of the same prompts, at the same multipliers."""
        assert self.multipliers == other.multipliers and self.responses.keys() == other.responses.keys(), "measured differently"
        axis = 1 if self.prompts == other.prompts else 0
        rng = np.random.default_rng(0)
        responses = {}
        for name, own in self.responses.items():
            values = np.concatenate([own.values, other.responses[name].values], axis)
            signs = own.signs if axis else np.concatenate([own.signs, other.responses[name].signs])
            responses[name] = summarise_response(name, own.role, values, self.multipliers, rng, signs, own.std)
        share = self.num_pairs / (self.num_pairs + other.num_pairs)
        statistics = {
            name: tuple(share * value + (1 - share) * more for value, more in zip(values, other.statistics[name], strict=True))
            for name, values in self.statistics.items()
        }
        visible = [part for part in (self.visibility, other.visibility) if part is not None]
        pairs = zip(self.seeds, other.seeds, strict=True)
        return replace(
            self,
            prompts=self.prompts if axis else self.prompts + other.prompts,
            seeds=tuple(own + more for own, more in pairs) if axis else self.seeds + other.seeds,
            responses=responses,
            statistics=statistics,
            seed_distance=share * self.seed_distance + (1 - share) * other.seed_distance,
            visibility=np.concatenate(visible, axis) if len(visible) == 2 else None,
        )

    def first(self, prompts: int, seeds: int) -> "EvaluationRecord":
        """Of the first so many prompts and seeds alone. The statistics of pictures, of which means are known, stay those of all."""
        rng, rows = np.random.default_rng(0), (slice(prompts), slice(seeds))
        return replace(
            self,
            prompts=self.prompts[:prompts],
            seeds=tuple(own[:seeds] for own in self.seeds[:prompts]),
            responses={
                name: summarise_response(name, own.role, own.values[rows], self.multipliers, rng, own.signs[:prompts], own.std)
                for name, own in self.responses.items()
            },
            visibility=None if self.visibility is None else self.visibility[rows],
        )

    # ---- where to look ----

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.seeds))

    @property
    def base(self) -> int:
        """The place of multiplier 0."""
        return self.multipliers.index(0)

    @property
    def ends(self) -> tuple[int, ...]:
        """The places of the weights +1 and -1, of the outermost ones where those were not measured; never that of 0."""
        multipliers = self.multipliers
        ends = [multipliers.index(end) if end in multipliers else other for end, other in ((1, len(multipliers) - 1), (-1, 0))]
        return tuple(place for place in ends if place != self.base)

    # ---- scores ----

    @property
    def scaled(self) -> list[Response]:
        """The responses that have gains in standard deviations: those that vary without the slider and are no yes-or-no judges."""
        return [response for response in self.responses.values() if response.std > 0 and not response.is_share]

    @property
    def training_scores(self) -> list[Response]:
        """What training raises: the reward, or where it was not measured every training score; among `scaled`."""
        scorers = [response for response in self.scaled if response.role == "scorer"]
        return [response for response in scorers if response.name == REWARD] or scorers

    @property
    def judges(self) -> list[Response]:
        """The judges whose answer is to rise and fall with the weight; among `scaled`."""
        return [response for response in self.scaled if response.role == "judge"]

    @property
    def side_effects(self) -> list[Response]:
        """The judges whose answer is to stay where it is; among `scaled`."""
        return [response for response in self.scaled if response.role == "stay"]

    @property
    def share_judges(self) -> list[Response]:
        """The judges that answer yes or no: what they say must not fall, at any weight."""
        return [response for response in self.responses.values() if response.is_share]

    def gain(self, name: str, place: int) -> Interval:
        """Of one score, in within-prompt standard deviations, above 0 when it moves the way the weight's sign says."""
        gain = self.responses[name].gains_std[place]
        return gain if place >= self.base else Interval(-gain.value, -gain.high, -gain.low)

    def score_gain(self, place: int) -> float:
        """Mean `gain` of the training scores; NaN without any."""
        return self._mean_gain(self.training_scores, place)

    def judge_gain(self, place: int) -> float:
        """Mean `gain` of the judges; NaN without any."""
        return self._mean_gain(self.judges, place)

    @property
    def mean_score_gain(self) -> float:
        """Over both ends."""
        return float(np.mean([self.score_gain(place) for place in self.ends]))

    @property
    def mean_judge_gain(self) -> float:
        """Over both ends."""
        return float(np.mean([self.judge_gain(place) for place in self.ends]))

    def share_kept(self, place: int) -> float:
        """Of the pictures that the strictest yes-or-no judge says yes to without the slider, how many it still does; at most 1."""
        means = [judge.means for judge in self.share_judges if judge.means[self.base].value > 0]
        return min([mean[place].value / mean[self.base].value for mean in means] + [1.0])

    def visible_share(self, place: int) -> float:
        """Of the pictures that a person tells from the base model's (`visibility` above 1); NaN where no pixels were decoded."""
        return math.nan if self.visibility is None else float((self.visibility[:, :, place] > 1).mean())

    def hack_index_at(self, place: int) -> float:
        """See `hack_index`; NaN without judges or without a training score."""
        return hack_index(self.score_gain(place), self.judge_gain(place), self.share_kept(place))

    @property
    def hack_index(self) -> float | None:
        """That of the worse end; None without judges or without a training score."""
        indices = [self.hack_index_at(place) for place in self.ends]
        return None if any(map(math.isnan, indices)) else max(indices)

    @property
    def relative_drift(self) -> float:
        """RMS distance of the latents from the base model's, mean of both ends, over `seed_distance`: 1 is another picture."""
        drifts = self.statistics["latent_drift"]
        return float(np.mean([drifts[place] for place in self.ends])) / max(self.seed_distance, 1e-6)

    def prompt_gains(self, name: str) -> np.ndarray:
        """Mean gain of a score on each prompt, in within-prompt standard deviations [P, M]; NaN where there is no such unit."""
        response = self.responses[name]
        changes = response.values - response.values[:, :, self.base, None]
        gains = changes.mean(1) * response.signs[:, None]
        return gains / response.std if response.std > 0 else np.full_like(gains, np.nan)

    # ---- other forms ----

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers of both ends, for the trackers. Gains are as measured: at -1 they are below 0 when all is well."""
        numbers: dict[str, float] = {}
        for name, response in self.responses.items():
            prefix = "" if name == REWARD else f"score/{name}/" if response.role == "scorer" else f"judge/{name}/"
            for place in self.ends:
                weight, gain = f"{self.multipliers[place]:+g}", response.gains_std[place]
                if response.is_share:
                    numbers[f"{prefix}share_at_{weight}"] = response.means[place].value
                else:
                    bounds = {"": gain.value, "_low": gain.low, "_high": gain.high}
                    numbers |= {f"{prefix}gain_at_{weight}{end}": bound for end, bound in bounds.items()}
            if response.is_share:
                numbers[f"{prefix}share_of_base"] = response.means[self.base].value
        if (index := self.hack_index) is not None:
            numbers["hack_index"] = index
        for place in self.ends:
            if self.visibility is not None:
                numbers[f"visible_share_at_{self.multipliers[place]:+g}"] = self.visible_share(place)
            numbers |= {f"{name}_at_{self.multipliers[place]:+g}": values[place] for name, values in self.statistics.items()}
        return numbers

    def __str__(self) -> str:
        """The gains in a line."""

        def at(values: list[str]) -> str:
            return ", ".join(f"{value} at {self.multipliers[place]:+g}" for value, place in zip(values, self.ends, strict=True))

        moves = {response.name: at([f"{response.gains_std[place].value:+.2f}" for place in self.ends]) for response in self.scaled}
        parts = [f"training score {moves[REWARD]}"] if REWARD in moves else []
        parts += [f"judge {judge.name} {moves[judge.name]}" for judge in self.judges]
        for judge in self.share_judges:
            shares = at([f"{judge.means[place].value:.0%}" for place in self.ends])
            parts.append(f"{judge.name} {judge.means[self.base].value:.0%} of the base model's pictures, {shares}")
        if (index := self.hack_index) is not None:
            parts.append(f"hack index {index:.2f}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the pictures."""
        prompt_gains = {name: self.prompt_gains(name) for name in self.responses}
        return {
            "name": self.name,
            "multipliers": list(self.multipliers),
            "prompts": list(self.prompts),
            "seeds": [list(row) for row in self.seeds],
            "settings": self.settings,
            "origin": self.origin,
            "responses": {name: response.to_dict() for name, response in self.responses.items()},
            "statistics": {name: [*map(nan_to_none, values)] for name, values in self.statistics.items()},
            "seed_distance": nan_to_none(self.seed_distance),
            "visibility": None if self.visibility is None else self.visibility.tolist(),
            "per_prompt": [
                {"prompt": prompt, "gains_std": {name: [*map(nan_to_none, gains[row].tolist())] for name, gains in prompt_gains.items()}}
                for row, prompt in enumerate(self.prompts)
            ],
            "elsewhere": [other.to_dict() for other in self.elsewhere],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "EvaluationRecord":
        """What `to_dict` gave, without the pictures."""
        return EvaluationRecord(
            name=data["name"],
            multipliers=tuple(data["multipliers"]),
            prompts=tuple(data["prompts"]),
            seeds=tuple(tuple(row) for row in data["seeds"]),
            settings=data["settings"],
            origin=data["origin"],
            responses={name: Response.from_dict(name, response) for name, response in data["responses"].items()},
            statistics={name: tuple(map(none_to_nan, values)) for name, values in data["statistics"].items()},
            seed_distance=none_to_nan(data["seed_distance"]),
            visibility=None if data.get("visibility") is None else np.array(data["visibility"]),
            elsewhere=tuple(map(EvaluationRecord.from_dict, data.get("elsewhere", ()))),
        )

    def _mean_gain(self, responses: list[Response], place: int) -> float:
        return float(np.mean([self.gain(response.name, place).value for response in responses])) if responses else math.nan
