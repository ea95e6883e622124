"""When a process was busy importing, whoever asked for the import."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class ImportClock:
    """Notes when modules run for the first time; a meta path finder that finds what the standard one finds.

    Attributes:
        intervals: Start and stop of every import that no other import of its thread caused, CLOCK_MONOTONIC.
    """

    def __init__(self) -> None:
        self.intervals: list[tuple[float, float]] = []
        self._depth = threading.local()

    def install(self) -> ImportClock:
        """Watch all imports of this process from now on."""
        sys.meta_path.insert(0, self)
        return self

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Part of the protocol of ``sys.meta_path``."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader: Any = spec.loader
            loader.exec_module = self._timed(loader.exec_module)
        return spec

    def _timed(self, run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def timed(module: ModuleType) -> None:
            depth = getattr(self._depth, "value", 0)
            self._depth.value = depth + 1
            started_s = time.monotonic()
            try:
                run(module)
            finally:
                self._depth.value = depth
                if not depth:
                    self.intervals.append((started_s, time.monotonic()))

        return timed
