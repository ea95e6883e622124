"""One weight file, complete or arriving: which tensors it holds, and each as a view of the file's mapping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from .device import DTYPES, dtype_code, import_torch, torch_dtype
from .errors import FormatError, NotFoundError, PluginError, UnsupportedSourceError
from .late import Late
from .plugins import call_hook, call_plugin
from .runtimes import hint_for, what_is
from .transfer import Transfer
from .types import ByteRange, Format, NeedBytes, TensorInfo

if TYPE_CHECKING:
    import pluggy
    import torch
else:
    pluggy, torch = Late("pluggy"), Late("torch")

#: Specified (hook ``fastload_format``): how much of a file the hook gets to see.
HEAD_BYTES = 64 * 1024


class _NotLanded(Exception):
    """Bytes would have to be waited for."""


class WeightFile:
    """The tensors of one file. Thread-safe; every method may block until the bytes that it needs have landed.

    Tensors are zero-copy views of the view's private mapping, one storage each: writing to one changes neither the
    file nor any other tensor, and a tensor keeps the mapping alive. Tensors of a format that reads whole files alone are
    what its ``load`` gave; they are no ranges of the file (their spans are empty), which is verified before it is read.

    Attributes:
        path: Relative to the snapshot.
        view: The file.
    """

    def __init__(self, transfer: Transfer, path: str, pm: pluggy.PluginManager) -> None:
        self.path = path
        self.view = transfer.files[path]
        self._transfer = transfer
        self._pm = pm
        self._lock = threading.Lock()
        self._tensors: dict[str, TensorInfo] | None = None
        self._metadata: dict[str, str] = {}
        self._loaded: Mapping[str, torch.Tensor] | None = None

    def wait_verified(self) -> Path:
        """Block until the file is verified; return its final path."""
        snapshot = self._transfer.wait_manifest()
        self._transfer.wait_files([self.path])
        return snapshot.path / self.path

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return all tensors by name, in the order of their bytes; waits for the head of the file.

        Raises:
            FormatError: The file is not sound; names the file and, where it is one, the tensor.
            UnsupportedSourceError: No plugin reads this kind of file.
        """
        with self._lock:
            if self._tensors is None:
                self._tensors, self._metadata = self._parse(self.view.read)
            return self._tensors

    def landed_tensors(self, landed: Callable[[ByteRange], bool]) -> Mapping[str, TensorInfo] | None:
        """As :meth:`tensors`, but ``None`` while that would wait; always, where whole files alone are read.

        Args:
            landed: Tells which bytes are there.
        """

        def read(span: ByteRange) -> bytes:
            if not landed(span):
                raise _NotLanded
            return self.view.read(span)

        if not self._lock.acquire(blocking=False):  # somebody waits in there
            return None
        try:
            if self._tensors is None:
                self._tensors, self._metadata = self._parse(read, wait=False)
            return self._tensors
        except _NotLanded:
            return None
        finally:
            self._lock.release()

    def metadata(self) -> dict[str, str]:
        """Return the free-form part of the file's head; empty where there is none."""
        self.tensors()
        return dict(self._metadata)

    def info(self, name: str) -> TensorInfo:
        """Return what the file says about tensor *name*.

        Raises:
            NotFoundError: It has no such tensor.
        """
        found = self.tensors().get(name)
        if found is None:
            raise NotFoundError(f"{self.path}: no tensor {name!r}", hint=nearest(name, self.tensors()))
        return found

    def tensor(self, name: str, index: Any = ...) -> torch.Tensor:
        """Return tensor *name* on the CPU, or the part that *index* selects; waits only for the rows it needs."""
        info = self.info(name)
        if self._loaded is not None:
            return self._loaded[name] if isinstance(index, EllipsisType) else self._loaded[name][index]
        whole = self._whole(info)
        self.view.wait(_rows(info.span, whole.shape, index))
        return whole if isinstance(index, EllipsisType) else whole[index]

    def _whole(self, info: TensorInfo) -> torch.Tensor:
        """Return the tensor, landed or not."""
        torch = import_torch()
        dtype = torch_dtype(info.dtype)
        shape = list(info.shape)
        if DTYPES[info.dtype][0] < 8:  # two elements share a byte, and torch counts bytes
            if shape[-1] % 2:
                raise FormatError(f"{self.path}: tensor {info.name!r} ({info.dtype}) has rows that end within a byte")
            shape[-1] //= 2
        if not len(info.span):
            return torch.empty(shape, dtype=dtype)
        data = torch.frombuffer(self.view.mapping(), dtype=torch.uint8, count=len(info.span), offset=info.span.start)
        return data.view(dtype).view(shape)

    def _load(self, name: str, load: Callable[[Path], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        try:
            return call_plugin(name, load, self.wait_verified())
        except UnsupportedSourceError as e:  # the format knows what it is, not where it comes from
            source = self._transfer.wait_manifest().source
            raise UnsupportedSourceError(e.message, hint=e.hint or hint_for(source, self.path, e.message)) from e

    def _parse(
        self, read: Callable[[ByteRange], bytes], *, wait: bool = True
    ) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        head = read(ByteRange(0, min(HEAD_BYTES, self.view.size)))
        found: Format | None = call_hook(self._pm, "fastload_format", filename=self.path, head=head)
        if found is None:
            what = what_is(head)
            raise UnsupportedSourceError(
                f"{self.path}: no plugin reads this kind of weight file" + (f"; it is {what}" if what else ""),
                hint=hint_for(self._transfer.wait_manifest().source, self.path, what or ""),
            )
        if (load := getattr(found, "load", None)) is not None:
            if not wait:
                raise _NotLanded
            self._loaded, infos = call_plugin(found.name, _described, self._load(found.name, load))
            return infos, _metadata(found, head)
        while isinstance(answer := call_plugin(found.name, found.parse, head), NeedBytes):
            if answer.count > self.view.size:
                raise FormatError(f"{self.path}: its head claims {answer.count} bytes, the file has {self.view.size}")
            if answer.count <= len(head):
                raise PluginError(f"{self.path}: {found.name} asks again for bytes that it has", plugin=found.name)
            head = read(ByteRange(0, max(answer.count, min(answer.likely, self.view.size))))
        tensors = call_plugin(found.name, _in_order, answer)
        call_plugin(found.name, check_tensors, self.path, self.view.size, tensors)
        expected_bytes = getattr(found, "file_bytes", self.view.size)
        if expected_bytes != self.view.size:
            raise FormatError(f"{self.path}: has {self.view.size} bytes, by its head it should have {expected_bytes}")
        return {t.name: t for t in tensors}, _metadata(found, head)


def _in_order(answer: Iterable[TensorInfo]) -> list[TensorInfo]:
    return sorted(answer, key=lambda t: (t.span.start, t.span.stop))


def _described(loaded: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, TensorInfo]]:
    """Return what a format loaded, and what there is to say of it; the tensors are no ranges of the file."""
    nowhere = ByteRange(0, 0)
    return dict(loaded), {n: TensorInfo(n, dtype_code(t.dtype), tuple(t.shape), nowhere) for n, t in loaded.items()}


def _metadata(found: Format, head: bytes) -> dict[str, str]:
    metadata = getattr(found, "metadata", None)
    return dict(call_plugin(found.name, metadata, head)) if metadata is not None else {}


class TensorSlice:
    """One tensor that may still be arriving; indexing it waits for the rows that the index needs."""

    __slots__ = ("_file", "_finish", "_name")

    def __init__(self, file: WeightFile, name: str, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
        file.info(name)
        self._file = file
        self._name = name
        self._finish = finish

    def get_shape(self) -> list[int]:
        """Return the shape that the file gives."""
        return list(self._file.info(self._name).shape)

    def get_dtype(self) -> str:
        """Return the element type in safetensors' spelling: ``F32``, ``BF16`` …"""
        return self._file.info(self._name).dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._finish(self._file.tensor(self._name, index))


def check_tensors(path: str, size: int, tensors: Iterable[TensorInfo]) -> None:
    """Check what any format must hold to, *tensors* being sorted by their bytes.

    Raises:
        FormatError: A name occurs twice, or a tensor lies outside the file of *size* bytes or on another one, has an
            unknown element type, or more or fewer bytes than its shape needs.
    """
    names: set[str] = set()
    end, before = 0, ""
    for tensor in tensors:
        span = tensor.span
        if tensor.name in names:
            raise FormatError(f"{path}: tensor {tensor.name!r} occurs twice")
        names.add(tensor.name)
        if not 0 <= span.start <= span.stop <= size:
            raise FormatError(f"{path}: tensor {tensor.name!r} has {span}, outside of the file of {size} bytes")
        if tensor.dtype not in DTYPES:
            raise FormatError(f"{path}: tensor {tensor.name!r} has the unknown dtype {tensor.dtype!r}")
        bits = DTYPES[tensor.dtype][0]
        for count in tensor.shape:
            bits *= count
        if bits != 8 * len(span):
            raise FormatError(
                f"{path}: tensor {tensor.name!r} ({tensor.dtype}, shape {list(tensor.shape)}) "
                f"needs {bits / 8:g} bytes, the file has {len(span)} for it"
            )
        if len(span):
            if span.start < end:
                raise FormatError(f"{path}: tensor {tensor.name!r} ({span}) overlaps {before!r}, which ends at {end}")
            end, before = span.stop, tensor.name


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the names that resemble *name*."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3)
    return f"there is {', '.join(map(repr, close))}" if close else "keys() lists the names"


def _rows(span: ByteRange, shape: Any, index: Any) -> ByteRange:
    """Return the bytes of the rows (along the first axis) that *index* selects; all where it may select any."""
    first = index[0] if isinstance(index, tuple) and index else index
    if not len(shape) or not len(span):
        return span
    count = shape[0]
    if type(first) is int:  # not bool, which adds an axis
        chosen = range(count)[first : first + 1 or None]  # empty when out of range: torch raises its IndexError
    elif isinstance(first, slice) and (first.step is None or (type(first.step) is int and first.step > 0)):
        try:
            chosen = range(count)[first]
        except TypeError:
            return span
    else:
        return span
    row_bytes = len(span) // count
    if not chosen:
        return ByteRange(span.start, span.start)
    return ByteRange(span.start + chosen[0] * row_bytes, span.start + (chosen[-1] + 1) * row_bytes)
