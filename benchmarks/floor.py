"""What one stage of a load takes when nothing else is done: the parts of the floor that loads are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .rivals import Delivered

Task = TypeVar("Task")


def spread(work: Callable[[Task], None], tasks: Sequence[Task], threads: int) -> Delivered:
    """Do *work* on all *tasks* in *threads*, and tell the seconds and the CPU seconds of just that."""
    with ThreadPoolExecutor(threads) as pool:
        used_s, started_s = time.process_time(), time.monotonic()
        for _ in pool.map(work, tasks):
            pass
        seconds, cpu_s = time.monotonic() - started_s, time.process_time() - used_s
    return Delivered(told={"stage_s": seconds, "stage_cpu_s": cpu_s})
