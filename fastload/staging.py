"""What goes to the devices next: tensors, cut into pieces, packed into groups that fill one slot each. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from .device import DTYPES, torch_dtype
from .types import ByteRange, TensorInfo

if TYPE_CHECKING:
    import torch

    from .weightfile import WeightFile

#: Reasoned: torch casts fastest where both addresses are multiples of 16, and a cast makes an eighth of it at least.
_CAST_UNIT_BYTES = 128
#: Guessed: groups of a file that are looked at for bytes that landed out of turn; twice what the connections have open.
_WINDOW = 16


@dataclass(eq=False, slots=True)
class Feed:
    """One tensor on its way to a device.

    Attributes:
        dtype: Of its elements in the file.
        final: Of its elements on the device.
        target: Its memory there, once its first bytes are on their way.
        left: Pieces that are not on their way.
        event: Over when all of it is there; set once everything is on its way.
        claimed: Somebody asked for it.
        ahead_bytes: Its memory on the device, while nobody has.
    """

    file: WeightFile
    info: TensorInfo
    device: torch.device
    dtype: torch.dtype
    final: torch.dtype
    target: torch.Tensor | None = None
    left: int = 0
    groups: list[Group] = field(default_factory=list)
    event: Any = None
    claimed: bool = False
    ahead_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """What it takes there."""
        return len(self.info.span) // int(self.dtype.itemsize) * int(self.final.itemsize)

    @property
    def expansion(self) -> float:
        """Bytes on the device for one byte of the file."""
        return int(self.final.itemsize) / int(self.dtype.itemsize)


@dataclass(eq=False, slots=True)
class Piece:
    """The bytes *span* of the file, which belong to *feed*."""

    feed: Feed
    span: ByteRange


@dataclass(eq=False, slots=True)
class Group:
    """Pieces that stand one behind the other in a file and go through one slot to one device."""

    pieces: list[Piece]

    @property
    def file(self) -> WeightFile:
        """The file that they are in."""
        return self.pieces[0].feed.file

    @property
    def device(self) -> torch.device:
        """Where they go."""
        return self.pieces[0].feed.device

    @property
    def span(self) -> ByteRange:
        """The bytes of the file that they are."""
        return ByteRange(self.pieces[0].span.start, self.pieces[-1].span.stop)


def feed_of(file: WeightFile, name: str, device: torch.device, dtype: torch.dtype | None) -> Feed:
    """Return tensor *name* of *file* as it is to go to *device*, where floating ones are cast to *dtype*."""
    info = file.info(name)
    stored = torch_dtype(info.dtype)
    return Feed(file, info, device, stored, dtype if dtype is not None and stored.is_floating_point else stored)


def feedable(info: TensorInfo) -> bool:
    """Tell whether tensor *info* can travel as bytes: it has some, and they are whole elements."""
    return len(info.span) > 0 and DTYPES[info.dtype][0] >= 8


def grouped(feeds: Iterable[Feed], slot_bytes: int) -> Iterator[Group]:
    """Yield *feeds*, which go to one device and stand in the order of their bytes in one file, as groups.

    A group ends where the file's next multiple of *slot_bytes* begins, but for what cannot be parted: so do the ranges that
    are fetched, and the last one of them completes one group, not two.
    """
    group: list[Piece] = []
    taken = 0.0
    for piece in _pieces(feeds, slot_bytes):
        needed = len(piece.span) * max(1.0, piece.feed.expansion)  # the larger of before and after the cast
        if group and (
            group[-1].span.stop != piece.span.start
            or (group[-1].span.stop - 1) // slot_bytes != (piece.span.stop - 1) // slot_bytes
            or taken + needed > slot_bytes
        ):
            yield _close(group)
            group, taken = [], 0.0
        group.append(piece)
        taken += needed
    if group:
        yield _close(group)


def _pieces(feeds: Iterable[Feed], slot_bytes: int) -> Iterator[Piece]:
    for feed in feeds:
        unit = int(feed.dtype.itemsize) if feed.final == feed.dtype else _CAST_UNIT_BYTES
        longest = max(1, int(slot_bytes / max(1.0, feed.expansion)) // unit) * unit
        span = feed.info.span
        start = span.start
        while start < span.stop:
            line = ((start + unit - 1) // slot_bytes + 1) * slot_bytes  # a unit may stand across one
            whole = (line - span.start) // unit * unit  # of the tensor, before the line
            stop = min(start + longest, span.start + whole, span.stop)
            feed.left += 1
            yield Piece(feed, ByteRange(start, stop))
            start = stop


def _close(pieces: list[Piece]) -> Group:
    group = Group(pieces)
    for piece in pieces:
        if not piece.feed.groups or piece.feed.groups[-1] is not group:
            piece.feed.groups.append(group)
    return group


class Staging:
    """Decides which bytes go to a device next. Not thread-safe.

    A tensor that is waited for comes first, as soon as its own bytes have landed; then, file by file, whatever group has
    landed of the tensors that will be asked for.

    Args:
        slot_bytes: The longest group.
        landed: Tells whether bytes of a file are there.
    """

    def __init__(self, slot_bytes: int, landed: Callable[[WeightFile, ByteRange], bool]) -> None:
        self._slot_bytes = slot_bytes
        self._landed = landed
        self._demanded: dict[Feed, None] = {}
        self._ahead: dict[WeightFile, dict[Group, None]] = {}
        self._unclaimed_bytes = 0
        #: Bytes that may be on a device before anybody asks for them; None: any number.
        self.lead_bytes: int | None = None

    def expect(self, feeds: Iterable[Feed]) -> None:
        """Take in *feeds*, tensors of one file for one device, as what will be asked for, in the order of their bytes."""
        for group in grouped(feeds, self._slot_bytes):
            self._ahead.setdefault(group.file, {})[group] = None

    def demand(self, feed: Feed) -> None:
        """Let *feed* come first: somebody waits for it."""
        if not feed.left and feed.event is None:
            for _ in grouped([feed], self._slot_bytes):
                pass  # its groups are in the feed
        self._unclaimed_bytes -= feed.ahead_bytes
        feed.ahead_bytes = 0
        feed.claimed = True
        if feed.left:
            self._demanded[feed] = None

    def demanded(self) -> tuple[Feed, ...]:
        """Return the tensors that are waited for."""
        return tuple(self._demanded)

    def missing(self, feed: Feed) -> ByteRange | None:
        """Return the first bytes of *feed* that have not landed."""
        spans = (piece.span for group in feed.groups for piece in group.pieces if piece.feed is feed)
        return next((span for span in spans if not self._landed(feed.file, span)), None)

    def begun(self, feed: Feed) -> None:
        """Count the memory that *feed* has got on its device."""
        if not feed.claimed:
            feed.ahead_bytes = feed.device_bytes
            self._unclaimed_bytes += feed.ahead_bytes

    def sent(self, group: Group) -> list[Feed]:
        """Take note that *group* is on its way; return the feeds that are now complete."""
        complete = []
        for piece in group.pieces:
            piece.feed.left -= 1
            if not piece.feed.left:
                complete.append(piece.feed)
                self._demanded.pop(piece.feed, None)
        return complete

    def idle(self) -> bool:
        """Tell whether nothing is to be done before somebody asks for another tensor."""
        return not self._demanded and not any(self._admitted())

    def forget(self) -> None:
        """Drop everything that nobody waits for."""
        self._ahead.clear()

    def next(self) -> Group | None:
        """Return what has landed and goes next, and forget it; ``None`` while there is nothing."""
        for feed in self._demanded:
            for group in feed.groups:
                run = self._run(group, feed)
                if run is not None:
                    return self._split(group, *run)
        for group in self._admitted():
            if self._landed(group.file, group.span):
                return self._split(group, 0, len(group.pieces))
        return None

    def _admitted(self) -> Iterator[Group]:
        for groups in self._ahead.values():
            for group in islice(groups, _WINDOW):
                new = sum(p.feed.device_bytes for p in group.pieces if p.feed.target is None and not p.feed.claimed)
                fits = self.lead_bytes is None or self._unclaimed_bytes + new <= self.lead_bytes
                if fits or not self._unclaimed_bytes or not new:
                    yield group

    def _run(self, group: Group, feed: Feed) -> tuple[int, int] | None:
        """Return the longest run of pieces of *group* that has landed and holds *feed*'s; ``None`` if that has not."""
        first = next(i for i, piece in enumerate(group.pieces) if piece.feed is feed)
        if not self._landed(group.file, group.pieces[first].span):
            return None
        if self._landed(group.file, group.span):
            return 0, len(group.pieces)
        stop = first + 1
        while stop < len(group.pieces) and self._landed(group.file, group.pieces[stop].span):
            stop += 1
        return first, stop

    def _split(self, group: Group, first: int, stop: int) -> Group:
        """Take the pieces *first* to *stop* out of *group*; what is left of it stays, as one group or two."""
        run, after = group.pieces[first:stop], group.pieces[stop:]
        for feed in {piece.feed for piece in group.pieces}:
            feed.groups.remove(group)
        rests = [_close(rest) for rest in (group.pieces[:first], after) if rest]
        ahead = self._ahead.get(group.file, {})
        if group in ahead:
            del ahead[group]
            if rests:
                self._ahead[group.file] = {**dict.fromkeys(rests), **ahead}
            elif not ahead:
                del self._ahead[group.file]
        return Group(run)
