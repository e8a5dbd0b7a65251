"""Judges: opinions about pixels, given as a Python function, that are only ever asked and never differentiated through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from library.scorers.python_objects import load_object, takes_prompts, users_code


@dataclass(frozen=True)
class Judge:
    """A function of pixels, and of prompts if it takes them.

    Attributes:
        name: as the user wrote it, `module:function` or `file.py:function`.
        function: `function(pixels)` or `function(pixels, prompts)`.
        takes_prompts: which of the two.
    """

    name: str
    function: Callable[..., object]
    takes_prompts: bool

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Judge pictures.

        Args:
            pixels: [B, 3, H, W] in 0..1.
            prompts: the B prompts; needed by judges that take them.

        Returns:
            Scores [B], float32, on the pixels' device; higher is better.

        Raises:
            UserError: if the function fails, or does not return B finite numbers.
        """
        assert pixels.ndim == 4 and pixels.shape[1] == 3, f"pixels are [B, 3, H, W], not {list(pixels.shape)}"
        if self.takes_prompts and prompts is None:
            raise UserError(f"judge {self.name} takes prompts and these pictures have none; use a judge that takes pixels only")
        with users_code(f"judge {self.name}"):
            scores = self.function(pixels, list(prompts)) if self.takes_prompts and prompts is not None else self.function(pixels)
        if not isinstance(scores, Tensor) or scores.shape != pixels.shape[:1]:
            returned = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(
                f"judge {self.name} returned {returned} for {pixels.shape[0]} pictures; "
                f"it must return a tensor [{pixels.shape[0]}], one number for each"
            )
        scores = scores.to(pixels.device, torch.float32)
        if not scores.isfinite().all():
            raise UserError(f"judge {self.name} returned NaN or infinity; it must return finite numbers for pixels in 0..1")
        return scores


def load_judge(name: str) -> Judge:
    """Find a judge by name.

    Args:
        name: `package.module:function`, or `path/to/file.py:function` relative to the working directory.

    Raises:
        UserError: if there is no such module, file or function, or it cannot take pixels.
    """
    function = load_object(name, "judge")
    return Judge(name=name, function=function, takes_prompts=takes_prompts(function, f"judge {name!r}"))
