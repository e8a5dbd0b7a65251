"""A user's own Python: objects by name, whether they take prompts, and what becomes of their errors."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from library.errors import UserError


def load_object(name: str, what: str, *, classes: bool = False) -> Callable[..., Any]:
    """Find a function or class by name.

    Args:
        name: `package.module:object`, or `path/to/file.py:object` relative to the working directory.
        what: what it is for, as the first word of messages. classes: whether a class will do, for the message that lists what there is.

    Raises:
        UserError: if there is no such module, file or object.
    """
    where, colon, object_name = name.rpartition(":")  # from the right: a Windows path has a colon of its own
    if not (where and colon and object_name):
        raise UserError(f"{what} {name!r} is not package.module:function or path/to/file.py:function")
    title = f"{what} {name!r}"
    module = _load_file(Path(where), title) if where.endswith(".py") else _import_module(where, title)
    found = getattr(module, object_name, None)
    if not callable(found):
        public = [
            key
            for key, value in vars(module).items()
            if (inspect.isfunction(value) or (classes and inspect.isclass(value))) and value.__module__ == module.__name__
        ]
        raise UserError(f"{title}: {where} has no function {object_name!r}; it has {', '.join(public) or 'none'}")
    return found


def takes_prompts(function: Callable[..., Any], title: str) -> bool:
    """Whether the second argument exists and is needed, or is called `prompts`. Raises UserError if it cannot take pixels alone or both."""
    positional = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = [parameter for parameter in positional if parameter.default is parameter.empty]
    if not positional or len(required) > 2:
        raise UserError(f"{title} takes {len(required)} arguments; it must take (pixels) or (pixels, prompts)")
    return len(required) == 2 or (len(positional) > 1 and positional[1].name == "prompts")


@contextmanager
def users_code(title: str) -> Iterator[None]:
    """Around a call of it. Raises UserError with the place for whatever that raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        at, reason = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())
        raise UserError(f"{title} failed with {type(error).__name__}: {reason} ({at.filename}, line {at.lineno})") from error


def _import_module(dotted: str, title: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        raise UserError(f"{title}: Python finds no module {error.name!r} here; check the name or install it") from error


def _load_file(path: Path, title: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{title}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as import does; a dataclass in the file looks itself up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"{title}: running {path} failed with {type(error).__name__}: {error}") from error
    return module
