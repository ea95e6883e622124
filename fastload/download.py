"""One file on its way: partial file, journal, hash, publication. The engine decides; this does, off the loop.

Order of things that a crash may cut anywhere: bytes are written before the journal calls them landed; the digest is
checked before the first 8 bytes are put in place; those before the file gets its final name; that before the journal goes.
"""

from __future__ import annotations

import json
import mmap
import os
from asyncio import Event, Future
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .cache import RepoCache
from .digest import Hasher
from .disk import translated
from .errors import CacheError, FastloadError, MirrorError, to_record
from .journal import BLOCK_BYTES, Journal, State
from .plan import split
from .types import ByteRange, Digest, RemoteFile

#: What of a file is hidden in the journal until it is verified, so that a reader that goes round us fails loudly.
HEAD_BYTES = 8
#: Measured: hashing pieces of 4 MiB and more costs nothing extra; this bounds how long a cancelled load still hashes.
_HASH_WINDOW_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the cache found.

    Attributes:
        places: Where each path of the snapshot can be had from, if all can.
        untrusted: Those of these files that nobody of us has hashed since they were last touched.
        owned: This process holds the lock of the blob.
        elsewhere: Another process fetches it, and its journal can be read.
    """

    places: dict[str, Path] | None
    untrusted: tuple[Path, ...]
    owned: bool
    elsewhere: bool


class Download:
    """One blob to be fetched, for every path of the snapshot that shows it.

    The engine's thread keeps the plan (the attributes below); methods marked *threads* block and run elsewhere, of one
    kind one at a time.

    Attributes:
        paths: Relative paths of the snapshot; the first is the one that messages name.
        pending: Ranges that nobody fetches yet, in the order in which they are to be fetched.
        urgent: How many of them, from the left, a reader waits for.
        contributed: Base URLs whose bytes are in the partial file.
        only: After a wrong digest: fetch from this one alone.
        ignores_ranges: Base URLs that answered with the whole file.
        hopeless: Base URLs that will not have it, with what they said.
        streaming: Somebody reads the whole file in one request.
        landing: How many ranges are being written.
        landed: Set when bytes have landed.
        done: Of a small file: what it is published as.
    """

    def __init__(self, file: RemoteFile, digest: Digest, cache: RepoCache, commit: str) -> None:
        self.file = file
        self.digest = digest
        self.paths: list[str] = []
        self.size = file.size
        self.pending: deque[ByteRange] = deque()
        self.urgent = 0
        self.contributed: set[str] = set()
        self._suspects: list[str] | None = None
        self.only: str | None = None
        self.ignores_ranges: set[str] = set()
        self.hopeless: dict[str, MirrorError] = {}
        self.streaming = False
        self.landing = 0
        self.generation = 0
        self.landed = Event()
        self.done: Future[dict[str, Path]] | None = None
        self.range_bytes = BLOCK_BYTES
        self.resumed_bytes = 0
        self._cache = cache
        self._commit = commit
        self._lock_fd: int | None = None
        self._fd = -1
        self.journal: Journal | None = None
        self.hasher = Hasher(digest, file.size)

    @property
    def partial_path(self) -> Path:
        """Where the bytes land."""
        return self._cache.partial_path(self.digest)

    @property
    def journal_path(self) -> Path:
        """Where it is written which have."""
        return self._cache.journal_path(self.digest)

    # -- ownership (threads) -----------------------------------------------------------------------------------------

    def find(self) -> dict[str, Path] | None:
        """Return a complete file, verified or not, for each path; ``None`` unless the cache has them all."""
        found = {path: self._cache.find(self._commit, replace(self.file, path=path)) for path in self.paths}
        places = {path: place for path, place in found.items() if place is not None}
        return places if len(places) == len(found) else None

    def look(self, offline: bool, small_bytes: int) -> Look:
        """See whether the file is there; if not, try to become the one process that fetches it.

        Args:
            small_bytes: A file up to this size is hashed now, which costs no more than to read that somebody did before.
        """
        places = self.find()
        if places is None and not offline and self._lock():
            places = self.find()  # published between the first look and the lock
        distinct = dict.fromkeys(places.values()) if places else {}
        untrusted = tuple(p for p in distinct if not self.is_proven(p, small_bytes))
        owned = self._lock_fd is not None
        return Look(places, untrusted, owned, not owned and places is None and self.journal_path.exists())

    def is_proven(self, path: Path, small_bytes: int) -> bool:
        """Tell whether *path* is known to hold what it should; a file up to *small_bytes* is hashed now."""
        if self.size <= small_bytes:
            return self.hash_file(path) == self.digest
        return self._cache.is_trusted(self.digest, path)

    def _lock(self) -> bool:
        if self._lock_fd is None:
            with translated(self.paths[0], self.size):
                self._lock_fd = self._cache.try_lock(self.digest)
        return self._lock_fd is not None

    def unlock(self) -> None:
        """Let others have it; harmless when repeated."""
        if self._lock_fd is not None:
            self._cache.unlock(self._lock_fd)
            self._lock_fd = None

    def open(self, range_bytes: int) -> None:
        """Open the partial file and its journal, or make them; fill :attr:`pending`. The lock must be held."""
        self.range_bytes = max(BLOCK_BYTES, range_bytes // BLOCK_BYTES * BLOCK_BYTES)
        with translated(self.paths[0], self.size):
            journal = self._resume() or self._begin()
        journal.own()
        self.journal = journal
        self.resumed_bytes = journal.landed_bytes
        if self.resumed_bytes:
            self.contributed.add("an earlier run")
        self.pending = deque(split(journal.missing(), self.range_bytes))

    def _resume(self) -> Journal | None:
        """Return the journal of an earlier process, if it speaks of this file."""
        try:
            journal = Journal.open(self.journal_path)
        except (FileNotFoundError, CacheError):
            return None
        try:
            fd = os.open(self.partial_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            journal.close()
            return None
        whole = os.fstat(fd).st_size == self.size == journal.size and journal.digest == str(self.digest)
        if not whole or journal.block_bytes != BLOCK_BYTES:
            journal.close()
            os.close(fd)
            return None
        self._fd = fd
        return journal

    def _begin(self) -> Journal:
        self._fd = os.open(self.partial_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        # Sparse: measured as fast as preallocating, and no file system emulates it by writing every block.
        os.ftruncate(self._fd, self.size)
        fresh = self.journal_path.with_name(self.journal_path.name + f".{os.getpid()}")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        journal = Journal.create(fd, size=self.size, digest=str(self.digest))
        os.replace(fresh, self.journal_path)  # readers see a whole journal or none
        return journal

    def close(self) -> None:
        """Give descriptors and lock back; what landed stays on disk for the next process."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.unlock()

    # -- landing (threads) -------------------------------------------------------------------------------------------

    def write(self, data: memoryview, start: int) -> None:
        """Put *data* at *start* of the partial file, then call it landed."""
        journal = self._open_journal()
        skip = 0
        if start < HEAD_BYTES:
            skip = HEAD_BYTES - start
            journal.set_head(bytes(data[:skip]))
        with translated(self.paths[0], self.size):
            at, left = start + skip, data[skip:]
            while len(left):
                count = os.pwrite(self._fd, left, at)
                at, left = at + count, left[count:]
        journal.mark(ByteRange(start, start + len(data)))

    def has(self, span: ByteRange) -> bool:
        """Tell whether *span* has landed."""
        return self._open_journal().has(span)

    def _open_journal(self) -> Journal:
        if self.journal is None:
            raise RuntimeError(f"{self.paths[0]} is not open")
        return self.journal

    # -- verifying (threads) -----------------------------------------------------------------------------------------

    def hash_landed(self) -> int:
        """Hash what has landed in order since the last call, up to a window; return how many bytes that was."""
        journal = self._open_journal()
        start = self.hasher.hashed_bytes
        stop = min(journal.prefix_bytes(), start + _HASH_WINDOW_BYTES)
        if stop > start:
            self._hash(self._fd, start, stop, journal.head if start == 0 else None)
            journal.hashed_bytes = stop
        return stop - start

    def hash_file(self, path: Path) -> Digest | None:
        """Hash a complete file of the cache; return ``None`` if it is gone."""
        landing, self.hasher = self.hasher, Hasher(self.digest, self.size)
        try:
            with translated(self.paths[0], self.size, "read from"), open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                for start in range(0, size, _HASH_WINDOW_BYTES):
                    self._hash(f.fileno(), start, min(size, start + _HASH_WINDOW_BYTES), None)
            return self.hasher.actual
        except CacheError as e:
            if isinstance(e.__cause__, FileNotFoundError):
                return None
            raise
        finally:
            self.hasher = landing

    def _hash(self, fd: int, start: int, stop: int, head: bytes | None) -> None:
        """Hash bytes of the page cache in place; mapping a window at a time keeps our memory small."""
        base = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(fd, stop - base, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=base) as window:
            view = memoryview(window)
            try:
                if head is not None:
                    self.hasher.update(head)
                    start += len(head)
                self.hasher.update(view[start - base :])
            finally:
                view.release()

    def blame(self, bases: Sequence[str]) -> bool:
        """After a wrong digest, choose whom to ask alone (:attr:`only`); False when everybody was asked."""
        if self._suspects is None:  # those who had no part in it first
            self._suspects = sorted(bases, key=lambda base: base in self.contributed)
        if not self._suspects:
            return False
        self.only = self._suspects.pop(0)
        self.contributed.clear()
        return True

    def start_over(self) -> None:
        """Throw all bytes away; all ranges are pending again."""
        journal = self._open_journal()
        journal.start_over()
        self.generation += 1
        self.hasher = Hasher(self.digest, self.size)
        self.streaming = False
        self.pending = deque(split(journal.missing(), self.range_bytes))

    def refuse(self, error: FastloadError) -> None:
        """Nobody delivers the right bytes: keep none of them, tell those who wait."""
        if self.journal is not None:
            self.journal.start_over()
            self.journal.finish(State.FAILED, json.dumps(to_record(error)).encode())

    def discard(self, path: Path) -> None:
        """Remove a complete file that is not what it should be; somebody else may do the same at this moment."""
        with translated(self.paths[0], self.size):
            path.unlink(missing_ok=True)
            self._cache.blob_path(self.digest).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what an earlier process left of a file that is complete by now, unless somebody is at it."""
        try:
            if self.journal_path.exists() and self._lock():
                self._cache.discard(self.digest)
        except CacheError:  # a cache that cannot be written: it stays
            pass
        finally:
            self.unlock()

    # -- publishing (threads) ----------------------------------------------------------------------------------------

    def publish(self) -> dict[str, Path]:
        """Give the verified file its final name; return where each path of the snapshot is now. Close it when nobody
        waits: the last to close the journal waits for the disk (measured: 3 to 50 ms beside a sync)."""
        journal = self._open_journal()
        with translated(self.paths[0], self.size):
            if journal.head is not None:
                os.pwrite(self._fd, journal.head, 0)
            final = self._cache.publish(self.digest, self._commit, self.paths)
            journal.finish(State.VERIFIED)
            self.journal_path.unlink(missing_ok=True)
        self._cache.stamp(self.digest, final[self.paths[0]], synced=False)
        self.unlock()
        return final

    def publish_bytes(self, data: memoryview) -> dict[str, Path]:
        """As :meth:`publish`, for a small file that was verified in memory."""
        with translated(self.paths[0], self.size):
            fd = os.open(self.partial_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                while len(data):
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)
            final = self._cache.publish(self.digest, self._commit, self.paths)
        self.unlock()
        return final

    def link(self, places: dict[str, Path]) -> dict[str, Path]:
        """Show the file, which is in the cache, under every path of the snapshot."""
        folder = self._cache.snapshot_path(self._commit)
        return {
            path: place if place == folder / path else self._cache.link(self._commit, path, self.digest)
            for path, place in places.items()
        }

    def trust(self, path: Path) -> None:
        """Remember that we have hashed what stands at *path*."""
        self._cache.stamp(self.digest, path, synced=False)

    def sync(self, path: Path) -> None:
        """Make sure that a power cut cannot take the file back, and remember that."""
        with translated(self.paths[0], self.size):
            self._cache.sync(path)
        self._cache.stamp(self.digest, path, synced=True)
