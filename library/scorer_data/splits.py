"""Which rated pictures are validated with."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assign_folds(names: Sequence[str], targets: Tensor | None, number: int, seed: int) -> Tensor:
    """The fold 0 to number - 1 of each picture [N]; those of one name are in one fold.

    Args:
        targets: [N], in whose order the pictures are dealt out, so that each fold has its share of high and low ones; None for no order.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    group = torch.tensor([numbers[name] for name in names])
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(numbers), generator=rng)
    if targets is not None:
        of_group = torch.zeros(len(numbers), dtype=torch.float64).scatter(0, group, targets.double())
        order = order[of_group[order].argsort(stable=True)]
    folds = torch.empty(len(numbers), dtype=torch.int64)
    for dealt in order.split(number):
        folds[dealt] = torch.randperm(number, generator=rng)[: len(dealt)]
    return folds[group]
