"""One load, from its transfer to what the caller gets: the part that sync and asyncio calls share. Blocks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .asking import Asked
from .device import device_errors, import_torch
from .errors import DeviceError, PluginError, UnsupportedSourceError
from .events import Events
from .garbage import rarely
from .plugins import call_hook
from .profile import Profile
from .profile import begin as begin_profile
from .runtimes import hint_for
from .tensors import TensorStream
from .transfer import Transfer
from .types import Snapshot
from .zerocopy import zero_copy_bytes

if TYPE_CHECKING:
    import torch


class Loading:
    """One load over one transfer. A context manager: tells observers how the load began and ended.

    Attributes:
        profile: Of this load; collected by every open ``fastload.profile()`` block.
    """

    def __init__(self, asked: Asked, transfer: Transfer) -> None:
        self._asked = asked
        self.transfer = transfer
        self._streams: list[TensorStream] = []
        self.profile: Profile = begin_profile(asked.request.source)
        # Other loads may share the transfer: what is told of this one goes to its own observers only.
        self._events = Events((self.profile.observe, *asked.observers), transfer.events.clock)

    def __enter__(self) -> Loading:
        self.transfer.events.add(self._events.pass_on)
        self._started_s = self._events.clock()
        self._events.emit("load.started", source=self._asked.request.source)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        rarely.end(failed=error is not None)
        seconds = self._events.clock() - self._started_s
        self.transfer.events.remove(self._events.pass_on)
        if error is None:
            self._events.emit("load.finished", seconds=seconds)
        else:
            self._events.emit("load.failed", seconds=seconds, error=type(error).__name__, message=str(error))

    def snapshot(self) -> Snapshot:
        """Return the snapshot once every file of it is verified, and the transfer over."""
        self.transfer.wait(lambda: self.transfer.finished)
        return self.transfer.wait_manifest()

    # -- streams -----------------------------------------------------------------------------------------------------

    def open_stream(self, device: Any, dtype: Any) -> TensorStream:
        """Return a stream over the weights, with this load's profile."""
        asked = self._asked
        stream = TensorStream(
            self.transfer, asked.pm, device=device, dtype=dtype, settings=asked.settings, lock=asked.lock
        )
        stream.profile = self.profile
        self._streams.append(stream)
        return stream

    @contextmanager
    def stream(self, device: Any, dtype: Any) -> Iterator[TensorStream]:
        """Give a stream; leaving the block without an exception verifies what was delivered."""
        stream = self.open_stream(device, dtype)
        try:
            yield stream
            self.verify_delivered()
        finally:
            stream.close()

    def verify_delivered(self) -> None:
        """Wait until every file that tensors were taken from is verified, and every copy to a device over.

        Raises:
            DeviceError: A copy failed.
            IntegrityError: What was handed out is not what the file holds now.
        """
        for stream in self._streams:
            stream.settle()
        files = tuple(self.transfer.files.items())
        self.transfer.wait_verified(p for p, view in files if view.delivered)
        if all(view.ready for _, view in files):  # nothing is given up: let it finish
            self.transfer.wait(lambda: self.transfer.finished)

    # -- whole results -----------------------------------------------------------------------------------------------

    def tensors(self, device: Any, dtype: Any) -> dict[str, torch.Tensor]:
        """Return all tensors, verified."""
        self._import_early()
        snapshot = self.transfer.wait_manifest()
        if not self.transfer.weights:
            raise UnsupportedSourceError(
                f"{snapshot.source}: none of the {len(snapshot.files)} files holds tensors{self._left()}",
                hint=self._onward() or "files= chooses others; fastload.prefetch fetches files of any kind",
            )

        def collect() -> dict[str, torch.Tensor]:
            stream = self.open_stream(device, dtype)
            try:
                return stream.collect()
            finally:
                stream.close()

        collected: dict[str, torch.Tensor] = self._verified(collect)
        return collected

    def build(self, framework: str | None, device: Any, dtype: Any) -> Any:
        """Return what the framework's plugin builds, everything under it verified."""
        self._import_early()

        def build() -> Any:
            snapshot = self.transfer.wait_manifest()
            self.transfer.wait_files(p for p in self.transfer.files if p not in set(self.transfer.weights))
            stream = self.open_stream(device, dtype)
            self._events.emit("build.started", framework=framework)
            try:
                with self._events.span("build.finished", framework=framework), device_errors():
                    built = call_hook(
                        self._asked.pm,
                        "fastload_build_model",
                        framework=framework,
                        snapshot=snapshot,
                        stream=stream,
                        options={**self._asked.options, "device": device, "dtype": dtype},
                    )
                    stream.settle()
                    return built
            finally:
                stream.close()

        built = self._verified(build)
        if built is None:
            raise UnsupportedSourceError(
                f"no plugin builds {self._asked.request.source}"
                + (f" with framework={framework!r}" if framework else "")
                + self._left(),
                hint=self._onward()
                or "fastload.load_tensors gives the tensors of any model; `fastload plugins` lists what is installed",
            )
        return built

    def _import_early(self) -> None:
        """Begin to import torch, which whoever builds will need, while the hub is asked what there is (0.3 s).

        In a thread, because Ctrl-C reaches the main one: there, while it waits, not in the middle of an import that may
        swallow it.
        """
        if self._asked.settings.pause_gc:
            rarely.begin()
        if "torch" not in sys.modules:
            threading.Thread(target=_import_torch, name="fastload-import").start()

    def _measure(self, result: Any) -> None:
        """Tell how much of *result* was never copied."""
        views = tuple(self.transfer.files.values())
        places = [place for view in views if (place := view.place) is not None]
        found = zero_copy_bytes(result, places, [span for view in views if (span := view.mapped) is not None])
        if found is not None:
            self._events.emit("result.measured", zero_copy_bytes=found[0], bytes=found[1])

    def _left(self) -> str:
        left = self.transfer.left
        return f"; there is {', '.join(left[:4])}{' …' if left[4:] else ''} for other runtimes" if left else ""

    def _onward(self) -> str | None:
        """Return how to bring weights to the runtime that they are for, if that is all there is."""
        left = self.transfer.left
        return hint_for(self.transfer.wait_manifest().source, left[0]) if left else None

    def _verified(self, make: Any) -> Any:
        """Return what *make* returns, once all files are verified; make it again if some had been wrong meanwhile."""
        while True:
            try:
                made = make()
            except DeviceError:  # no fault of the bytes
                raise
            except Exception:  # the framework may choke on wrong bytes before their digest is known
                self.transfer.check()
                self.transfer.wait_files(path for path, view in tuple(self.transfer.files.items()) if view.unproven)
                if not self._wait_and_refresh():
                    raise
                continue
            self._measure(made)  # now, while the last bytes are hashed: it takes milliseconds
            self.transfer.wait_files()
            if not self._wait_and_refresh():
                self.transfer.wait(lambda: self.transfer.finished)
                return made

    def _wait_and_refresh(self) -> bool:
        """If a file was started over under its readers, wait for it, forget what was read, and return True."""
        changed = [path for path, view in tuple(self.transfer.files.items()) if view.changed()]
        if not changed:
            return False
        self.transfer.wait_files(changed)
        for path in changed:
            self.transfer.files[path].close()
        return True


def _import_torch() -> None:
    try:
        import_torch()
    except (PluginError, OSError):  # none, or one with broken libraries: who needs it will say so
        pass
