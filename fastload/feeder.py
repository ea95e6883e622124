"""Feeds devices: bytes of weight files go through page-locked slots to tensors on CUDA devices while others still arrive.

One thread a load reads what has landed (of a file that arrives, that another process fetches, or that is there already,
all the same) into a free slot and starts its copy on a side stream; it waits for the journal and for slots, never for the
device as a whole.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from .copies import Copies
from .device import device_error
from .errors import FastloadError
from .lane import hand_out
from .staging import Feed, Group, Staging, feed_of, feedable
from .transfer import Transfer
from .types import ByteRange

if TYPE_CHECKING:
    import torch

    from .weightfile import WeightFile

#: Measured for the journal's own waits: under 1 % of a core, and below the time in which a fast link fills a range.
_POLL_S = (0.0005, 0.004)
#: Guessed: a wish that got lost costs a reader this long.
_DEMAND_AGAIN_S = 0.25

_Key = tuple["WeightFile", str, "torch.device", "torch.dtype"]


class Feeder:
    """Hands out tensors on CUDA devices, fed through a fixed number of slots. Thread-safe; close it.

    Its thread lives while there is something to do. The first failure ends all waits: everybody gets the same error.

    Args:
        transfer: Where the bytes come from; its events tell what was copied and who waited.
        pinned_bytes: Memory of all slots.
        verify: Read every byte back from the device and compare.

    Attributes:
        error: What ended it.
    """

    def __init__(self, transfer: Transfer, pinned_bytes: int, *, verify: bool = False) -> None:
        self.error: FastloadError | None = None
        self._transfer = transfer
        self._events = transfer.events
        self._copies = Copies(self._events, pinned_bytes, verify=verify)
        self._staging = Staging(self._copies.slot_bytes, self._landed)
        self._changed = threading.Condition()
        #: Files whose heads have not landed, and where their tensors are to go.
        self._coming: dict[WeightFile, tuple[torch.device, torch.dtype | None]] = {}
        #: What nobody has asked for yet.
        self._expected: dict[_Key, Feed] = {}
        #: Whose memory copies may still write to; it goes back to torch when they are over, not before.
        self._held: set[Feed] = set()
        self._asked_s: dict[Feed, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- for readers -------------------------------------------------------------------------------------------------

    def expect(self, file: WeightFile, device: torch.device, dtype: torch.dtype | None, lead_bytes: int | None) -> None:
        """Begin to bring all tensors of *file* to *device* before anybody asks for them; waits for the file's head.

        Args:
            file: Its tensors follow those of files that were named before.
            device: With an index.
            dtype: Floating tensors are cast to it; ``None``: stay.
            lead_bytes: What may lie there unasked, from now on and of all files; ``None``: all of it.
        """
        infos = [info for info in file.tensors().values() if feedable(info)]
        feeds = [feed_of(file, info.name, device, dtype) for info in infos]
        with self._changed:
            self._staging.lead_bytes = lead_bytes
            self._staging.expect(feeds)
            self._expected.update({_key(feed): feed for feed in feeds})
            self._wake()

    def bring(self, files: Iterable[WeightFile], device: torch.device, dtype: torch.dtype | None) -> None:
        """As :meth:`expect` of all *files*, without a limit and without waiting: each begins when its head has landed.

        The tensors of a file get their memory together, so that torch's allocator asks the device once a file.
        """
        with self._changed:
            self._staging.lead_bytes = None
            self._coming.update(dict.fromkeys(files, (device, dtype)))
            self._wake()

    def take(self, file: WeightFile, name: str, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return tensor *name* of *file* on *device*, the caller's own, once all its bytes are on their way there.

        Work that the calling thread gives its current stream from now on finds them arrived.

        Raises:
            DeviceError: The device failed or is full.
            FastloadError: The transfer failed.
        """
        started_s = self._events.clock()
        waited = False
        wanted = feed_of(file, name, device, dtype)
        with self._changed:
            while file in self._coming:  # its head has landed, and the thread is about to see that
                self._check()
                self._changed.wait()
            feed = self._expected.pop(_key(wanted), wanted)
            self._held.add(feed)
            self._staging.demand(feed)
            self._wake()
            while feed.event is None or feed.target is None:
                waited = True
                self._check()
                self._changed.wait()
            self._check()
            target = feed.target
            try:
                hand_out(target, feed.event)
            except (RuntimeError, AssertionError) as e:
                raise self._fail(device_error(e, device, f"tensor {name!r} was handed out")) from e
            self._held.discard(feed)
            self._wake()
        if waited:
            span = feed.info.span
            seconds = self._events.clock() - started_s
            self._events.emit("build.waited", file=file.path, seconds=seconds, start=span.start, stop=span.stop)
        return target

    def settle(self) -> None:
        """Wait until all copies are over, and drop what nobody asked for.

        Raises:
            DeviceError: One failed, or what came back differs: what was handed out is worthless.
        """
        self._stop()
        with self._changed:
            self._check()
            try:
                self._copies.retire_all()
            except FastloadError as e:
                raise self._fail(e) from e.__cause__
            self._expected.clear()
            self._held = {feed for feed in self._held if feed.event is None}

    def close(self) -> None:
        """End all waits, wait for the copies on their way, and give everything back. Harmless when repeated."""
        self._closed = True
        self._stop()
        with self._changed:
            self._copies.close()
            for feed in (*self._expected.values(), *self._held):
                feed.target = None  # whoever keeps the error keeps the feed
            self._expected.clear()
            self._held.clear()

    def _stop(self) -> None:
        """Let the thread end once nobody waits for a tensor."""
        with self._changed:
            self._staging.forget()
            self._coming.clear()
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self._closed:
            raise FastloadError("the stream is closed", hint="read inside the `with fastload.stream(...)` block")

    def _fail(self, error: FastloadError) -> FastloadError:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
            return self.error

    # -- the thread --------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Let the thread look again; start one if there is none. Called with the lock."""
        if self._thread is None and self.error is None and not self._closed and not self._idle():
            self._thread = threading.Thread(target=self._run, name="fastload-feed")
            self._thread.start()
        self._changed.notify_all()

    def _idle(self) -> bool:
        return not self._coming and self._staging.idle()

    def _run(self) -> None:
        try:
            for device in {device for device, _ in tuple(self._coming.values())}:
                self._copies.prepare(device)
            while self._step():
                pass
        except FastloadError as e:
            traceback.clear_frames(e.__traceback__)  # they hold tensors
            self._fail(e)
        except Exception as e:  # nobody else would see it, and everybody would wait for ever
            traceback.clear_frames(e.__traceback__)
            error = FastloadError(f"feeding the device failed: {type(e).__name__}: {e}")
            error.__cause__ = e
            self._fail(error)
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._thread = None
                self._changed.notify_all()

    def _step(self) -> bool:
        """Send one group; return whether there was one."""
        group = self._next()
        if group is None:
            return False
        event, fresh = self._copies.send(group)
        with self._changed:
            for feed in fresh:
                self._staging.begun(feed)
            for feed in self._staging.sent(group):
                feed.event = event
                self._asked_s.pop(feed, None)
            self._changed.notify_all()
        return True

    def _next(self) -> Group | None:
        """Wait for the next group whose bytes have landed; ``None`` when there is nothing more to wait for."""
        pause_s, longest_s = _POLL_S
        while True:
            self._take_in()
            with self._changed:
                if self._closed or self.error is not None:
                    return None
                group = self._staging.next()
                if group is not None:
                    return group
                # The last: the program ended without closing us, and the interpreter waits for this thread.
                if self._idle() or not threading.main_thread().is_alive():
                    self._thread = None
                    return None
                self._ask()
                self._changed.wait(pause_s)
            pause_s = min(pause_s * 1.3, longest_s)
            self._copies.retire_done()

    def _take_in(self) -> None:
        """Take in the first file whose head has landed; one at a time, so that copies need not wait for all heads."""
        for file, (device, dtype) in tuple(self._coming.items()):
            infos = file.landed_tensors(partial(self._landed, file))
            if infos is None:
                continue
            feeds = [feed_of(file, info.name, device, dtype) for info in infos.values() if feedable(info)]
            self._copies.allocate(device, feeds)
            with self._changed:
                if self._coming.pop(file, None) is not None:  # else nobody wants it any more
                    self._staging.expect(feeds)
                    self._expected.update({_key(feed): feed for feed in feeds})
                    self._changed.notify_all()
            return

    def _ask(self) -> None:
        """Ask the owners of the files to fetch next what somebody waits for. Called with the lock."""
        now_s = self._events.clock()
        for feed in self._staging.demanded():
            if now_s - self._asked_s.get(feed, float("-inf")) > _DEMAND_AGAIN_S:
                self._asked_s[feed] = now_s
                span = self._staging.missing(feed)
                journal = feed.file.view.journal
                try:
                    if span is not None and journal is not None:
                        journal.demand(span.start)
                except ValueError:  # closed meanwhile: reading says so
                    pass

    def _landed(self, file: WeightFile, span: ByteRange) -> bool:
        """Tell whether waiting for *span* would end at once, well or with an error."""
        view = file.view
        if view.ready or view.error is not None or self._transfer.error is not None:
            return True
        if not view.known:
            return False
        try:
            view.open()
            return view.journal is None or view.journal.has(span)
        except (ValueError, FastloadError):  # closed meanwhile, or the transfer failed: who waits is told
            return True


def _key(feed: Feed) -> _Key:
    return feed.file, feed.info.name, feed.device, feed.final
