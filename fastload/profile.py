"""Where the time of a load, and of the cold start around it, went.

    with fastload.profile() as p:
        model = fastload.load("org/model")
    print(p)

A phase is *busy* while it works. What it was busy with while another phase was busy too, or before the load was asked
for, is *hidden*; the rest is *uncovered*: seconds of the load that making this phase faster would save. A build is not
busy while it waits for bytes.

This module is callable: ``fastload.profile()`` is :func:`profile` whether or not the module has been imported.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from .coldstart import ColdStart, partition, process_started_s
from .importing import ImportTimes
from .measured import Profile as Profile


class Profiles:
    """The profiles of all loads that began while a :func:`profile` block was open. Thread-safe.

    Attributes:
        loads: In the order in which they began; a load that is still running goes on filling its profile.
        imports: What was imported inside the block; ``None`` unless that is timed.
        keeps_events: Whether the loads keep their events, which traces are made of.
    """

    def __init__(self, *, events: bool = False, imports: ImportTimes | None = None) -> None:
        self.loads: list[Profile] = []
        self.imports = imports
        self.keeps_events = events
        self._began_s = time.monotonic()

    def __str__(self) -> str:
        return "\n".join(str(load) for load in tuple(self.loads)) or "no load"

    @property
    def cold_start(self) -> ColdStart:
        """From the start of this process to the end of its last load (to now, without one), shared out among the phases."""
        return partition(
            tuple(self.loads),
            started_s=process_started_s(),
            began_s=self._began_s,
            now_s=time.monotonic(),
            imports=() if self.imports is None else tuple(self.imports.busy),
        )

    def to_record(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {"loads": [load.to_record() for load in tuple(self.loads)], "cold_start": self.cold_start.to_record()}


_open: list[Profiles] = []
_open_lock = threading.Lock()


def begin(source: str) -> Profile:
    """Return the profile of a load that begins now; every open :func:`profile` block gets it too.

    The loader calls this once a load and hands the profile's :meth:`~Profile.observe` all events of that load.
    """
    with _open_lock:
        made = Profile(source, keep=any(collection.keeps_events for collection in _open))
        for collection in _open:
            collection.loads.append(made)
    return made


@contextmanager
def profile(*, events: bool = False, imports: bool = False) -> Iterator[Profiles]:
    """Collect the profiles of all loads of this process that begin inside the block, in any thread.

    Blocks may be nested, and open in several threads at once: each gets every load.

    Args:
        events: Keep every event too, for traces and waterfalls with files: some hundred bytes for each range of 8 MiB.
        imports: Time the imports inside the block, which otherwise show as time that nobody accounts for.
    """
    timed = ImportTimes() if imports else None
    collection = Profiles(events=events, imports=timed)
    with _open_lock:
        _open.append(collection)
    try:
        if timed is None:
            yield collection
        else:
            with timed:
                yield collection
    finally:
        with _open_lock:
            # By identity: two empty collections are not the same one.
            _open[:] = [c for c in _open if c is not collection]


class _CallableModule(ModuleType):
    def __call__(self, *, events: bool = False, imports: bool = False) -> AbstractContextManager[Profiles]:
        return profile(events=events, imports=imports)


sys.modules[__name__].__class__ = _CallableModule
