"""A file whose path was given out before the file is complete, and what happens if it never will be."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from .cache import in_flight_link
from .digest import Hasher, mismatch
from .errors import FastloadError, FastloadWarning, FormatError, IntegrityError
from .router import ArrivingTensors, Handle, Route, real_safe_open, routed
from .served import duplicate, inode
from .supply import Supply
from .transfer import Transfer
from .types import Digest
from .weightfile import TensorSlice, WeightFile

if TYPE_CHECKING:
    import torch

#: Measured for other hashes of this package: larger pieces cost nothing extra.
_PIECE_BYTES = 16 << 20


class InFlight(Route):
    """One file behind a link that only this process can follow, until it is verified. Thread-safe.

    The last tensor that is taken waits until the file is verified; so does closing a handle that tensors were taken from.

    Args:
        pointer: Where the file will stand, and the link stands meanwhile.
        plain: Fetches the file as it would have been fetched without us, and returns where it is.

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
    ) -> None:
        super().__init__(file, supply)
        self.failure: Exception | None = None
        self._transfer = transfer
        self._pointer = pointer
        self._plain = plain
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
            OSError: This filesystem has no links.
        """
        self._fd = duplicate(self.file.view.open())
        self._stack.callback(os.close, self._fd)
        table, names = {inode(self._fd): self}, {str(self._pointer): self}
        try:
            self._stack.enter_context(routed(table, names))
            self._pointer.parent.mkdir(parents=True, exist_ok=True)
            self._link()
        except BaseException:
            self._stack.close()
            raise

    def _link(self) -> None:
        if os.path.islink(self._pointer) and not os.path.exists(self._pointer):  # a crash left it
            self._pointer.unlink(missing_ok=True)
        try:
            os.symlink(in_flight_link(self._fd), self._pointer)
        except FileExistsError:  # published this moment; or a file that somebody knows more of than we do
            pass

    def settled(self) -> bool:
        """Tell whether nothing more will happen to the file."""
        return self.file.view.ready or self.file.view.error is not None

    def close(self) -> None:
        """Let go of the file; if it is not there by now, no link to it stays. Handles stay usable."""
        with self._closing:  # not the other lock, under which somebody may be downloading
            self._unlink()
            self._stack.close()

    def _unlink(self) -> None:
        try:
            if self._fd >= 0 and os.readlink(self._pointer) == in_flight_link(self._fd):
                self._pointer.unlink()
        except OSError:  # it is the file's own by now
            pass

    # -- reading -----------------------------------------------------------------------------------------------------

    def handle(self, *args: Any, **kwargs: Any) -> Handle:
        """Return a handle that checks what it gives."""
        return GuardedHandle(self, *args, **kwargs)

    def wait_verified(self) -> Path:
        """As :meth:`Route.wait_verified`; falls back to the plain way."""
        try:
            return self.file.wait_verified()
        except FastloadError as e:
            return self.rescue(e)

    def take(self, name: str) -> None:
        """Tensor *name* is being handed out.

        Raises:
            IntegrityError: It was the last one, and the file is not what it should be.
        """
        with self._lock:
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
            IntegrityError: The bytes are wrong whatever the way, or others than those that were handed out.
            Exception: What the plain way raises.
        """
        with self._lock:
            if self._final is not None:
                return self._final
            if self.failure is not None:
                raise self.failure
            try:
                if isinstance(error, IntegrityError) and error.file in (None, self.file.path):
                    raise error
                self._unlink()
                warnings.warn(
                    f"fastload: {self.file.path}: {type(error).__name__}: {error.message}; it is downloaded the plain way",
                    FastloadWarning,
                    stacklevel=3,
                )
                final = self._plain()
                check_digest(final, self.file.path, self._transfer.digests.get(self.file.path))
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
                for start in range(span.start, span.stop, _PIECE_BYTES):
                    count = min(_PIECE_BYTES, span.stop - start)
                    if os.pread(self._fd, count, start) != os.pread(f.fileno(), count, start):
                        raise IntegrityError(
                            f"{self.file.path}: tensor {name!r} was handed out with wrong bytes",
                            file=self.file.path,
                            hint="load again: the cache now holds the verified file",
                        )


def check_digest(path: Path, name: str, digest: Digest | None) -> None:
    """Hash *path*, and remove it if it is not *digest*; harmless where nobody knows what it should be.

    Raises:
        IntegrityError: It is not.
    """
    if digest is None:
        return
    hasher = Hasher(digest, os.path.getsize(path))
    with open(path, "rb") as f:
        while piece := f.read(_PIECE_BYTES):
            hasher.update(piece)
    if not hasher.matches():
        Path(os.path.realpath(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise mismatch(name, digest, hasher.actual, "the plain way", final=True)


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
        if self._plain is None:
            try:
                return ours()
            except (IntegrityError, FormatError):
                raise
            except FastloadError as e:
                framework, device = self._how
                self._plain = real_safe_open()(self._route.rescue(e), framework=framework, device=device)
        return plain(self._plain)

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
