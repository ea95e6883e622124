"""A file whose path was given out before the file is complete, and what happens if it never will be."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from .cache import in_flight_fd, in_flight_link
from .errors import FastloadError, FormatError, IntegrityError
from .plainway import PIECE_BYTES
from .router import ArrivingTensors, Handle, Route, real_safe_open, routed
from .served import FIRST_FD, duplicate, inode
from .supply import Supply
from .transfer import Transfer
from .weightfile import TensorSlice, WeightFile

if TYPE_CHECKING:
    import torch

#: Guessed: over how many numbers the descriptors of files are spread. The usual limit of a process is 1024.
_FDS = 100


class InFlight(Route):
    """One file behind a link that only this process can follow, until it is verified. Thread-safe.

    The last tensor that is taken waits until the file is verified; so does closing a handle that tensors were taken from.
    If it fails for good, the path stays what it was until a reader has heard why: whoever was given it may be about to look
    whether it exists, and would take another file, or tell another story.

    Args:
        pointer: Where the file will stand, and the link stands meanwhile.
        plain: Fetches the file as it would have been fetched without us, and returns where it is.
        warn: Called with what has gone another way.
        heard: Called with each error that a reader gets.

    Attributes:
        failure: Why neither way brought it.
    """

    def __init__(
        self,
        transfer: Transfer,
        file: WeightFile,
        supply: Supply,
        pointer: Path,
        plain: Callable[[], Path],
        *,
        warn: Callable[[str], object],
        heard: Callable[[Exception], object],
    ) -> None:
        super().__init__(file, supply)
        self.failure: Exception | None = None
        self.heard = heard
        self._transfer = transfer
        self._pointer = pointer
        self._plain = plain
        self._warn = warn
        self._lock = threading.RLock()
        self._closing = threading.Lock()
        self._taken: set[str] = set()
        self._final: Path | None = None
        self._stack = ExitStack()
        self._fd = -1

    def show(self) -> None:
        """Put the link where the file will stand, and let ``safe_open`` know it; waits until the file is arriving.

        Raises:
            FastloadError: The transfer failed.
            OSError: This filesystem has no links; or another process's link is there, and its number is taken here.
        """
        self._pointer.parent.mkdir(parents=True, exist_ok=True)
        linked = in_flight_fd(self._pointer)
        self._fd = duplicate(self.file.view.open(), self._number() if linked is None else linked)
        self._stack.callback(os.close, self._fd)
        try:
            if linked not in (None, self._fd):
                raise FileExistsError(f"{self._pointer} is a link of another process")
            table, names = {inode(self._fd): self}, {str(self._pointer): self}
            self._stack.enter_context(routed(table, names))
            if linked is None:
                self._link()
        except BaseException:
            self._stack.close()
            raise

    def _number(self) -> int:
        """Return which descriptor the file should have: the same in every process that reads it meanwhile.

        They share the place of the link, and it must lead each of them to the same file, or nowhere.
        """
        digest = self._transfer.digests.get(self.file.path)
        return FIRST_FD + zlib.crc32(str(digest or self.file.path).encode()) % _FDS

    def _link(self) -> None:
        try:
            os.symlink(in_flight_link(self._fd), self._pointer)
        except FileExistsError:  # published this moment, or another process was faster
            if in_flight_fd(self._pointer) not in (None, self._fd):
                raise

    def settled(self) -> bool:
        """Tell whether nothing more will happen to the file."""
        return self.file.view.ready or self.file.view.error is not None

    @property
    def doomed(self) -> Exception | None:
        """Why it will not come, if that is known: there is no other way for a file whose transfer met wrong bytes."""
        if self.failure is not None or self.file.view.ready:
            return self.failure
        error = self.file.view.error or self._transfer.error
        return error if isinstance(error, IntegrityError) else None

    @property
    def is_moot(self) -> bool:
        """As :attr:`Route.is_moot`: the file was published as its transfer failed, and nobody could say so any more."""
        if self.doomed is None or in_flight_fd(self._pointer) is not None:
            return False
        try:  # the very file that arrived here: it gets its name once it is verified
            return self._fd >= 0 and os.path.samestat(os.fstat(self._fd), os.stat(self._pointer))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the file; if it is not there by now, no link to it stays. Handles stay usable."""
        with self._closing:  # not the other lock, under which somebody may be downloading
            self.unlink()
            self._stack.close()
            self._fd = -1  # the number, and a link with it, may be another one's from now on

    def unlink(self) -> None:
        """Take the link away, if it is there. Who was given its path gets to the file by its name."""
        try:
            if self._fd >= 0 and os.readlink(self._pointer) == in_flight_link(self._fd):
                self._pointer.unlink()
        except OSError:  # it is the file's own by now
            pass

    def forked(self) -> None:
        """As :meth:`Route.forked`: the link must lead nowhere here."""
        self._stack.pop_all()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- reading -----------------------------------------------------------------------------------------------------

    def handle(self, *args: Any, **kwargs: Any) -> Handle:
        """Return a handle that checks what it gives."""
        return GuardedHandle(self, *args, **kwargs)

    def wait_verified(self) -> Path:
        """As :meth:`Route.wait_verified`; falls back to the plain way."""
        try:
            try:
                return self.file.wait_verified()
            except FastloadError as e:
                return self.rescue(e)
        except Exception as e:  # whatever the plain way raises
            self.heard(e)
            raise

    def take(self, name: str) -> None:
        """Tensor *name* is being handed out.

        Raises:
            IntegrityError: It was the last one, and the file is not what it should be.
            FastloadError: The plain way has brought the file: nobody compares any more what landed on ours.
        """
        with self._lock:
            if self._final is not None:
                raise FastloadError(f"{self.file.path} came another way")
            self._taken.add(name)
            last = len(self._taken) == len(self.file.tensors())
        if last:
            self.verify()

    def verify(self) -> None:
        """Wait until what was handed out is verified; harmless where nothing was.

        Raises:
            IntegrityError: It is wrong.
        """
        if self._taken:
            self._transfer.wait_verified([self.file.path])

    # -- the plain way -----------------------------------------------------------------------------------------------

    def rescue(self, error: FastloadError) -> Path:
        """Fetch the file the plain way, once, because ours failed with *error*; return its path, verified.

        Raises:
            IntegrityError: The bytes are wrong whatever the way, or others than those that were handed out; or those of a
                file that was asked for with this one, and ended the transfer.
            Exception: What the plain way raises.
        """
        with self._lock:
            if self._final is not None:
                return self._final
            if self.failure is not None:
                raise self.failure
            try:
                if isinstance(error, IntegrityError):
                    raise error
                self._warn(f"{self.file.path}: {type(error).__name__}: {error.message}")
                final = self._plain()
                self._compare(final)
            except Exception as e:  # somebody else's code, whose errors every reader must get
                self.failure = e
                raise
            self._final = final
            return final

    def _compare(self, final: Path) -> None:
        """Make sure that what was handed out before is what the file holds."""
        with open(final, "rb") as f:
            for name in self._taken:
                span = self.file.info(name).span
                for start in range(span.start, span.stop, PIECE_BYTES):
                    count = min(PIECE_BYTES, span.stop - start)
                    if os.pread(self._fd, count, start) != os.pread(f.fileno(), count, start):
                        raise IntegrityError(
                            f"{self.file.path}: tensor {name!r} was handed out with wrong bytes",
                            file=self.file.path,
                            hint="load again: the cache now holds the verified file",
                        )


class GuardedHandle(Handle):
    """A handle for a file in flight that nobody waits for but its reader: it verifies, and it has another way."""

    def __init__(self, route: InFlight, filename: Any, framework: str, device: Any = "cpu", **how: Any) -> None:
        super().__init__(route, filename, framework, device, **how)
        self._route = route
        self._how = (framework, device)
        self._used = False
        self._plain: Any = None

    def __exit__(self, *_error: object) -> None:
        """Close the handle; if tensors were taken, wait until their file is verified first."""
        if self._used and _error[:1] in ((), (None,)):
            self.guarded(self._route.verify, lambda plain: None)
        super().__exit__(*_error)

    def guarded(self, ours: Callable[[], Any], plain: Callable[[Any], Any]) -> Any:
        """Return ``ours()``; if our way fails, ``plain(handle)`` with a handle of the file that came the plain way."""
        try:
            if self._plain is None:
                try:
                    return ours()
                except (IntegrityError, FormatError):
                    raise
                except FastloadError as e:
                    framework, device = self._how
                    self._plain = real_safe_open()(self._route.rescue(e), framework=framework, device=device)
            return plain(self._plain)
        except Exception as e:  # whatever the plain way raises
            self._route.heard(e)
            raise

    def take(self, name: str, index: Any) -> torch.Tensor:
        """Return what *index* selects of tensor *name*."""
        self._used = True
        file = self._route.file

        def ours() -> Any:
            whole = isinstance(index, EllipsisType)
            tensor = self._whole(file, name) if whole else self._finish(file.tensor(name, index))
            self._route.take(name)
            return tensor

        def plain(handle: Any) -> Any:
            return handle.get_tensor(name) if isinstance(index, EllipsisType) else handle.get_slice(name)[index]

        return self.guarded(ours, plain)

    def keys(self) -> list[str]:
        """As the real one's."""
        return list(self.guarded(super().keys, lambda plain: plain.keys()))

    def offset_keys(self) -> list[str]:
        """As the real one's."""
        return list(self.guarded(super().offset_keys, lambda plain: plain.offset_keys()))

    def metadata(self) -> dict[str, str] | None:
        """As the real one's."""
        found: dict[str, str] | None = self.guarded(super().metadata, lambda plain: plain.metadata())
        return found

    def get_slice(self, name: str) -> TensorSlice:
        """As the real one's."""
        self.guarded(lambda: self._holding(name), lambda plain: plain.get_slice(name))
        return GuardedSlice(self, self._route, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """As the real one's."""
        return self.get_slice(name)[...]

    def get_tensors(self) -> ArrivingTensors:
        """As the real one's; each tensor when it is asked for."""
        self._opened()
        return ArrivingTensors({name: GuardedSlice(self, self._route, name) for name in self.offset_keys()})


class GuardedSlice(TensorSlice):
    """One tensor of a guarded handle."""

    __slots__ = ("_handle",)

    def __init__(self, handle: GuardedHandle, route: InFlight, name: str) -> None:
        self._file = route.file
        self._handle = handle
        self._name = name

    def get_shape(self) -> list[int]:
        """Return the shape that the file gives."""
        plain: Callable[[Any], Any] = lambda handle: handle.get_slice(self._name).get_shape()  # noqa: E731
        return list(self._handle.guarded(super().get_shape, plain))

    def get_dtype(self) -> str:
        """Return the element type in safetensors' spelling."""
        plain: Callable[[Any], Any] = lambda handle: handle.get_slice(self._name).get_dtype()  # noqa: E731
        return str(self._handle.guarded(super().get_dtype, plain))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._handle.take(self._name, index)
