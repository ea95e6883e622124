"""The modules of a real wheel that define an interface, with stand-ins for all that they import and no test needs.

vLLM and SGLang cannot be imported where there is no GPU of theirs. What a plugin meets is a handful of their modules:
those are imported from the wheel as they are, and every other module of the package is a stand-in.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def find_wheel(name: str) -> Path:
    """Return the wheel of *name* in the folder that tox has filled; skips the test where there is none."""
    folder = Path(os.environ.get("TESTED_WHEELS", "nowhere"))
    found = sorted(folder.glob(f"{name}-*.whl"))
    if not found:
        pytest.skip(f"no wheel of {name} (tox -e {name})")
    return found[-1]


class _Meta(type):
    """What a class of a stand-in module can be asked: anything."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn

    def __or__(cls, other: Any) -> Any:
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls


class StandIn(metaclass=_Meta):
    """Stands in for a class, a function or a value that is imported and not used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else StandIn()

    def __bool__(self) -> bool:
        return False


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, wheel: Path, real: Sequence[str], given: Mapping[str, Mapping[str, Any]]) -> None:
        self._package, self._wheel, self._real, self._given = package, wheel, set(real), given

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self._package or name in self._real:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = [str(self._wheel.joinpath(*spec.name.split(".")))]
        vars(module).update(self._given.get(spec.name, {}))

        def stand_in(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            full = f"{spec.name}.{name}"
            return importlib.import_module(full) if full in self._real else StandIn

        module.__getattr__ = stand_in  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def imported(package: str, real: Sequence[str], given: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """Let *package* be imported for the length of the block.

    Args:
        real: Modules that come from the wheel as they are.
        given: What some of the stand-ins hold.
    """
    wheel = find_wheel(package)
    finder = _Finder(package, wheel, real, given)
    before = dict(sys.modules)
    sys.path.insert(0, str(wheel))
    sys.meta_path.insert(0, finder)
    try:
        yield wheel
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(wheel))
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in (package, f"fastload_{package}"):
                del sys.modules[name]
