"""Bodies that come from the first byte to the last, whatever was asked for: into ring slots, range by range."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from .errors import MirrorError
from .ring import Ring, Slot
from .sink import Fill
from .types import ByteRange


async def land_in_order(
    chunks: AsyncIterator[bytes],
    spans: Sequence[ByteRange],
    ring: Ring,
    has: Callable[[ByteRange], bool],
    land: Callable[[ByteRange, int, Slot], Awaitable[None]],
) -> None:
    """Cut *chunks* into *spans*, which follow each other without a hole, and *land* those that are not there yet.

    A body that is cut short is kept as far as it came.

    Args:
        land: Called with range, bytes that are in the slot, and the slot, which is its own from then on.

    Raises:
        MirrorError: The body holds another number of bytes.
    """
    rest = memoryview(b"")
    for span in spans:
        slot = None if has(span) else await ring.acquire()
        at = 0
        try:
            while at < len(span):
                if not rest:
                    chunk: bytes = await anext(chunks, b"")
                    rest = memoryview(chunk)
                    if not chunk:
                        raise _other_length(spans[-1].stop)
                count = min(len(rest), len(span) - at)
                if slot is not None:
                    slot.view[at : at + count] = rest[:count]
                at, rest = at + count, rest[count:]
        finally:
            if slot is not None:
                await land(span, at, slot)
    more = await anext(chunks, b"")
    if rest or more:
        raise _other_length(spans[-1].stop)


async def fill_in_order(chunks: AsyncIterator[bytes], fill: Fill) -> None:
    """Put *chunks* into *fill*, from its first byte on.

    Raises:
        MirrorError: The body holds another number of bytes.
    """
    fill.filled_bytes = 0
    size = len(fill.view)
    async for chunk in chunks:
        if fill.filled_bytes + len(chunk) > size:
            raise _other_length(size)
        fill.put(chunk)
    if fill.filled_bytes != size:
        raise _other_length(size)


def _other_length(size: int) -> MirrorError:
    return MirrorError(f"the answer holds another number of bytes than {size}")
