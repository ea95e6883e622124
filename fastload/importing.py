"""How long imports take, and whose: a finder that times the modules which the other finders find."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

from .phases import Intervals


@dataclass(frozen=True, slots=True)
class Import:
    """One module as it was executed, with all that it imported.

    Attributes:
        start_s: CLOCK_MONOTONIC.
        depth: How many other imports of the same thread it was in.
        thread: Ident.
    """

    name: str
    start_s: float
    stop_s: float
    depth: int
    thread: int


class ImportTimes:
    """Times every module that is imported while the block runs. Thread-safe; a context manager.

    Built-in and frozen modules are not timed: their loaders are shared, and they take no time.

    Attributes:
        busy: When any thread was importing.
        modules: Every import that took a millisecond or more, in the order in which they ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._local = threading.local()
        self._lock = threading.Lock()
        self.busy = Intervals()
        self.modules: list[Import] = []

    def __enter__(self) -> ImportTimes:
        sys.meta_path.insert(0, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the finders behind this one find, with a loader that will be timed."""
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                self._time(spec)
                return spec
        return None

    def packages(self) -> list[tuple[str, float]]:
        """Return (top-level package, seconds) of what was imported, with what each imported first, slowest first."""
        seconds: dict[str, float] = {}
        for package, spans in self._spans().items():
            seconds[package] = spans.seconds
        return sorted(seconds.items(), key=lambda pair: -pair[1])

    def _spans(self) -> dict[str, Intervals]:
        spans: dict[str, Intervals] = {}
        with self._lock:
            modules = tuple(self.modules)
        for module in modules:
            spans.setdefault(module.name.partition(".")[0], Intervals()).add(module.start_s, module.stop_s)
        return spans

    def _time(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        if isinstance(loader, type) or not hasattr(loader, "__dict__") or not hasattr(loader, "exec_module"):
            return
        name, execute = spec.name, loader.exec_module

        def timed(module: ModuleType) -> None:
            loader.__dict__.pop("exec_module", None)  # the loader stays with the module, as it was
            with self._timed(name):
                execute(module)

        loader.exec_module = timed

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        depth = getattr(self._local, "depth", 0)
        self._local.depth = depth + 1
        started_s = self._clock()
        try:
            yield
        finally:
            self._local.depth = depth
            stopped_s = self._clock()
            with self._lock:
                if not depth:
                    self.busy.add(started_s, stopped_s)
                if stopped_s - started_s >= 0.001:
                    self.modules.append(Import(name, started_s, stopped_s, depth, threading.get_ident()))
