"""Heads: from a backbone's features to what a criterion learns, and from that to one score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

LOG_VARIANCE_RANGE = (-10.0, 10.0)  # of a "gaussian" head: a spread of 0.7 % to 148 times that of the targets; beyond, exp overflows


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What one head puts out and how it is read.

    Attributes:
        name: of the head, unique within its scorer.
        criterion: what it was trained with, a name in `library.scorer_training.criteria.base.CRITERIA`.
        readout: how its outputs become a score, a key of READOUTS.
        outputs: K, the numbers that it puts out for a picture.
        classes: names of the K outputs, where they are classes or tags.
        values: the score that each output stands for, where they are bins (K) or ordered levels (K + 1), ascending.
        target_class: the class or tag whose log odds are the score; the first one if not set.
        mean, std: of the training targets, the unit in which "value" and "gaussian" outputs are learned; std is above 0.
        members: size of the ensemble; their mean is the score, their disagreement its uncertainty.
        hidden: width of each member's hidden layer; 0 for a linear head.
    """

    name: str = "score"
    criterion: str = "mse"
    readout: str = "value"
    outputs: int = 1
    classes: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    target_class: str = ""
    mean: float = 0.0
    std: float = 1.0
    members: int = 1
    hidden: int = 0


class Head(nn.Module):
    """An ensemble of small networks over the same features."""

    def __init__(self, feature_width: int, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.members = nn.ModuleList(
            nn.Sequential(nn.Linear(feature_width, spec.hidden), nn.SiLU(), nn.Linear(spec.hidden, spec.outputs))
            if spec.hidden
            else nn.Linear(feature_width, spec.outputs)
            for _ in range(spec.members)
        )

    def forward(self, features: Tensor) -> Tensor:  # [B, feature_width] -> [B, members, K]
        return torch.stack([member(features) for member in self.members], dim=1)


def read_value(outputs: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor | None]:
    """One output, in standard deviations of the training targets around their mean."""
    return outputs[..., 0] * head.std + head.mean, None


def read_gaussian(outputs: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor | None]:
    """Mean and log variance of a normal distribution, both in units of the training targets' standard deviation."""
    return outputs[..., 0] * head.std + head.mean, (outputs[..., 1].clamp(*LOG_VARIANCE_RANGE) / 2).exp() * head.std


def read_distribution(outputs: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the distribution of votes over the bins' values, as NIMA reads it (arXiv 1709.05424)."""
    probabilities, values = outputs.softmax(-1), outputs.new_tensor(head.values)
    mean = (probabilities * values).sum(-1)
    return mean, (probabilities * (values - mean.unsqueeze(-1)).square()).sum(-1).clamp_min(1e-12).sqrt()


def read_class(outputs: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor | None]:
    """Log odds of the target class against all others: unlike its probability, not flat where the classifier is sure."""
    target = head.classes.index(head.target_class) if head.target_class else 0
    others = torch.cat([outputs[..., :target], outputs[..., target + 1 :]], dim=-1)
    return outputs[..., target] - others.logsumexp(-1), None


def read_tag(outputs: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor | None]:
    """Log odds of the target tag."""
    return outputs[..., head.classes.index(head.target_class) if head.target_class else 0], None


def read_ordinal(outputs: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor | None]:
    """Expected level: the lowest plus every step between levels times the chance of being above it. Outputs are log odds of the K steps."""
    above, values = outputs.sigmoid(), outputs.new_tensor(head.values)
    return values[0] + (above * values.diff()).sum(-1), None


# outputs [..., K] -> the score [...] in its own units, and the standard deviation that the outputs state [...] or None.
READOUTS: Mapping[str, Callable[[Tensor, HeadSpec], tuple[Tensor, Tensor | None]]] = MappingProxyType(
    {
        "value": read_value,
        "gaussian": read_gaussian,
        "distribution": read_distribution,
        "class": read_class,
        "tag": read_tag,
        "ordinal": read_ordinal,
    }
)


def score_and_uncertainty(outputs: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor]:
    """Outputs [B, members, K] to the score [B] and its standard deviation [B], float32.

    The variance is the members' mean variance plus the variance of their means (Lakshminarayanan et al., arXiv 1612.01474);
    0 where there is one member and it states none.
    """
    scores, stated = READOUTS[head.readout](outputs.float(), head)  # [B, members]
    if stated is None and scores.shape[1] == 1:  # not the root of a constant 0, whose gradient is not a number
        return scores.mean(1), torch.zeros_like(scores[:, 0])
    variance = scores.var(1, correction=0)
    if stated is not None:
        variance = variance + stated.square().mean(1)
    return scores.mean(1), variance.clamp_min(0).sqrt()
