"""--network_args of networks.lora, and the dropouts among them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import UserError

NETWORK_ARGS = ("conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout")


def rank_option(option: str, value: float) -> int:
    if value < 1 or value != int(value):
        raise UserError(f"{option} is {value}: it is a rank, a whole number from 1 up")
    return int(value)


def network_args(kwargs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in --network_args, whose values are strings. Raises UserError for an unknown name, with the nearest known one."""
    numbers = {}
    for key, value in kwargs.items():
        if key not in NETWORK_ARGS:
            nearest = difflib.get_close_matches(key, NETWORK_ARGS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(NETWORK_ARGS)}"
            raise UserError(f"network_args: {key} is not an option of networks.lora; {hint}")
        if value is None:
            continue
        try:
            numbers[key] = float(value)
        except ValueError:
            raise UserError(f"network_args: {key}={value} is not a number; write for example {key}=4") from None
    return numbers


@dataclass(frozen=True)
class Dropouts:
    """Probabilities in training, from 0 to below 1; None for none.

    Attributes:
        neuron: of each value between down and up.
        rank: of each of the rank's channels, for a whole row.
        module: of the branch as a whole, in one call.
    """

    neuron: float | None = None
    rank: float | None = None
    module: float | None = None

    @classmethod
    def of(cls, numbers: Mapping[str, float], neuron_dropout: float | None) -> "Dropouts":
        """From --network_args and --network_dropout. Raises UserError where both name the neurons' dropout."""
        if neuron_dropout is not None and "dropout" in numbers:
            raise UserError("network_dropout and dropout in network_args are two names of one setting; leave one of them out")
        neuron = numbers.get("dropout") if neuron_dropout is None else neuron_dropout
        return cls(neuron, numbers.get("rank_dropout"), numbers.get("module_dropout"))

    def __post_init__(self) -> None:
        for name, probability in vars(self).items():
            if probability is not None and not 0 <= probability < 1:
                raise UserError(f"{name}_dropout is {probability}: it is a probability, from 0 to below 1")
