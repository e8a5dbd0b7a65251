"""The records that the parts hand to each other. Shapes: B batch, C latent channels, h w latent size, T tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.errors import UserError

LARGEST_SIDE = 16384  # pixels
MOST_CHARACTERS = 50_000  # of a prompt, some 12,000 tokens
SIDES = f"multiples of 8 from 8 to {LARGEST_SIDE} pixels"  # in words


def is_side(value: float) -> bool:
    """Whether a picture may be so many pixels wide or high."""
    return 8 <= value <= LARGEST_SIDE and value % 8 == 0


@dataclass(frozen=True)
class Conditioning:
    """What the network is given besides latents and timestep: one record for every family.

    Attributes:
        text: token embeddings [B, T, D].
        pooled: pooled embedding [B, P] (SDXL), or None.
        time_ids: original size, crop corner and target size, (h, w, top, left, h, w) [B, 6] (SDXL), or None.
        lengths: how many of the T tokens each row has, the others being 0 (Z-Image), or None where all have T. They are no tensor, since
            the network is told them at every call, which then would wait for the device.
    """

    text: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.text.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> "Conditioning":
        """Select rows; the result is a batch too (index with a slice or a list, not an int)."""
        taken = self.map(lambda part: part[index])
        if self.lengths is None:
            return taken
        places = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index]
        return replace(taken, lengths=tuple(self.lengths[place] for place in places.tolist()))

    def repeat(self, times: int) -> "Conditioning":
        """The whole batch `times` times over: [c0, c1, c0, c1, ...]."""
        repeated = self.map(lambda part: part.repeat(times, *[1] * (part.ndim - 1)))
        return repeated if self.lengths is None else replace(repeated, lengths=self.lengths * times)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """Move it all; `dtype` is for the embeddings, time_ids are sizes in pixels, which half precision would round."""
        return self.map(lambda part: part.to(device=device, dtype=None if part is self.time_ids else dtype))

    @staticmethod
    def cat(batches: Sequence["Conditioning"]) -> "Conditioning":
        """Join batches of one family along B; texts with `lengths` become as long as the longest."""
        longest = max(batch.text.shape[1] for batch in batches)
        lacking = [longest - batch.text.shape[1] for batch in batches]
        lengths = [batch.lengths for batch in batches if batch.lengths is not None]
        assert len(lengths) == len(batches) or not (lengths or any(lacking)), "texts of different lengths"
        return Conditioning(
            torch.cat([F.pad(batch.text, (0, 0, 0, more)) if more else batch.text for batch, more in zip(batches, lacking, strict=True)]),
            _cat_optional([batch.pooled for batch in batches]),
            _cat_optional([batch.time_ids for batch in batches]),
            sum(lengths, ()) or None,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """With every tensor changed, its rows being as they are."""
        return Conditioning(
            change(self.text),
            None if self.pooled is None else change(self.pooled),
            None if self.time_ids is None else change(self.time_ids),
            self.lengths,
        )


def _cat_optional(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts)), "conditioning of two families cannot be joined"
    return torch.cat(present) if present else None


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """One entry of a prompt list.

    Attributes:
        prompt: what the picture shows.
        negative_prompt: the text of the unconditional branch.
        width, height: pixels, multiples of 8; None takes the run's resolution.
        guidance_scale: above 0; None takes the run's.
        weight: how often it is drawn, relative to the others; above 0.
        direction: +1 when a positive multiplier is to raise the score on this prompt, -1 when it is to lower it.
        seed: which seed measurements and previews of this prompt begin with; None is their own.
        num_steps: steps of the sampler; None takes the run's.
        multiplier: of the LoRA while it is rolled out; None takes +1 and -1 in turn.
        original_width, original_height: pixels that SDXL is given as the picture's size before it was cropped; None is its size now.
        crop_top, crop_left: pixels that SDXL is given as cropped off.

    Raises:
        UserError: a text of more than MOST_CHARACTERS.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    weight: float = 1.0
    direction: float = 1.0
    seed: int | None = None
    num_steps: int | None = None
    multiplier: float | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_top: int = 0
    crop_left: int = 0

    def __post_init__(self) -> None:
        for text in (self.prompt, self.negative_prompt):
            if len(text) > MOST_CHARACTERS:
                raise UserError(f"a prompt has {len(text)} characters, and {MOST_CHARACTERS} are the most; shorten {text[:40]!r}...")


@dataclass(frozen=True)
class History:
    """What a multistep solver remembers of B samples: the clean latents that the step before predicted.

    Attributes:
        x0: [B, C, h, w]; anything where there was no step before.
        abar: where they were predicted [B]; 0 where there was no step before.
    """

    x0: Tensor
    abar: Tensor


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Another prediction of the latents of B trajectories than the conditional one, evaluated for some of them only: along a trajectory its
    distance from the conditional one changes slowly, so that the distance that was last seen stands in for the rest.

    Attributes:
        due: the rows that are evaluated now, ascending, on the latents' device [R]; None: all.
        distances: conditional minus other prediction as last evaluated [B, C, h, w], which `complete` brings up to date; None if all are
            always due.
    """

    due: Tensor | None = None
    distances: Tensor | None = None

    def complete(self, eps: Tensor, evaluated: Tensor | None) -> Tensor:
        """The other prediction of all rows [B, C, h, w], without gradient.

        Args:
            eps: the conditional one [B, C, h, w].
            evaluated: the other one, where it is due [R, C, h, w]; None where none is.
        """
        eps = eps.detach()
        if evaluated is None:
            assert self.distances is not None
            return eps - self.distances
        if self.due is None:
            if self.distances is not None:
                self.distances.copy_(eps - evaluated)
            return evaluated
        assert self.distances is not None
        self.distances.index_copy_(0, self.due, eps[self.due] - evaluated)
        return (eps - self.distances).index_copy(0, self.due, evaluated)


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """A rollout at one moment: where each of B trajectories stands.

    Attributes:
        latents: variance-preserving noisy latents [B, C, h, w].
        timesteps, next_timesteps: model timesteps [B]; -1 is the end of the schedule (clean).
        sigmas: sqrt(1 - abar) / sqrt(abar) at the timesteps [B].
        times, strengths: `timesteps` and `multipliers` as numbers, known without a wait for the device.
        num_steps: of the whole schedule.
        multipliers: what the LoRA is multiplied with, sample by sample [B].
        prompt_directions: +1 where a positive multiplier is to raise the score, -1 where it is to lower it [B].
        guidance_scales: classifier-free guidance [B].
        cond, uncond: conditioning of the two branches, B rows each.
        sparse_uncond: which rows the unconditional branch is evaluated for; None if none is guided.
        prompts: the B prompts.
        noise: fresh standard normal noise [B, C, h, w] for a solver that draws some, else None.
        history: of a solver that remembers, else None.
        added_noise: the noise in the latents, where it is known because a finished picture was noised [B, C, h, w].
    """

    latents: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    sigmas: Tensor
    times: Sequence[float]
    strengths: Sequence[float]
    num_steps: int
    multipliers: Tensor
    prompt_directions: Tensor
    guidance_scales: Tensor
    cond: Conditioning
    uncond: Conditioning
    sparse_uncond: Sparse | None
    prompts: list[PromptSpec]
    noise: Tensor | None = None
    history: History | None = None
    added_noise: Tensor | None = None

    @property
    def directions(self) -> Tensor:
        """+1 where the score is to rise, -1 where it is to fall [B]: the multiplier's sign times the prompt's direction."""
        return (self.multipliers * self.prompt_directions).sign()

    def take(self, rows: Sequence[int]) -> "RolloutBatch":
        """These rows as a batch for which nothing is evaluated but what is asked for anew."""
        index = torch.tensor(rows, dtype=torch.long).to(self.latents.device, non_blocking=True)

        def of(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [value[row] for row in rows]
            if isinstance(value, History):
                return History(value.x0[index], value.abar[index])
            return value[index] if isinstance(value, Tensor | Conditioning) else value

        return RolloutBatch(**{name: of(value) for name, value in vars(self.evaluated_whole()).items()})

    def evaluated_whole(self) -> "RolloutBatch":
        """The same batch, with nothing taken over from earlier ones."""
        return self if self.sparse_uncond is None else replace(self, sparse_uncond=Sparse())


@dataclass(frozen=True)
class Finished:
    """Trajectories that have come to their ends: clean latents [N, C, h, w], and what they were asked for, N of each."""

    latents: Tensor
    prompts: Sequence[PromptSpec]
    multipliers: Sequence[float]
    cond: Conditioning


@dataclass(frozen=True)
class RewardOutput:
    """total [B], higher is better, and the terms it is the weighted sum of, by name, [B] each."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossOutput:
    """What a term of the training objective makes of a batch.

    Attributes:
        loss: a scalar to minimise.
        sample_losses: what each sample contributes, no gradient [B].
        samples: what each sample is, in words [B]; a loss that is not finite is reported with them.
        metrics: numbers to log.
        promised: by how much the score of each sample's finished picture rises, in the wanted direction, if the gain of this step lasts at
            every step [B]; None for a term without a score.
        unscored: which samples a scorer has no finite score or gradient for [B], by the scorer's name; they are no part of `loss`.
    """

    loss: Tensor
    sample_losses: Tensor
    samples: Sequence[str]
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    promised: Tensor | None = None
    unscored: Mapping[str, Tensor] = field(default_factory=dict)
