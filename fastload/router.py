"""The ``safe_open`` router: unchanged programs read files that still arrive.

While routes exist, the name ``safe_open`` of the safetensors package is bound to :class:`safe_open` below in every
module that holds it. For a file with a route it returns a handle that waits for bytes; for all others it is the real
one. When the last route goes, every module gets the real one back.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import is_in_flight
from .device import parse_device, to_device
from .interception import Rebound
from .supply import SuppliedSlice, Supply
from .weightfile import TensorSlice, WeightFile

if TYPE_CHECKING:
    import torch

#: Device and inode: what a file is, whatever path leads to it.
Inode = tuple[int, int]

#: Specified (safetensors): its names of PyTorch.
_TORCH = ("pt", "torch", "pytorch")


@dataclass(eq=False, slots=True, weakref_slot=True)
class Route:
    """How one file is served.

    Attributes:
        supply: Brings its tensors to devices.
        defers: Whether tensors that are read to the CPU are stand-ins, which a reader sends on to a device by our way;
            then the file is served by us when it is complete, too.
    """

    file: WeightFile
    supply: Supply
    defers: bool = False

    def handle(self, *args: Any, **kwargs: Any) -> Handle:
        """Return a handle for ``safe_open(*args, **kwargs)``."""
        return Handle(self, *args, **kwargs)

    @property
    def is_moot(self) -> bool:
        """Whether the file is in its place, and this route has nothing to add."""
        return False

    def wait_verified(self) -> Path:
        """Block until the file is verified; return its final path."""
        return self.file.wait_verified()

    def forked(self) -> None:
        """This is a process that was forked: what arrives, arrives in the parent."""


class _Routes:
    """Which files are routed, and the real ``safe_open`` while it is replaced. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.files: dict[Inode, list[Route]] = {}
        self.names: dict[str, Route] = {}
        self.real: Any = None
        self.replaced: Rebound | None = None

    def find(self, filename: Any) -> Route | None:
        if not self.files:
            return None
        try:
            path = Path(os.fsdecode(filename))
            with self.lock:
                named = self.names.get(_name(path))
            if named is not None:  # whatever stands there now: another process may have put its link there
                return named
            stat = os.stat(path)
        except (OSError, TypeError, ValueError):
            return None  # the real one has its own words for it
        with self.lock:
            found = self.files.get((stat.st_dev, stat.st_ino))
            foreign = found and found[-1] in self.names.values() and is_in_flight(path)
        if foreign:  # another process's link, whose number means another file here
            raise FileNotFoundError(errno.ENOENT, "Another process is fetching this file", str(path))
        return found[-1] if found else None


_routes = _Routes()


@contextmanager
def routed(table: Mapping[Inode, Route], names: Mapping[str, Route] | None = None) -> Iterator[None]:
    """Serve the files of *table* through ``safe_open``, in all threads, for the length of the block.

    Blocks may overlap, also for the same file: the newest route wins. Whoever routes a file keeps it open, so that its
    inode means nothing else meanwhile.

    Args:
        names: What these paths, absolute or not, stand for, whatever is there.
    """
    names = {_name(Path(name)): route for name, route in (names or {}).items()}
    with _routes.lock:
        if not _routes.files:
            _install()
        for inode, route in table.items():
            _routes.files.setdefault(inode, []).append(route)
        _routes.names.update(names)
    try:
        yield
    finally:
        with _routes.lock:
            for inode, route in table.items():
                routes = _routes.files.get(inode, [])
                if route in routes:  # not if this process was forked inside the block
                    routes.remove(route)
                if not routes:
                    _routes.files.pop(inode, None)
            for name, route in names.items():
                if _routes.names.get(name) is route:
                    del _routes.names[name]
            if not _routes.files:
                _uninstall()


def named(path: Path) -> Route | None:
    """Return what *path* stands for by its name."""
    with _routes.lock:
        return _routes.names.get(_name(path))


def _name(path: Path) -> str:
    """Return *path* as it is the same for everybody who means it, its last part unresolved: it may be our link."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _forked() -> None:
    """Nobody would ever wake a reader here: every file is the parent's."""
    _routes.lock = threading.Lock()
    if _routes.files:
        for route in {*_routes.names.values(), *(r for routes in _routes.files.values() for r in routes)}:
            route.forked()
        _routes.files, _routes.names = {}, {}
        _uninstall()


os.register_at_fork(after_in_child=_forked)


def real_safe_open() -> Any:
    """Return safetensors' own ``safe_open``, whatever its name is bound to."""
    import safetensors

    return safetensors.safe_open if _routes.real is None else _routes.real


def _install() -> None:
    import safetensors

    if _routes.real is None:
        _routes.real = safetensors.safe_open
    _routes.replaced = Rebound(_routes.real, safe_open, "safetensors")


def _uninstall() -> None:
    if _routes.replaced is not None:
        _routes.replaced.give_back()
        _routes.replaced = None


class _Routing(type):
    """Keeps ``isinstance(handle, safe_open)`` true for both kinds of handles."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Handle) or (_routes.real is not None and isinstance(instance, _routes.real))


class safe_open(metaclass=_Routing):
    """Stands in for ``safetensors.safe_open`` while files arrive."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a streaming handle for a file that arrives, for every other one what the real one returns."""
        filename = args[0] if args else kwargs.get("filename")
        route = _routes.find(filename)
        if route is None or route.is_moot:
            return _routes.real(*args, **kwargs)
        framework = args[1] if len(args) > 1 else kwargs.get("framework")
        if framework in _TORCH and (route.defers or not route.file.view.ready):
            return route.handle(*args, **kwargs)
        final = route.wait_verified()
        if args:
            return _routes.real(final, *args[1:], **kwargs)
        return _routes.real(**{**kwargs, "filename": final})


class Handle:
    """What ``safe_open`` returns for a file that arrives: the real one's methods, which wait for their bytes.

    Arguments that only choose how the real one reads (``backend`` …) are accepted and change nothing.
    """

    def __init__(self, route: Route, filename: Any, framework: str, device: Any = "cpu", **_how: Any) -> None:
        self._file: WeightFile | None = route.file
        self._supply = route.supply
        self._defers = route.defers
        self._device = parse_device(device)

    def __enter__(self) -> Handle:
        """Return the handle."""
        self._opened()
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the handle; slices and tensors that it gave stay usable."""
        self._file = None

    def _opened(self) -> WeightFile:
        if self._file is None:
            raise _safetensor_error("File is closed")
        return self._file

    def _holding(self, name: str) -> WeightFile:
        file = self._opened()
        if name not in file.tensors():
            raise _safetensor_error(f"File does not contain tensor {name}")
        return file

    def _finish(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self._device)

    def _whole(self, file: WeightFile, name: str) -> torch.Tensor:
        if self._device.type == "cpu" and self._defers:
            return self._supply.defer(file, name)
        return self._supply.place(file, name, self._device)

    def _slice(self, file: WeightFile, name: str) -> TensorSlice:
        return SuppliedSlice(file, name, self._finish, self._whole)

    def keys(self) -> list[str]:
        """Return the names, sorted, as the real one does."""
        return sorted(self._opened().tensors())

    def offset_keys(self) -> list[str]:
        """Return the names in the order of their bytes."""
        return list(self._opened().tensors())

    def metadata(self) -> dict[str, str] | None:
        """Return the free-form part of the header, or ``None``."""
        return self._opened().metadata() or None

    def get_slice(self, name: str) -> TensorSlice:
        """Return a stand-in for tensor *name* that waits when it is indexed."""
        return self._slice(self._holding(name), name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return tensor *name* once it has landed."""
        return self._whole(self._holding(name), name)

    def get_tensors(self) -> ArrivingTensors:
        """Return all tensors: the names at once, each tensor when it is asked for and has landed."""
        file = self._opened()
        return ArrivingTensors({name: self._slice(file, name) for name in file.tensors()})


class ArrivingTensors(dict[str, Any]):
    """A dict of tensors whose values wait until they have landed; its order is that of the bytes."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, TensorSlice):
            value = value[...]
            self[name] = value
        return value

    # Defined so that dict(x), {**x} and the like take keys() and [], not the values that wait inside.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the tensor, or *default*."""
        if name not in self:
            return default
        return self[name]

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return the tensor; *default*, now stored, where there is none."""
        if name not in self:
            self[name] = default
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:
        """Remove the tensor and return it, or *default*."""
        if name in self:
            self[name]
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        """Remove the last tensor and return its name and it."""
        name = next(reversed(self))
        return name, self.pop(name)

    def items(self) -> Any:
        """Return a view of names and tensors; iterating waits tensor by tensor."""
        return ItemsView(self)

    def values(self) -> Any:
        """Return a view of the tensors; iterating waits tensor by tensor."""
        return ValuesView(self)

    def copy(self) -> dict[str, Any]:
        """Return a plain dict; waits for all."""
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __eq__(self, other: object) -> bool:
        return dict(self) == other

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} tensors that may still be arriving>"

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _safetensor_error(message: str) -> Exception:
    """Return the error that the real handle raises, for programs that catch it."""
    from safetensors import SafetensorError

    return SafetensorError(message)
