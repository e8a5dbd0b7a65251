"""What to do about losses that are not finite."""

import logging
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.types import LossOutput

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 8  # batches of a term without a finite loss; of a whole run, so many or 1 %


class FiniteLosses:
    """Watches for losses that are NaN or infinite. Too many of them are to end the run.

    A sample that a scorer cannot judge does not count, and the others of its batch do. Where the network itself put out something that
    is not finite, the whole batch does not count: through the gradient of the weights, which the samples share, it would reach all.

    Args:
        num_steps: updates of the run.
        scorers: what is followed, to be named in complaints.
        to_check: what to look at where no loss was finite from the beginning.

    Attributes:
        found: what was not finite, in words, oldest first.
    """

    def __init__(self, num_steps: int, scorers: Sequence[str] = (), to_check: str = "the scorer and the model with --check_reward") -> None:
        self.limit = max(MAX_IN_A_ROW, num_steps // 100)
        self.found: list[str] = []
        self._scorers = f" (scorer {', '.join(scorers)})" if scorers else ""
        self._to_check = to_check
        self._in_a_row: Counter[str] = Counter()
        self._any_finite = False
        self._last_found: int | None = None

    @property
    def none_finite(self) -> bool:
        return bool(self.found) and not self._any_finite

    @property
    def too_many(self) -> bool:
        return len(self.found) > self.limit or max(self._in_a_row.values(), default=0) > MAX_IN_A_ROW

    def check(self, out: LossOutput, step: int, name: str) -> bool:
        """Whether a batch of the term `name` counts; a sample without a finite loss is logged. `step` counts from 0."""
        bad = (~torch.isfinite(out.sample_losses)).nonzero().flatten().tolist()
        if not bad:
            self._in_a_row[name], self._any_finite = 0, True
            return True
        counts = len(bad) < len(out.sample_losses) and bool(torch.isfinite(out.loss))
        self._any_finite |= counts
        blamed = [scorer for scorer, rows in out.unscored.items() if rows[bad[0]]]
        followed = f" (scorer {', '.join(blamed)})" if blamed else self._scorers if out.promised is not None else ""
        ignored = "this batch does" if not counts else "this sample does" if len(bad) == 1 else f"{len(bad)} samples do"
        self._add(f"the {name} loss of {out.samples[bad[0]]}{followed}", name, step, ignored)
        return counts

    def check_gradient(self, norm: Tensor | float, step: int) -> bool:
        """Whether the norm of an update's gradient is finite."""
        if finite := math.isfinite(norm):
            self._in_a_row["gradient"] = 0
        else:
            self._add("the norm of the gradient", "gradient", step, "this batch does")
        return finite

    def all_finite(self, step: int) -> bool:
        """Whether nothing was found at this step."""
        return self._last_found != step

    def complaint(self, saved: str) -> UserError:
        """The error that ends the run; `saved` says what is left of it."""
        advice = "lower learning_rate, or use mixed_precision bf16 or no"
        if not self._any_finite:
            advice = f"check {self._to_check}, or use mixed_precision bf16 or no"
        return UserError(f"{self.found[0]} was not finite, nor were {len(self.found) - 1} more, so training stopped{saved}; {advice}")

    def _add(self, what: str, name: str, step: int, ignored: str) -> None:
        self.found.append(f"step {step + 1}: {what}")
        self._in_a_row[name] += 1
        self._last_found = step
        logger.warning("%s is not finite, so %s not count", self.found[-1], ignored)


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
