"""Progress of a load on stderr, for the command line: bars on a terminal, a line every 10 s elsewhere.

The library itself never prints: whoever wants this passes it on::

    with shown("org/model") as observer:
        fastload.prefetch("org/model", observers=[observer])
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ..events import Event, Observer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Between two lines where there is no terminal (the rule of the command line).
LINE_S = 10.0


@contextmanager
def shown(title: str, *, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Observer]:
    """Show the progress of one load while the block runs; yields the observer to pass to the load.

    Args:
        title: What stands before the total.
        quiet: Show nothing.
        stream: Where to write; stderr.
    """
    out = sys.stderr if stream is None else stream
    if quiet:
        yield _silent
    elif out.isatty():
        with Bars(title, out) as bars:
            yield bars
    else:
        with Lines(title, out) as lines:
            yield lines


def _silent(event: Event) -> None:
    pass


class Tally:
    """What has arrived of each file: a fold over events. Not thread-safe.

    Attributes:
        sizes: Bytes of each file that is delivered.
        landed: Bytes of it that are there, from the cache or the network.
        done: Files that are verified and under their names.
        total_bytes: Of all files.
        landed_bytes: Of all files.
        travelled_bytes: What came over the network.
        retries: Attempts at ranges that failed.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.landed: dict[str, int] = {}
        self.done: set[str] = set()
        self.total_bytes = 0
        self.landed_bytes = 0
        self.travelled_bytes = 0
        self.retries = 0

    def observe(self, event: Event) -> None:
        """Take in one event."""
        file, data = event.file, event.data
        if event.name == "range.retried":
            self.retries += 1
        if file is None:
            return
        if event.name == "file.planned":
            self._plan(file, data["bytes"], data.get("state"))
        elif event.name == "range.landed":
            count = data["stop"] - data["start"]
            self.travelled_bytes += count
            self._set(file, min(self.landed.get(file, 0) + count, self.sizes.get(file, count)))
        elif event.name == "file.refetched":
            self._set(file, 0)
        elif event.name == "file.verified":
            self._set(file, self.sizes.get(file, 0))  # with what an earlier process left behind
            self.done.add(file)

    def _plan(self, file: str, count: int, state: str | None) -> None:
        if file in self.sizes and state == "partial":  # told again, now with what an earlier process left of it
            self._set(file, count)
            return
        self.total_bytes += count - self.sizes.get(file, 0)
        self.sizes[file] = count
        if state == "cached":
            self._set(file, count)
            self.done.add(file)

    def _set(self, file: str, count: int) -> None:
        self.landed_bytes += count - self.landed.get(file, 0)
        self.landed[file] = count

    @property
    def in_flight(self) -> list[str]:
        """Files of which a part has arrived, in the order of the plan."""
        return [f for f, count in self.landed.items() if count and f not in self.done]


class Lines:
    """An observer that writes one plain line every :data:`LINE_S` seconds, also while nothing arrives. Thread-safe.

    Args:
        title: What stands at the start of each line.
        out: Where to write.
        clock: Seconds; injected by tests.
        wait: Waits for so many seconds and tells whether to stop; injected by tests.
    """

    def __init__(
        self,
        title: str,
        out: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._title = title
        self._out = out
        self._clock = clock
        self._stop = threading.Event()
        self._wait = self._stop.wait if wait is None else wait
        self._lock = threading.Lock()
        self._tally = Tally()
        self._before = (clock(), 0)
        self._thread = threading.Thread(target=self.run, name="fastload-progress", daemon=True)

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._tally.observe(event)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def run(self) -> None:
        """Write lines until told to stop; the body of the thread."""
        while not self._wait(LINE_S):
            try:
                self._out.write(self.line() + "\n")
                self._out.flush()
            except (OSError, ValueError):  # nobody reads any more: no reason to end the load
                return

    def line(self) -> str:
        """Return how far it is, and the rate since the last line."""
        with self._lock:
            now_s, travelled = self._clock(), self._tally.travelled_bytes
            before_s, before = self._before
            self._before = (now_s, travelled)
            landed, total, retries = self._tally.landed_bytes, self._tally.total_bytes, self._tally.retries
            flying = self._tally.in_flight
        if not total:
            return f"{self._title}: asking for the list of files"
        rate = (travelled - before) / (now_s - before_s) if now_s > before_s else 0.0
        parts = [f"{landed / 1e6:.1f} of {total / 1e6:.1f} MB ({100 * landed // total} %)", f"{rate / 1e9:.3f} GB/s"]
        if rate > 0:
            parts.append(f"{(total - landed) / rate:.0f} s left")
        if retries:
            parts.append(f"{retries} retries")
        if flying:
            parts.append(", ".join(flying))
        return f"{self._title}: {' · '.join(parts)}"


class Bars:
    """An observer that draws a bar for the total and one for each file in flight. Thread-safe.

    Args:
        title: What stands before the total.
        out: A terminal.
    """

    def __init__(self, title: str, out: TextIO) -> None:
        self._progress = _rich_progress(out)
        self._lock = threading.Lock()
        self._tally = Tally()
        self._total = self._progress.add_task(title, total=None)
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            for row in self._rows.values():
                self._progress.remove_task(row)
            self._rows.clear()
            self._progress.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            tally, file = self._tally, event.file
            tally.observe(event)
            if file is None:
                return
            if event.name == "file.planned":
                # A reset forgets the rate: what the cache holds did not travel.
                self._progress.reset(self._total, total=tally.total_bytes, completed=tally.landed_bytes)
            elif event.name in ("range.landed", "file.refetched", "file.verified"):
                self._progress.update(self._total, completed=tally.landed_bytes)
                self._draw(file)

    def _draw(self, file: str) -> None:
        if file in self._tally.done:
            if file in self._rows:
                self._progress.remove_task(self._rows.pop(file))
            return
        if file not in self._rows:
            self._rows[file] = self._progress.add_task(file, total=self._tally.sizes.get(file))
        self._progress.update(self._rows[file], completed=self._tally.landed.get(file, 0))


def _rich_progress(out: TextIO) -> Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(file=out),
    )
