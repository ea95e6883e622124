"""Copies that are on their way to devices, each from a page-locked slot that comes back when its copy is over."""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .device import check_fits, device_error, import_torch, reserve, rounded
from .errors import CacheError, DeviceError, FastloadError
from .events import Events
from .lane import Lane
from .pinned import PinnedSlots
from .staging import Feed, Group, Piece
from .types import ByteRange

if TYPE_CHECKING:
    import torch

    from .weightfile import WeightFile

#: Reasoned: one slot is read into, one is copied from, and six even out the two; smaller slots only cost more calls.
SLOTS = 8
_PAGE_BYTES = 4096
#: Guessed: how many slots' worth of a file that is there already the disk is asked for in advance.
_READ_AHEAD = 4


@dataclass(slots=True)
class _Check:
    """What was sent to a device, and what has come back from there."""

    feed: Feed
    expected: torch.Tensor
    back: torch.Tensor

    def holds(self) -> bool:
        torch = import_torch()
        if torch.equal(self.expected, self.back):
            return True
        if self.feed.final == self.feed.dtype:
            return False
        # A cast may write "not a number" in another way than the host does.
        a, b = (t.clone().view(self.feed.final).float() for t in (self.expected, self.back))
        return bool(((a == b) | (a.isnan() & b.isnan())).all())


@dataclass(slots=True)
class _Sent:
    """One slot on its way."""

    slot: int
    file: str
    device: torch.device
    size: int
    taken_s: float
    filled_s: float
    event: Any = None
    checks: list[_Check] = field(default_factory=list)


class Copies:
    """Starts copies and takes the slots back. Use from one thread at a time; close it.

    Args:
        events: Told of every copy.
        pinned_bytes: Memory of all slots; allocated and page-locked with the first copy.
        verify: Read every byte back from the device and compare.
    """

    def __init__(self, events: Events, pinned_bytes: int, *, verify: bool) -> None:
        self.slot_bytes = max(_PAGE_BYTES, pinned_bytes // (SLOTS * (2 if verify else 1)) // _PAGE_BYTES * _PAGE_BYTES)
        self._events = events
        self._verify = verify
        self._slots: Any = None
        self._back: Any = None
        self._lanes: dict[torch.device, Lane] = {}
        self._free = list(range(SLOTS))
        self._sent: deque[_Sent] = deque()
        #: When the last copy to each device was over.
        self._over_s: dict[torch.device, float] = {}

    def prepare(self, device: torch.device) -> None:
        """Allocate and page-lock the slots, which takes a while: best before the first bytes are there.

        Raises:
            DeviceError: There is no host memory for them, or the device has failed before.
        """
        if self._slots is not None:
            return
        try:
            self._slots = PinnedSlots(SLOTS, self.slot_bytes, device)
            if self._verify:
                self._back = PinnedSlots(SLOTS, self.slot_bytes, device)
        except OSError as e:
            size = SLOTS * self.slot_bytes
            raise DeviceError(
                f"the host has no {size} bytes for copies to {device}: {e.strerror}", hint="a smaller pinned_bytes"
            ) from e
        except (RuntimeError, AssertionError) as e:
            raise device_error(e, device, "host memory was page-locked for it") from e

    def allocate(self, device: torch.device, feeds: Sequence[Feed]) -> None:
        """Give *feeds*, tensors of one file that all go to *device*, their memory there, carved out of one piece.

        Raises:
            DeviceError: It is too full.
        """
        if not feeds:
            return
        path = feeds[0].file.path
        feed = feeds[0]
        try:
            check_fits(device, sum(rounded(feed.device_bytes) for feed in feeds), f"the tensors of {path}")
            reserve(device, [feed.device_bytes for feed in feeds])
            lane = self._lane(device)
            for feed in feeds:
                feed.target = lane.allocate(feed.info.shape, feed.final)
            lane.follow()
        except (RuntimeError, AssertionError) as e:
            traceback.clear_frames(e.__traceback__)
            what = f"tensor {feed.info.name!r} ({feed.device_bytes} bytes) of {path} got its memory"
            raise device_error(e, device, what) from e

    def send(self, group: Group) -> tuple[Any, list[Feed]]:
        """Read *group*, which has landed, into a slot and start its copies; waits for a slot, and for nothing else.

        Returns:
            The event that is over when it is there, and the feeds that got their memory.

        Raises:
            DeviceError: The device failed or is full.
        """
        span = group.span
        try:
            slot = self._acquire(group.device)
            taken_s = self._events.clock()
            _read(group.file, self._slots.view(slot)[: len(span)], span.start)
            sent = _Sent(slot, group.file.path, group.device, len(span), taken_s, self._events.clock())
            lane = self._lane(group.device)
            fresh = [feed for feed in dict.fromkeys(p.feed for p in group.pieces) if feed.target is None]
            for feed in fresh:
                feed.target = lane.allocate(feed.info.shape, feed.final)
            if fresh:
                lane.follow()
            with lane:
                for piece in group.pieces:
                    self._copy(piece, piece.span.start - span.start, lane, sent)
            sent.event = lane.event()
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            traceback.clear_frames(e.__traceback__)
            raise device_error(e, group.device, f"{_described(group)} went there") from e
        self._sent.append(sent)
        return sent.event, fresh

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = Lane(device, self.slot_bytes)
        return self._lanes[device]

    def _copy(self, piece: Piece, at: int, lane: Lane, sent: _Sent) -> None:
        """Start the copy of *piece*, which stands in the slot from byte *at* on."""
        torch = import_torch()
        feed = piece.feed
        if feed.target is None:
            raise FastloadError(f"tensor {feed.info.name!r} has no memory")
        start, size = piece.span.start - feed.info.span.start, len(piece.span)
        begin, end = int(start * feed.expansion), int((start + size) * feed.expansion)
        target = feed.target.view(-1).view(torch.uint8)[begin:end]
        source = self._slots.tensor(sent.slot)[at : at + size]
        if feed.final == feed.dtype:
            lane.copy(target, source)
        elif lane.casts(feed.dtype, feed.final):
            lane.copy_cast(target.view(feed.final), source, feed.dtype)
            if self._verify:
                source = _cast(source, feed)
        else:
            source = self._cast_in_slot(source, feed)
            lane.copy(target, source)
        if self._verify:
            at = sum(len(check.back) for check in sent.checks)
            back = self._back.tensor(sent.slot)[at : at + len(target)]
            back.copy_(target, non_blocking=True)
            sent.checks.append(_Check(feed, source, back))

    def _cast_in_slot(self, source: torch.Tensor, feed: Feed) -> torch.Tensor:
        """Return *source* cast by the host: in its place in the slot, where it fits there."""
        cast = _cast(source, feed)
        if len(cast) > len(source):
            return cast
        source[: len(cast)].copy_(cast)
        return source[: len(cast)]

    # -- slots -------------------------------------------------------------------------------------------------------

    def _acquire(self, device: torch.device) -> int:
        """Return a free slot; wait for the oldest copy where there is none."""
        self.prepare(device)
        self.retire_done()
        while not self._free:
            self._retire()
        return self._free.pop()

    def retire_done(self) -> None:
        """Take back the slots whose copies are over."""
        while self._sent and _is_over(self._sent[0]):
            self._retire()

    def retire_all(self) -> None:
        """Wait for all copies.

        Raises:
            DeviceError: One failed, or what came back differs.
        """
        while self._sent:
            self._retire()

    def _retire(self) -> None:
        sent = self._sent[0]
        try:
            sent.event.synchronize()
        except RuntimeError as e:
            raise device_error(e, sent.device, f"bytes of {sent.file} went there") from e
        self._sent.popleft()
        self._free.append(sent.slot)
        for check in sent.checks:
            if not check.holds():
                raise DeviceError(
                    f"{sent.file}: tensor {check.feed.info.name!r} came back from {sent.device} with other bytes "
                    "than were sent there",
                    hint="the device, its memory or its driver is damaged",
                )
        over_s = self._events.clock()
        # Copies to one device run one after another.
        queued_s = max(0.0, self._over_s.get(sent.device, sent.filled_s) - sent.filled_s)
        self._over_s[sent.device] = over_s
        self._events.emit(
            "copy.finished", file=sent.file, seconds=over_s - sent.taken_s, bytes=sent.size, device=str(sent.device),
            slot=sent.slot, read_s=sent.filled_s - sent.taken_s, queued_s=queued_s,
        )  # fmt: skip

    def close(self) -> None:
        """Wait for the copies on their way, whatever comes of them, and give the slots back. Harmless when repeated."""
        self._sent.clear()
        for lane in self._lanes.values():
            lane.wait()  # not the events: what failed half-way has none
        for slots in (self._slots, self._back):
            if slots is not None:
                slots.close()
        self._slots = self._back = None
        self._free = list(range(SLOTS))
        self._lanes.clear()


def _described(group: Group) -> str:
    info = group.pieces[0].feed.info
    more = f" and {len(group.pieces) - 1} more" if len(group.pieces) > 1 else ""
    return f"tensor {info.name!r} ({len(info.span)} bytes){more} of {group.file.path}"


def _is_over(sent: _Sent) -> bool:
    try:
        return bool(sent.event.query())
    except RuntimeError:
        return True  # it failed: whoever waits for it is told


def _cast(source: torch.Tensor, feed: Feed) -> torch.Tensor:
    """Return the bytes of *source*, elements as the file has them, as bytes of elements that the device gets."""
    # A copy first: a slice of a slot may begin between elements, which view() refuses.
    cast: torch.Tensor = source.clone().view(feed.dtype).to(feed.final).view(source.dtype)
    return cast


def _read(file: WeightFile, memory: memoryview, start: int) -> None:
    """Fill *memory* with the bytes of *file* from *start* on, which have landed."""
    view = file.view
    view.wait(ByteRange(start, start + len(memory)))
    view.copied = True
    fd = view.open()
    if view.ready:
        os.posix_fadvise(fd, start + len(memory), _READ_AHEAD * len(memory), os.POSIX_FADV_WILLNEED)
    at = 0
    while at < len(memory):
        count = os.preadv(fd, [memory[at:]], start + at)
        if not count:
            raise CacheError(f"{file.path} ends at byte {start + at}, before its tensors do")
        at += count
    if start < 8:  # hidden in the partial file
        head = view.read(ByteRange(start, min(8, start + len(memory))))
        memory[: len(head)] = head
