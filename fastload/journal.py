"""The journal: which bytes of a partial file have landed. The meeting point of processes, threads and restarts.

One process owns a transfer and writes; everybody else maps the same two files, the partial one and its journal, and
waits. A crash leaves both behind: what the journal calls landed was handed to the kernel before, so a killed process
loses nothing. (After a power cut the kernel may have lost bytes that the journal calls landed; the digest finds out and
the file is fetched anew.)

Layout, little-endian, 4096 bytes of header, then one byte a block (0 missing, 1 landed):

    0  magic and version     8  file size          16  block size         24  state          28  generation
    32 landed bytes          40 hashed bytes       48  owner pid          56  reserved (8)
    64 first 8 bytes of the file, 72 whether they are known
    80 digest (72 bytes)     256 demands: 32 x (offset + 1), 0 = free     512 error (JSON)
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from .errors import CacheError
from .types import ByteRange

MAGIC = b"FLJRNL\x00\x01"
HEADER_BYTES = 4096
#: Guessed: what a crash may cost per connection, against one byte of journal; 1 MiB of journal for 64 GiB of file.
#: The same everywhere, so that any process can go on with any other's journal.
BLOCK_BYTES = 64 << 10
_DEMANDS, _DEMAND_SLOTS = 256, 32
_ERROR, _ERROR_BYTES = 512, 3000
#: Guessed: a reader that must wait looks again this often, at first and at last; below the time in which the fastest link
#: fills one range.
_POLL_S = (0.0005, 0.004)


class State(IntEnum):
    """What became of the file."""

    PARTIAL = 0
    VERIFIED = 1
    FAILED = 2


class Journal:
    """A mapped journal; the owner marks, everybody may look, wait and demand. Thread-safe.

    Owns its file descriptor and mapping; :meth:`close` gives both back.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, 0)
        if len(self._map) < HEADER_BYTES or self._map[:8] != MAGIC:
            self.close()
            raise CacheError("not a fastload journal, or one of another version", hint="delete it and load again")
        self.size = self._get(8)
        self.block_bytes = self._get(16)
        self.blocks = -(-self.size // self.block_bytes) if self.block_bytes else 0
        if not self.block_bytes or len(self._map) < HEADER_BYTES + self.blocks:
            self.close()
            raise CacheError("a fastload journal is shorter than it says", hint="delete it and load again")
        self._lock = threading.Lock()

    # -- making and opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, fd: int, *, size: int, digest: str, block_bytes: int = BLOCK_BYTES) -> Journal:
        """Write an empty journal for a file of *size* bytes into *fd*, whose ownership moves to the journal."""
        blocks = -(-size // block_bytes)
        os.ftruncate(fd, 0)
        # Written, not made sparse: a page that the disk has no room for would kill the process that marks a block in it.
        os.posix_fallocate(fd, 0, HEADER_BYTES + blocks)
        head = bytearray(160)
        struct.pack_into("<QQ", head, 8, size, block_bytes)
        text = digest.encode()
        head[80 : 80 + len(text)] = text
        os.pwrite(fd, head, 0)
        os.pwrite(fd, MAGIC, 0)  # last: a journal without its magic is no journal
        return cls(fd)

    @classmethod
    def open(cls, path: Path | str) -> Journal:
        """Map the journal at *path*.

        Raises:
            FileNotFoundError: There is none (any more).
            CacheError: It is damaged, or this user may not open it.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise CacheError(f"{path}: the journal cannot be opened: {e.strerror}") from e
        try:
            return cls(fd)
        except ValueError as e:  # mmap of an empty file: its writer was killed before the first byte
            os.close(fd)
            raise CacheError(f"{path}: an empty journal") from e

    def close(self) -> None:
        """Unmap and close; harmless when repeated."""
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """Return the descriptor, which stays the journal's."""
        return self._fd

    # -- numbers -----------------------------------------------------------------------------------------------------

    # Native kinds, not "<Q": those go byte by byte, and another process could read half a number.

    def _get(self, offset: int, kind: str = "Q") -> int:
        return int(struct.unpack_from(kind, self._map, offset)[0])

    def _set(self, offset: int, value: int, kind: str = "Q") -> None:
        struct.pack_into(kind, self._map, offset, value)

    @property
    def digest(self) -> str:
        """What the file must hash to, as ``str(Digest)``; empty where nobody knows."""
        return self._map[80:152].rstrip(b"\0").decode()

    @property
    def state(self) -> State:
        """Where the file stands."""
        return State(self._get(24, "I"))

    @property
    def generation(self) -> int:
        """Another number each time the file is started over because its digest did not match."""
        return self._get(28, "I")

    @property
    def landed_bytes(self) -> int:
        """Bytes that have landed, of this and earlier processes."""
        return self._get(32)

    @property
    def hashed_bytes(self) -> int:
        """Length of the prefix that has been hashed."""
        return self._get(40)

    @hashed_bytes.setter
    def hashed_bytes(self, value: int) -> None:
        self._set(40, value)

    @property
    def owner_pid(self) -> int:
        """The process that fetches the file; for messages only: the lock decides."""
        return self._get(48)

    @property
    def head(self) -> bytes | None:
        """The file's first 8 bytes, which the partial file itself does not show; ``None`` until they landed."""
        return self._map[64:72] if self._map[72] else None

    @property
    def error(self) -> bytes:
        """What the owner wrote when it failed: JSON, or nothing."""
        return self._map[_ERROR : _ERROR + _ERROR_BYTES].rstrip(b"\0")

    # -- the owner's side --------------------------------------------------------------------------------------------

    def own(self) -> None:
        """Say that this process fetches the file now, and that no earlier failure counts."""
        with self._lock:
            self._set(48, os.getpid())
            self._map[_ERROR : _ERROR + _ERROR_BYTES] = bytes(_ERROR_BYTES)
            # Counted anew: a process that was killed in mark() had set blocks and not yet added them.
            self._set(32, self.size - sum(hole.stop - hole.start for hole in self.missing()))
            self._set(40, 0)
            self._set(24, State.PARTIAL, "I")

    def set_head(self, head: bytes) -> None:
        """Keep the first bytes of the file, which are left out of the partial file until it is verified."""
        with self._lock:
            self._map[64 : 64 + len(head)] = head
            self._map[72] = 1

    def mark(self, span: ByteRange) -> None:
        """Say that the whole blocks of *span* (and the file's last, short one) are in the file.

        Call only after the write returned. Bytes of *span* outside whole blocks are not remembered.
        """
        first = -(-span.start // self.block_bytes)
        stop = self.blocks if span.stop == self.size else span.stop // self.block_bytes
        if stop <= first:
            return
        with self._lock:
            at = slice(HEADER_BYTES + first, HEADER_BYTES + stop)
            added = self._map[at].count(0) * self.block_bytes
            if stop == self.blocks and not self._map[at.stop - 1]:
                added -= self.blocks * self.block_bytes - self.size  # the last block is short
            self._map[at] = b"\1" * (stop - first)
            self._set(32, self._get(32) + added)

    def start_over(self) -> None:
        """Forget everything that landed: the digest did not match."""
        with self._lock:
            # Before: whoever is killed in between leaves nobody in the dark. After: for readers that came meanwhile.
            self._set(28, self._get(28, "I") + 1, "I")
            self._map[HEADER_BYTES : HEADER_BYTES + self.blocks] = bytes(self.blocks)
            self._map[72] = 0
            self._set(32, 0)
            self._set(40, 0)
            self._set(28, self._get(28, "I") + 1, "I")

    def finish(self, state: State, error: bytes = b"") -> None:
        """Say how it ended; waiters see it at once, also after the journal file itself is gone."""
        with self._lock:
            self._map[_ERROR : _ERROR + _ERROR_BYTES] = error[:_ERROR_BYTES].ljust(_ERROR_BYTES, b"\0")
            self._set(24, state, "I")

    def take_demands(self) -> list[int]:
        """Return the offsets that readers wait for, oldest slot first, and free their slots."""
        if not any(self._map[_DEMANDS : _DEMANDS + 8 * _DEMAND_SLOTS]):
            return []
        found = []
        with self._lock:
            for slot in range(_DEMAND_SLOTS):
                value = self._get(_DEMANDS + 8 * slot)
                if value:
                    found.append(value - 1)
                    self._set(_DEMANDS + 8 * slot, 0)
        return found

    # -- everybody's side --------------------------------------------------------------------------------------------

    def has(self, span: ByteRange) -> bool:
        """Tell whether all of *span* is in the file."""
        return self.hole(span) is None

    def hole(self, span: ByteRange) -> int | None:
        """Return the first byte of *span* that is not in the file, or ``None``."""
        if span.stop <= span.start or self.state is State.VERIFIED:
            return None
        first, stop = span.start // self.block_bytes, -(-span.stop // self.block_bytes)
        found = self._map.find(b"\0", HEADER_BYTES + first, HEADER_BYTES + stop)
        return None if found < 0 else max(span.start, (found - HEADER_BYTES) * self.block_bytes)

    def prefix_bytes(self) -> int:
        """Return the length of the part without a hole at the start of the file."""
        hole = self._map.find(b"\0", HEADER_BYTES, HEADER_BYTES + self.blocks)
        return self.size if hole < 0 else (hole - HEADER_BYTES) * self.block_bytes

    def missing(self) -> list[ByteRange]:
        """Return the holes, in file order, merged where blocks touch."""
        holes: list[ByteRange] = []
        end = HEADER_BYTES + self.blocks
        at = self._map.find(b"\0", HEADER_BYTES, end)
        while at >= 0:
            stop = self._map.find(b"\1", at, end)
            stop = end if stop < 0 else stop
            start_byte = (at - HEADER_BYTES) * self.block_bytes
            holes.append(ByteRange(start_byte, min((stop - HEADER_BYTES) * self.block_bytes, self.size)))
            at = self._map.find(b"\0", stop, end)
        return holes

    def demand(self, offset: int) -> None:
        """Ask the owner to fetch the range around *offset* next. A full table drops the wish, never blocks."""
        with self._lock:
            free = None
            for slot in range(_DEMAND_SLOTS):
                value = self._get(_DEMANDS + 8 * slot)
                if value == offset + 1:
                    return
                if value == 0 and free is None:
                    free = slot
            if free is not None:
                self._set(_DEMANDS + 8 * free, offset + 1)

    def wait(self, ready: Callable[[], bool], *, interrupted: Callable[[], None] = lambda: None) -> None:
        """Block this thread until ``ready()``; call *interrupted* between looks: it raises when waiting is vain."""
        pause_s, longest_s = _POLL_S
        while not ready():
            interrupted()
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.3, longest_s)
