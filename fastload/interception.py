"""Standing in for a function of somebody else's module, everywhere at once, and giving it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def rebind(old: Any, new: Any, first: str) -> None:
    """Bind every global name of every module that is bound to *old* to *new*, those of the module *first* before others.

    The module of ours that one of the two was defined in keeps its names.
    """
    ours = {str(getattr(f, "__module__", "")) for f in (old, new)}
    for module in [sys.modules.get(first), *list(sys.modules.values())]:
        try:
            # Not getattr: modules that load their parts on demand must not be woken.
            names = object.__getattribute__(module, "__dict__")
        except AttributeError:
            continue
        if type(names) is not dict:
            continue
        name = str(names.get("__name__"))
        if name.startswith("fastload.") and name in ours:
            continue
        for name, value in list(names.items()):
            if value is old:
                names[name] = new


class AfterImport:
    """Calls *then* with the module *name* as soon as it has been imported: now, if it has been.

    A finder that stands first on ``sys.meta_path`` until it is closed, and that finds nothing itself.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], object]) -> None:
        self._name = name
        self._then = then
        if name in sys.modules:
            then(import_module(name))  # another thread may be importing it: then this waits for that
        else:
            sys.meta_path.insert(0, self)

    def close(self) -> None:
        """Watch no longer. Harmless when repeated."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the finders behind this one find for the module, with a loader that tells when it was executed."""
        if name != self._name:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                self._tell(spec)
                return spec
        return None

    def _tell(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        if isinstance(loader, type) or not hasattr(loader, "__dict__") or not hasattr(loader, "exec_module"):
            return
        execute = loader.exec_module

        def executed(module: ModuleType) -> None:
            loader.__dict__.pop("exec_module", None)  # the loader stays with the module, as it was
            execute(module)
            if self in sys.meta_path:
                self.close()
                self._then(module)

        loader.exec_module = executed
