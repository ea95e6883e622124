"""Page-locked host memory: the slots from which a device fetches bytes by itself, while the program goes on."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import import_torch
from .events import log

if TYPE_CHECKING:
    import torch

#: Specified (CUDA and HIP): cudaHostRegisterPortable; page-locked for all devices, not only for the current one.
_PORTABLE = 1
#: Specified: the runtime's library, and what asks it for its last error and forgets that.
_RUNTIMES = {"libcudart.so": "cudaGetLastError", "libamdhip64.so": "hipGetLastError"}

_warned = False


class PinnedSlots:
    """Equal slots in one anonymous mapping, page-locked where the system allows it. Use from one thread at a time.

    torch's own pinned memory is rounded up to a power of two and never goes back to the system; this is exact and does.

    Args:
        count: Of slots.
        slot_bytes: A multiple of the page size, so that no slot shares a page with another one.
        device: Whose runtime locks the pages.

    Attributes:
        pinned: Whether they are page-locked; copies work without too, only slower.
    """

    def __init__(self, count: int, slot_bytes: int, device: torch.device) -> None:
        torch = import_torch()
        self.slot_bytes = slot_bytes
        size = count * slot_bytes
        # Private, not the default shared: only private anonymous memory gets huge pages, which pin 15 times faster.
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Not into forked children: a page that both have would move away from under the device at the next write.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            try:
                self._map.madvise(getattr(mmap, advice))
            except (AttributeError, OSError):  # another system, or a kernel without huge pages: it works without
                pass
        self._view = memoryview(self._map)
        self._memory: Any = torch.frombuffer(self._view, dtype=torch.uint8)
        self._device = device
        self.pinned = self._register(size)

    def view(self, index: int) -> memoryview:
        """Return slot *index* as writable memory."""
        return self._view[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def tensor(self, index: int) -> torch.Tensor:
        """Return slot *index* as bytes that torch copies from."""
        slot: torch.Tensor = self._memory[index * self.slot_bytes : (index + 1) * self.slot_bytes]
        return slot

    def close(self) -> None:
        """Unlock and unmap; every copy from the slots must be over. Harmless when repeated."""
        if self._memory is None:
            return
        if self.pinned:
            torch = import_torch()
            code = int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
            if code:  # after a failed copy the runtime refuses everything; the pages go with the mapping
                _forget_last_error()
                log.debug("pinned memory could not be unlocked: error %d", code)
        self._memory = None
        try:
            self._view.release()
            self._map.close()
        except BufferError:  # a slot lives on in a traceback: the mapping ends with that
            log.debug("pinned memory is still looked at")

    def _register(self, size: int) -> bool:
        global _warned
        torch = import_torch()
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, _PORTABLE))
            if not code:
                return True
            _forget_last_error()
        if not _warned:
            _warned = True
            log.warning(
                "%d bytes of host memory could not be page-locked (error %d): copies to %s will be slower. "
                "A smaller pinned_bytes, or a higher limit on locked memory, helps",
                size, code, self._device,
            )  # fmt: skip
        return False


def _forget_last_error() -> None:
    """Clear the runtime's last error, which is one a thread: else the next kernel's launch is blamed for it."""
    for path in _loaded_libraries():
        for library, function in _RUNTIMES.items():
            if library in path:
                try:
                    getattr(ctypes.CDLL(path), function)()  # the one that is loaded: the same path is not loaded twice
                except (OSError, AttributeError):
                    log.debug("%s could not be asked for its last error", path)


def _loaded_libraries() -> set[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split(None, 5)[5] for line in lines if ".so" in line}
