"""The way to one device: a side stream, on which bytes travel and are cast beside the program's own work."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from .device import import_torch
from .events import log

if TYPE_CHECKING:
    import torch

#: Specified (CUDA): what the start of any element type needs; scratch memory is handed out in its multiples.
_ALIGNMENT = 16


class Lane:
    """Copies to one device. Use from one thread; waits for the device in :meth:`wait` alone.

    Attributes:
        device: With its index.
    """

    def __init__(self, device: torch.device, scratch_bytes: int) -> None:
        self.device = device
        self._torch = import_torch()
        self._stream = _side_stream(device)
        self._scratch_bytes = scratch_bytes
        self._scratch: Any = None
        self._scratch_at = 0
        self._casts: dict[tuple[torch.dtype, torch.dtype], bool] = {}

    def __enter__(self) -> Lane:
        self._within = self._torch.cuda.stream(self._stream)
        self._within.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._within.__exit__(*error)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return fresh memory of the device, from the pool of its default stream, to which all of a model belongs.

        Call :meth:`follow` before it is written: work of that stream may still use what the memory held before.
        """
        with self._torch.cuda.stream(self._torch.cuda.default_stream(self.device)):
            target: torch.Tensor = self._torch.empty(shape, dtype=dtype, device=self.device)
        return target

    def follow(self) -> None:
        """Let further copies begin only when the work that the program has given the device so far is done."""
        self._stream.wait_stream(self._torch.cuda.default_stream(self.device))

    def casts(self, source: torch.dtype, target: torch.dtype) -> bool:
        """Tell whether the device has a kernel that casts *source* to *target*. Inside ``with lane``."""
        pair = (source, target)
        if pair not in self._casts:
            try:
                self._torch.empty(1, dtype=source, device=self.device).to(target)
            except (RuntimeError, NotImplementedError):
                self._casts[pair] = False
            else:
                self._casts[pair] = True
        return self._casts[pair]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy *source*, bytes on the host, into *target*, as many bytes on the device. Inside ``with lane``.

        Bytes of a slot must stay until an :meth:`event` after it is over; from other memory, they are read at once.
        """
        target.copy_(source, non_blocking=True)

    def copy_cast(self, target: torch.Tensor, source: torch.Tensor, dtype: torch.dtype) -> None:
        """Copy *source*, bytes that hold elements of *dtype*, and cast them into *target* there. Inside ``with lane``."""
        if self._scratch is None:
            # Of this stream's own pool: only it ever uses the memory, so its order is all the order that is needed.
            self._scratch = self._torch.empty(self._scratch_bytes, dtype=self._torch.uint8, device=self.device)
        size = source.numel()
        if self._scratch_at + size > self._scratch_bytes:
            self._scratch_at = 0
        scratch = self._scratch[self._scratch_at : self._scratch_at + size]
        self._scratch_at += -(-size // _ALIGNMENT) * _ALIGNMENT
        scratch.copy_(source, non_blocking=True)
        target.copy_(scratch.view(dtype))

    def wait(self) -> None:
        """Wait until nothing is on its way any more, whatever became of it."""
        try:
            self._stream.synchronize()
        except RuntimeError as e:  # said before, or of no use to anybody any more
            log.debug("a copy to %s had failed: %s", self.device, e)

    def event(self) -> Any:
        """Return an event that is over when everything copied so far is there."""
        event = self._torch.cuda.Event(blocking=True)  # whoever waits for it sleeps instead of spinning
        event.record(self._stream)
        return event


@cache
def _side_stream(device: torch.device) -> Any:
    """Return the process's side stream: torch keeps memory for each stream that ever allocated, so there is only one."""
    return import_torch().cuda.Stream(device)


def hand_out(target: torch.Tensor, event: Any) -> None:
    """Make *target* usable on the current stream of the calling thread once *event* is over; does not block."""
    torch = import_torch()
    stream = torch.cuda.current_stream(target.device)
    stream.wait_event(event)
    if stream != torch.cuda.default_stream(target.device):
        target.record_stream(stream)
