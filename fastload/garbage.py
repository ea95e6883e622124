"""Rare garbage collections while a program starts: each looks at all that imports have made, and finds nothing to collect.

Measured (2 cores, CPython 3.11, ``import torch, transformers`` and a model class; medians of 6): 4.9 CPU-s with the
interpreter's thresholds, 4.3 with these, 4.2 with no collection at all.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # typing's own costs its import, and this runs in the first moments of a program
if TYPE_CHECKING:
    from typing import Any

#: Measured: from 300,000 on, the first threshold makes no difference to imports. What it lets pile up are objects that refer
#: to each other in circles, of some hundred bytes each; what they alone keep alive goes with them.
_RARE = (300_000, 50, 1_000)
#: Guessed: a program that has loaded nothing after this long is not starting any more.
_LONGEST_S = 120.0


class Rarely:
    """Raises the thresholds of the process's collector for a while. Thread-safe; nested spans end with the first one.

    A program that sets thresholds of its own meanwhile keeps those. One that turned the collector off finds it off.

    Args:
        clock: Seconds; injected by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()  # a collection inside it may end a load that was forgotten, and that calls end()
        self._before: tuple[int, int, int] | None = None
        self._until_s = 0.0

    def begin(self) -> None:
        """Collect rarely from now on; harmless when repeated."""
        with self._lock:
            self._until_s = self._clock() + _LONGEST_S
            if self._before is None:
                before = gc.get_threshold()
                if before[0] == 0 or before >= _RARE:  # never, or as rarely: the program has its reasons
                    return
                gc.callbacks.append(self._collected)
                self._before = before
                gc.set_threshold(*_RARE)

    def end(self, *, failed: bool = False) -> None:
        """Let the interpreter collect as the program had it; harmless when repeated.

        What is there grows old at once: or else the next collection, this call's, would look at all that imports have made.
        Garbage among it waits for a collection of everything, which comes when a quarter as much again has grown old.

        Args:
            failed: What had been built when an error ended the load is garbage, and large: nothing grows old.
        """
        with self._lock:
            if self._before is not None and not failed and gc.get_freeze_count() == 0:  # else somebody's own would thaw
                gc.freeze()
                gc.unfreeze()  # into the oldest generation; neither looks at an object
            self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            if gc.get_threshold() == _RARE:
                gc.set_threshold(*self._before)
            self._before = None
            with suppress(ValueError):  # somebody has emptied the list
                gc.callbacks.remove(self._collected)

    def _collected(self, phase: str, info: Mapping[str, Any]) -> None:
        """Runs with each collection, in whatever thread and at whatever line that is: it must not wait for anything."""
        if phase == "stop" and self._clock() >= self._until_s and self._lock.acquire(blocking=False):
            try:
                self._restore()
            finally:
                self._lock.release()

    @contextmanager
    def during(self, wanted: bool = True) -> Iterator[None]:
        """Collect rarely inside the block, if that is *wanted*; what began before ends with it."""
        if wanted:
            self.begin()
        try:
            yield
        finally:
            self.end()

    def forked(self) -> None:
        """In a child process: nobody there will say that its start is over."""
        self._lock = threading.RLock()
        self._restore()


rarely = Rarely()
os.register_at_fork(after_in_child=rarely.forked)
