"""Judges: opinions about pixels, given as a Python function, that are only ever asked and never differentiated through."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from library.errors import UserError


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
            UserError: if the function does not return B finite numbers.
        """
        assert pixels.ndim == 4 and pixels.shape[1] == 3, f"pixels are [B, 3, H, W], not {list(pixels.shape)}"
        if not self.takes_prompts:
            scores = self.function(pixels)
        elif prompts is None:
            raise UserError(f"judge {self.name} takes prompts and these pictures have none; use a judge that takes pixels only")
        else:
            scores = self.function(pixels, list(prompts))
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
    where, colon, function_name = name.rpartition(":")  # from the right: a Windows path has a colon of its own
    if not (where and colon and function_name):
        raise UserError(f"judge {name!r} is not package.module:function or path/to/file.py:function")
    module = _load_file(Path(where), name) if where.endswith(".py") else _import_module(where, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise UserError(f"judge {name!r}: {where} has no function {function_name!r}; it has {', '.join(public) or 'none'}")
    return Judge(name=name, function=function, takes_prompts=_takes_prompts(function, name))


def _import_module(dotted: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        raise UserError(f"judge {name!r}: Python finds no module {error.name!r} here; check the name or install it") from error


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"judge {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"judge_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as import does; a dataclass in the file looks itself up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"judge {name!r}: running {path} failed with {type(error).__name__}: {error}") from error
    return module


def _takes_prompts(function: Callable[..., object], name: str) -> bool:
    """Whether the second argument exists and is needed, or is called `prompts`."""
    positional = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = [parameter for parameter in positional if parameter.default is parameter.empty]
    if not positional or len(required) > 2:
        raise UserError(f"judge {name!r} takes {len(required)} arguments; it must take (pixels) or (pixels, prompts)")
    return len(required) == 2 or (len(positional) > 1 and positional[1].name == "prompts")
