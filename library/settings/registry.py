"""A table of parts by name, filled by the parts themselves: a file declares its part, and every list of names is read from the table.

    SOLVERS: Registry[Solver] = Registry("sampler")
    SOLVERS.register("ddim")(Solver(...))

    ESTIMATORS: Registry[type[Estimator]] = Registry("score_estimator", "library.objectives.estimators", noun="estimator")

    @ESTIMATORS.register("prev")
    class PrevEstimator(Estimator): ...

An option takes the table as its `choices`, so a new part is a new file and no second list.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from library.errors import UserError
from library.settings.option_values import did_you_mean

T = TypeVar("T")
EntryT = TypeVar("EntryT")


class Registry(Mapping[str, T], Generic[T]):
    """Parts by name. Looking up a name that nobody registered raises UserError, which names the nearest known one.

    Args:
        kind: the setting that takes one of the names, e.g. "score_estimator".
        package: the package in whose modules the parts stand. All of them are imported at the first look-up, but those whose name begins
            with an underscore; None: the parts are registered where the table is, or by the modules that it is imported with.
        noun: what a part is called in an error; None: `kind`, with blanks for underscores.
        named_after_modules: every module of the package holds one part of its own name. Then names cost no import, and a look-up imports
            one module: for parts that need heavy packages.
    """

    def __init__(self, kind: str, package: str | None = None, noun: str | None = None, *, named_after_modules: bool = False) -> None:
        self.kind = kind
        self._package = package
        self._noun = noun or kind.replace("_", " ")
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}
        self._named_after_modules = named_after_modules
        self._complete = package is None or named_after_modules

    def register(self, name: str) -> Callable[[EntryT], EntryT]:
        """A decorator that enters a class or a function, or a function to be called with any other object, under `name`."""
        module = sys._getframe(1).f_globals["__name__"]

        def enter(entry: EntryT) -> EntryT:
            assert name not in self._entries or self._modules[name] == module, f"two {self._noun}s are called {name}"
            self._entries[name], self._modules[name] = entry, module  # type: ignore[assignment]
            return entry

        return enter

    @property
    def names(self) -> tuple[str, ...]:
        """In order of registration; of a package: module after module, by their names, whichever was imported first."""
        self._import_package()
        if self._package is None:
            return tuple(self._entries)
        modules = {name: f"{self._package}.{name}" for name in self._module_names()} if self._named_after_modules else {}
        modules |= self._modules
        return tuple(sorted(modules, key=lambda name: modules[name]))

    def __getitem__(self, name: str) -> T:
        self._import_package()
        if self._named_after_modules and name not in self._entries and name in self._module_names():
            importlib.import_module(f"{self._package}.{name}")
        if name not in self._entries:
            known = self.names
            raise UserError(f"there is no {self._noun} {name!r}; {self.kind} is one of {', '.join(known)}{did_you_mean(str(name), known)}")
        return self._entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.names else default

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _module_names(self) -> list[str]:
        assert self._package is not None
        found = pkgutil.iter_modules(importlib.import_module(self._package).__path__)
        return sorted(module.name for module in found if not module.name.startswith("_"))

    def _import_package(self) -> None:
        if self._complete or self._package is None:
            return
        self._complete = True  # a module that looks up a name while it is imported finds those that were registered before it
        try:
            for name in self._module_names():
                importlib.import_module(f"{self._package}.{name}")
        except BaseException:
            self._complete = False
            raise
