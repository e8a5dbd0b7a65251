"""The criteria there are. To add one: write a `Criterion` and add it here."""

from collections.abc import Mapping
from types import MappingProxyType

from library.scorer_training.criteria.base import Criterion
from library.scorer_training.criteria.classification import AsymmetricMultilabel, Classification, Multilabel
from library.scorer_training.criteria.distribution import EarthMovers
from library.scorer_training.criteria.masked import MaskedCells
from library.scorer_training.criteria.ordinal import Ordinal
from library.scorer_training.criteria.preference import Pairwise, Ranking
from library.scorer_training.criteria.regression import GaussianLikelihood, HuberError, SquaredError

CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        criterion.name: criterion
        for criterion in (
            SquaredError(),
            HuberError(),
            GaussianLikelihood(),
            Ordinal(),
            Ranking(),
            EarthMovers(),
            Classification(),
            Multilabel(),
            AsymmetricMultilabel(),
            Pairwise(),
        )
    }
)


PRETRAINING_CRITERIA: Mapping[str, Criterion] = MappingProxyType({**CRITERIA, MaskedCells.name: MaskedCells()})


def get_criterion(name: str) -> Criterion:
    """A criterion of training or of pretraining."""
    return PRETRAINING_CRITERIA[name]


def criteria_of(target: str) -> tuple[str, ...]:
    """Names of the criteria that learn this column."""
    return tuple(name for name, criterion in CRITERIA.items() if criterion.target == target)
