"""A transfer driven by hand: a folder of files "arrives" in a cache, range by range, as the test says.

It does what the engine does on disk (partial file, journal, publishing) and tells it in the engine's messages.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastload.errors import FastloadError, to_record
from fastload.journal import Journal, State
from fastload.transfer import Transfer
from fastload.types import ByteRange

COMMIT = "c0ffee" + "0" * 34


class Arrival:
    """The files of *folder*, arriving as ``org/model`` at :data:`COMMIT` in the cache *cache*.

    Small files are there at once; weight files (``*.safetensors``, or *weights*) only as far as :meth:`land` says.
    """

    def __init__(
        self, folder: Path, cache: Path, *, weights: Iterable[str] | None = None, announce: bool = True,
        block_bytes: int = 4096, source: str = "org/model",
    ) -> None:  # fmt: skip
        self.folder = folder
        self.block_bytes = block_bytes
        self.repo = cache / ("models--" + source.replace("/", "--"))
        self.snapshot = self.repo / "snapshots" / COMMIT
        self.transfer = Transfer()
        self.journals: dict[str, Journal] = {}
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        self.weights = [n for n in names if n.endswith(".safetensors")] if weights is None else list(weights)
        (self.repo / "blobs").mkdir(parents=True)
        (self.repo / "refs").mkdir()
        (self.repo / "refs" / "main").write_text(COMMIT)
        self.snapshot.mkdir(parents=True)
        self.tell(
            "manifest", path=str(self.snapshot), source=source, revision="main", commit=COMMIT, endpoint="",
            weights=self.weights,
            files=[{"path": n, "size": (folder / n).stat().st_size, "digest": None} for n in names],
        )  # fmt: skip
        for name in names:
            if name not in self.weights:
                self._publish(name, (folder / name).read_bytes())
            elif announce:
                self.announce(name)

    def tell(self, kind: str, **rest: Any) -> None:
        """Hand one message to the transfer."""
        self.transfer.apply({"kind": kind, **rest})

    def _blob(self, name: str) -> Path:
        return self.repo / "blobs" / name.replace("/", "--")

    def announce(self, name: str) -> None:
        """Make the empty partial file and its journal."""
        data, journal = f"{self._blob(name)}.partial", f"{self._blob(name)}.journal"
        size = (self.folder / name).stat().st_size
        with open(data, "wb") as f:
            f.truncate(size)
        fd = os.open(journal, os.O_RDWR | os.O_CREAT)
        self.journals[name] = Journal.create(fd, size=size, digest="", block_bytes=self.block_bytes)
        self.tell("arriving", file=name, data=data, journal=journal)

    def land(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let the blocks that *start* to *stop* (default: the end) touch land, the first 8 bytes in the journal."""
        data = (self.folder / name).read_bytes()
        journal = self.journals[name]
        start -= start % self.block_bytes
        stop = len(data) if stop is None else min(-(-stop // self.block_bytes) * self.block_bytes, len(data))
        with open(f"{self._blob(name)}.partial", "r+b") as f:
            f.seek(max(start, 8))
            f.write(data[max(start, 8) : stop])
        if start == 0:
            journal.set_head(data[:8])
        journal.mark(ByteRange(start, stop))

    def land_head(self, name: str) -> None:
        """Let the first 64 KiB land, or the header where that is longer."""
        with open(self.folder / name, "rb") as f:
            header = 8 + int.from_bytes(f.read(8), "little")
        self.land(name, 0, min(max(header, 64 * 1024), (self.folder / name).stat().st_size))

    def finish(self, *names: str) -> None:
        """Let the rest of *names* (default: all) land, and publish them."""
        for name in names or self.weights:
            self.land(name)
            partial = Path(f"{self._blob(name)}.partial")
            with open(partial, "r+b") as f:
                f.write((self.folder / name).read_bytes()[:8])
            partial.replace(self._blob(name))
            self.journals[name]._set(24, State.VERIFIED, "<I")
            Path(f"{self._blob(name)}.journal").unlink()
            self._link(name)
            self.tell("ready", file=name, final=str(self.snapshot / name))
        if all(view.ready for view in self.transfer.files.values()):
            self.tell("finished")

    def fail(self, error: FastloadError) -> None:
        """End the transfer early."""
        self.tell("failed", error=to_record(error))

    def _publish(self, name: str, data: bytes) -> None:
        self._blob(name).write_bytes(data)
        self._link(name)
        self.tell("ready", file=name, final=str(self.snapshot / name))

    def _link(self, name: str) -> None:
        link = self.snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(self._blob(name), link.parent))

    def close(self) -> None:
        """Give everything back."""
        self.transfer.close()
        for journal in self.journals.values():
            journal.close()


def finish_on_demand(arrival: Arrival, ended: threading.Event) -> bool:
    """Finish *arrival* once a reader waits for any of its bytes, or *ended* is set; return whether one did."""
    waited = False
    while not waited and not ended.is_set():
        waited = any(journal.take_demands() for journal in arrival.journals.values())
        os.sched_yield()
    arrival.finish()
    return waited


def demanded(arrival: Arrival, name: str) -> int:
    """Return the offset in *name* that a reader waits for, once one does: the owner's view of a blocked reader."""
    while not (found := arrival.journals[name].take_demands()):
        os.sched_yield()
    return found[0]
