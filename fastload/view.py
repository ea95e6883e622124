"""One file of a transfer as its readers see it: complete or arriving, here or in another process's hands."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import TYPE_CHECKING

from .errors import CacheError, FastloadError, IntegrityError
from .journal import Journal, State
from .types import ByteRange

if TYPE_CHECKING:
    from .transfer import Transfer

#: Guessed: a wish that got lost costs a reader this long.
_DEMAND_AGAIN_S = 0.25


class FileView:
    """One file of a transfer, complete or arriving. Thread-safe; owns a descriptor and, once asked, a private mapping.

    Attributes:
        path: Relative to the snapshot.
        size: In bytes.
        ready: Verified and under its final name.
        generation: How often the file was started over; tensors of an older generation are worthless.
        copied: Bytes of it were copied elsewhere (to a device); set by whoever did.
    """

    def __init__(self, transfer: Transfer, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self.ready = False
        self.error: FastloadError | None = None
        self.generation = 0
        self.copied = False
        self._transfer = transfer
        self._lock = threading.Lock()
        self._fd = -1
        self._journal: Journal | None = None
        self._places: tuple[str, str] | None = None
        self._announced = 0
        self._mapping: mmap.mmap | None = None
        self._final: str | None = None
        #: Somebody was told that bytes of the partial file may be used.
        self._used = False
        self._settled = False

    # -- told by messages --------------------------------------------------------------------------------------------

    def arriving(self, data: str, journal: str) -> None:
        """The bytes land in the file *data*, and *journal* says which."""
        self._places = (data, journal)
        self._announced += 1

    def done(self, final: str) -> None:
        """The file is verified and stands at *final*."""
        with self._lock:
            self._final = final
            self.ready = True

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def known(self) -> bool:
        """Whether there is anything to open yet."""
        return self.ready or self._places is not None or self.error is not None

    @property
    def final(self) -> str | None:
        """Where the verified file stands; ``None`` until it does."""
        return self._final

    @property
    def place(self) -> tuple[int, str] | None:
        """Inode and path of what readers have mapped, arriving or complete; ``None`` where nobody can have."""
        with self._lock:
            try:
                if self._fd >= 0:
                    return os.fstat(self._fd).st_ino, os.readlink(f"/proc/self/fd/{self._fd}")
                if self._final is not None:
                    return os.stat(self._final).st_ino, os.path.realpath(self._final)
            except OSError:  # removed since, or no such file system here
                pass
            return None

    @property
    def mapped(self) -> tuple[int, int] | None:
        """Where :meth:`mapping` is in memory, as addresses (half-open); ``None`` where nobody has asked for it."""
        with self._lock:
            if self._mapping is None:
                return None
            start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
            return start, start + self.size

    @property
    def journal(self) -> Journal | None:
        """What says which bytes have landed, if the file was opened while it arrived."""
        return self._journal

    def open(self) -> int:
        """Return a descriptor of the data, which stays the view's; waits until there is a file."""
        self._transfer.wait(lambda: self.known)
        if self.error is not None:
            raise self.error
        with self._lock:
            while self._fd < 0:
                announced = self._announced
                try:
                    if self.ready and self._final is not None:
                        self._fd = os.open(self._final, os.O_RDONLY | os.O_CLOEXEC)
                    elif self._places is not None:
                        # The journal first: if the owner publishes in between, its state says so for ever.
                        journal = Journal.open(self._places[1])
                        try:
                            self._fd = os.open(self._places[0], os.O_RDONLY | os.O_CLOEXEC)
                        except BaseException:
                            journal.close()
                            raise
                        self._journal = journal
                        self.generation = journal.generation
                except (OSError, CacheError) as e:
                    if self.ready:
                        raise CacheError(f"{self.path} cannot be read from the cache: {e}") from e
                    # Published this moment: the message is on its way. Or damaged, or another user's: its owner goes on.
                    self._lock.release()
                    try:
                        self._transfer.wait(
                            lambda seen=announced: self.ready or self.error is not None or self._announced != seen  # type: ignore[misc]
                        )
                    finally:
                        self._lock.acquire()
                    if self.error is not None:
                        raise self.error from None
            return self._fd

    def wait(self, span: ByteRange) -> None:
        """Block until *span* has landed (verified or not); asks the owner to fetch it next.

        Raises:
            FastloadError: The transfer, or this file, failed.
        """
        self.open()
        journal = self._journal
        if journal is None:
            return
        try:
            if not (self.ready or journal.has(span)):
                self._wait_for(span, journal)
        except ValueError as e:
            raise FastloadError(f"{self.path} was closed while it was waited for") from e
        if self.ready and self._is_replaced():
            if self._used or self._mapping is not None:
                raise IntegrityError(
                    f"{self.path}: another process replaced the file while it was read", file=self.path
                )
            self.close()
            self.open()
        self._used = True

    def ask(self, span: ByteRange) -> None:
        """Ask the owner to fetch *span* next, without waiting and without keeping anything open; never raises."""
        places = self._places
        if places is None or self.ready or self.error is not None:
            return
        try:
            journal = Journal.open(places[1])
        except (OSError, CacheError):  # published this moment, or damaged: who waits for it will know
            return
        try:
            hole = journal.hole(span)
            if hole is not None:
                journal.demand(hole)
        finally:
            journal.close()

    def _wait_for(self, span: ByteRange, journal: Journal) -> None:
        clock = self._transfer.events.clock
        started_s = clock()
        asked_s, asked = float("-inf"), -1

        def interrupted() -> None:
            nonlocal asked_s, asked
            self._check()
            hole = journal.hole(span)
            # Again after a while: two processes may have raced for one place in the table.
            if hole is not None and (hole != asked or clock() - asked_s > _DEMAND_AGAIN_S):
                asked_s, asked = clock(), hole
                journal.demand(hole)

        journal.wait(lambda: self.ready or journal.has(span), interrupted=interrupted)
        self._transfer.events.emit(
            "build.waited", file=self.path, seconds=clock() - started_s, start=span.start, stop=span.stop
        )

    def _is_replaced(self) -> bool:
        """Tell whether the verified file is another one than the partial one that readers have open.

        So it is when the owner died and somebody who does not know our partial files (huggingface_hub) fetched it.
        """
        with self._lock:
            if self._journal is None or self._final is None or self._settled:
                return False
            try:
                same = os.path.samestat(os.fstat(self._fd), os.stat(self._final))
            except OSError:
                return True
            self._settled = same or self._journal.state is State.VERIFIED
            return not self._settled

    def _check(self) -> None:
        self._transfer.check()
        if self.error is not None:
            raise self.error

    def read(self, span: ByteRange) -> bytes:
        """Return the bytes of *span* once they have landed, the hidden first 8 included."""
        span = ByteRange(span.start, min(span.stop, self.size))
        self.wait(span)
        data = bytearray(os.pread(self.open(), len(span), span.start))
        journal = self._journal
        head = journal.head if journal is not None else None
        if head is not None and span.start < 8:
            part = head[span.start : span.stop]
            data[: len(part)] = part
        return bytes(data)

    def mapping(self) -> memoryview:
        """Return the file as private (copy-on-write), writable memory; the view keeps it mapped.

        Pages show bytes only after :meth:`wait` returned for them. Whoever keeps a slice keeps the mapping: closing it
        under living slices is refused by the interpreter.
        """
        fd = self.open()
        with self._lock:
            if self._mapping is None:
                self._mapping = mmap.mmap(fd, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            return memoryview(self._mapping)

    def changed(self) -> bool:
        """Tell whether bytes that were readable before are not those of the file: their digest did not match."""
        journal = self._journal
        if journal is None:
            return False
        used = self._used or self._mapping is not None
        return journal.generation != self.generation or (self.ready and used and self._is_replaced())

    @property
    def unproven(self) -> bool:
        """Whether somebody may hold bytes of it that are not verified yet."""
        return self._used and not self.ready

    @property
    def delivered(self) -> bool:
        """Whether somebody may hold bytes of it."""
        return self._mapping is not None or self.copied

    def close(self) -> None:
        """Give descriptor and journal back. Tensors on the mapping stay valid."""
        with self._lock:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._mapping = None
            self._used = self._settled = self.copied = False
