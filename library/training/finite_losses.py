"""What to do about losses that are not finite."""

import torch
from torch import Tensor, nn


class LastGood:
    """A copy of the weights, on their device, that last gave a finite loss.

    Attributes:
        step: after how many updates that was.
    """

    def __init__(self) -> None:
        self.step = 0
        self._weights: list[Tensor] = []

    @torch.no_grad()
    def keep(self, step: int, network: nn.Module) -> None:
        own = [weight.detach() for weight in network.parameters()]
        if self._weights:
            torch._foreach_copy_(self._weights, own)
        else:
            self._weights = [weight.clone() for weight in own]
        self.step = step

    @torch.no_grad()
    def restore(self, network: nn.Module) -> None:
        torch._foreach_copy_([weight.detach() for weight in network.parameters()], self._weights)
