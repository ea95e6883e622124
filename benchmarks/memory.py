"""Where the pages of a new file come from: the state of the machine's memory before each run.

A virtual machine may give its free memory back to its host (free page reporting). Then a page that has been free for some
seconds costs ten times as much to get again, and whoever fills an empty cache pays that.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MADV_POPULATE_WRITE = 23  # specified: linux/mman.h, Linux 5.14
#: Guessed: what a busy node has free. The kernel itself keeps some tens of MB free.
FREE_BYTES = 256 << 20
_READ_BYTES = 8 << 20
STATES = ("as-is", "primed", "resident")


@contextmanager
def state(name: str, root: Path, prime_bytes: int) -> Iterator[Callable[[], None]]:
    """Yield what brings memory into the state *name* (:data:`STATES`), to be called right before each run.

    Args:
        root: Where ``resident`` keeps its files of holes; made where it is missing.
        prime_bytes: What ``primed`` touches.
    """
    if name == "primed":
        yield lambda: _prime(prime_bytes)
    elif name == "resident":
        root.mkdir(parents=True, exist_ok=True)
        with _PageCache(root / f"junk-{os.getpid()}") as page_cache:
            yield page_cache.fill
    else:
        yield lambda: None


def _prime(size: int) -> None:
    """Make the host of a virtual machine give its guest *size* bytes, which are then free for whoever runs next.

    Measured: a new file of 2 GB takes 2.4 CPU-s/GB without, 0.2 right after, 0.6 for 6 s, 1.4 after 8 s.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_MADV_POPULATE_WRITE)


class _PageCache:
    """Keeps the page cache full, as it is on a node that has been up for a day: new pages come from old ones.

    The old ones are of two files of holes, read and never used again, so that they go first and cost no disk. Most come
    by large folios, as models do, so that the kernel finds room for large ones; but for those it keeps gigabytes free, which
    go back to the host, so the rest comes page by page.

    Measured (24 GB, free memory goes back to the host): the first filling takes 30 to 60 s, a later one 0.2 to 2 s after a
    run of 2 GB; a new file of 2 GB then takes 0.15 to 0.3 CPU-s/GB, 0.2 to 0.5 when 4 s have passed since, instead of 2 to 2.4.
    With pages alone it was 0.5 to 0.8: the kernel had to make room for large folios.
    """

    def __init__(self, path: Path) -> None:
        self._paths = (path.with_suffix(".large"), path.with_suffix(".small"))
        self._size = 2 * os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE  # so that going round finds pages that are gone
        self._at = [0, 0]

    def __enter__(self) -> _PageCache:
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._descriptors = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600) for path in self._paths]
        for descriptor in self._descriptors:
            os.ftruncate(descriptor, self._size)
        os.posix_fadvise(self._descriptors[1], 0, 0, os.POSIX_FADV_RANDOM)  # no readahead: page by page
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, path in zip(self._descriptors, self._paths, strict=True):
            os.close(descriptor)
            path.unlink()

    def fill(self) -> None:
        """Read on until little memory is free."""
        self._read(0, free_bytes())
        self._read(1, self._size)

    def _read(self, index: int, most_bytes: int) -> None:
        while most_bytes > 0 and free_bytes() > FREE_BYTES:
            most_bytes -= os.preadv(self._descriptors[index], [self._buffer], self._at[index])
            self._at[index] = (self._at[index] + _READ_BYTES) % self._size


def free_bytes() -> int:
    """Return how much memory nobody uses, not even the page cache."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))


def resident_share(files: list[Path]) -> float:
    """Return which share of *files* is in the page cache (mincore)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    resident = pages = 0
    for path in files:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * count)()
            start = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), found)
            del start
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            resident += sum(byte & 1 for byte in found)
            pages += count
    return resident / pages if pages else 0.0


def read(files: list[Path]) -> None:
    """Read *files* into the page cache."""
    for path in files:
        with open(path, "rb", buffering=0) as opened:
            while opened.read(_READ_BYTES):
                pass


def drop(files: list[Path]) -> None:
    """Take *files* out of the page cache; what they hold must be on the disk already."""
    for path in files:
        with open(path, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
