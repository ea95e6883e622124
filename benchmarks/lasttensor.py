"""When the usual way took its last tensor from a file: what it does after that, it does after our last byte too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastload.interception import Rebound


class _Clock:
    """The moment of the last read, CLOCK_MONOTONIC; 0 before the first one."""

    def __init__(self) -> None:
        self.last_s = 0.0

    def reading(self, function: Any) -> Any:
        """Return *function*, after each call of which the clock is set."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            finally:
                self.last_s = time.monotonic()

        return timed


class _Slice:
    def __init__(self, real: Any, clock: _Clock) -> None:
        self._real, self._clock = real, clock

    def __getitem__(self, index: Any) -> Any:
        return self._clock.reading(self._real.__getitem__)(index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _File:
    def __init__(self, real: Any, clock: _Clock) -> None:
        self._real, self._clock = real, clock

    def __enter__(self) -> _File:
        self._real.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._real.__exit__(*error)

    def get_tensor(self, name: str) -> Any:
        return self._clock.reading(self._real.get_tensor)(name)

    def get_tensors(self) -> Any:
        return self._clock.reading(self._real.get_tensors)()

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._real.get_slice(name), self._clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextmanager
def watched() -> Iterator[_Clock]:
    """Note each read of a tensor from a safetensors file, and each pickled file that torch has read, inside the block."""
    import safetensors
    import torch

    clock, real_open, real_load = _Clock(), safetensors.safe_open, torch.load

    def opened(*args: Any, **kwargs: Any) -> _File:
        return _File(real_open(*args, **kwargs), clock)

    rebound = [Rebound(real_open, opened, "safetensors"), Rebound(real_load, clock.reading(real_load), "torch")]
    try:
        yield clock
    finally:
        for one in rebound:
            one.give_back()
