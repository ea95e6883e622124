"""Reads FlashPack files (``.flashpack``, formats 3 and 4): blocks of tensors of one type, an index behind them.

The index stands at the end, so a file is read once it is whole and verified; then it is mapped, not copied. The flashpack
package is not needed. The format is the one that flashpack 0.4 writes (its serialization.py).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastload.errors import FormatError
from fastload.hookspecs import hookimpl
from fastload.types import Format, NeedBytes, TensorInfo

_MAGIC = b"FLASHPK\0"
#: The length of the index and the magic word.
_TAIL_BYTES = 8 + len(_MAGIC)
_FORMATS = ("flashpack_v3", "flashpack_v4")


@hookimpl
def fastload_format(filename: str, head: bytes) -> Format | None:
    """Recognise ``*.flashpack`` by name; such a file has no head."""
    return FlashPack(filename) if filename.lower().endswith(".flashpack") else None


class FlashPack:
    """One FlashPack file.

    Attributes:
        name: Of the format.
    """

    name = "flashpack"

    def __init__(self, filename: str) -> None:
        self.filename = filename

    def parse(self, head: bytes) -> list[TensorInfo] | NeedBytes:
        """Raise: the index stands at the end; :meth:`load` reads it."""
        raise FormatError(f"{self.filename}: can be read only as a whole")

    def load(self, path: Path) -> dict[str, Any]:
        """Return the tensors of the verified file at *path*: views of a private mapping, one storage each.

        Raises:
            FormatError: The file breaks a rule of the format.
        """
        import torch

        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size < _TAIL_BYTES:
                self._refuse(f"it has {size} bytes, its tail alone takes {_TAIL_BYTES}")
            mapping = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        memory = memoryview(mapping)
        payload_bytes, index = self._index(memory)
        found: dict[str, Any] = {}
        end, before = 0, ""
        for at, count, name, dtype, shape in sorted(self._tensors(index), key=lambda row: row[:3]):
            if name in found:
                self._refuse(f"tensor {name!r} occurs twice")
            stop = at + count * dtype.itemsize
            if stop > payload_bytes:
                self._refuse(f"tensor {name!r} ends at byte {stop}, the data at {payload_bytes}")
            if count and at < end:
                self._refuse(f"tensor {name!r} overlaps {before!r}")
            if count:
                end, before = stop, name
                data = torch.frombuffer(memory, dtype=torch.uint8, count=stop - at, offset=at)
                found[name] = data.view(dtype).view(shape)
            else:
                found[name] = torch.empty(shape, dtype=dtype)
        return found

    def _refuse(self, reason: str) -> NoReturn:
        raise FormatError(
            f"{self.filename}: not a sound FlashPack file: {reason}",
            hint="the file is so in the repository (its digest matches): tell its owner, or try another revision",
        )

    def _index(self, memory: memoryview) -> tuple[int, Any]:
        """Return where the data ends, and the decoded index behind it."""
        size = len(memory)
        if memory[-len(_MAGIC) :] != _MAGIC:
            self._refuse(f"it does not end with {_MAGIC!r}")
        start = size - _TAIL_BYTES - int.from_bytes(memory[-_TAIL_BYTES : -len(_MAGIC)], "little")
        if start < 0:
            self._refuse("its index claims more bytes than the file has")
        try:
            index = json.loads(bytes(memory[start : size - _TAIL_BYTES]))
        except (ValueError, RecursionError) as e:
            self._refuse(f"its index is not JSON: {e}")
        if not isinstance(index, dict) or index.get("format") not in _FORMATS:
            self._refuse("its index names none of the formats 3 and 4")
        return start, index

    def _tensors(self, index: dict[str, Any]) -> Iterator[tuple[int, int, str, Any, list[int]]]:
        """Yield where each tensor begins, how many elements it has, its name, type and shape."""
        try:
            if index["format"] == _FORMATS[0]:
                blocks = [(self._dtype(index["target_dtype"]), 0)]
            else:
                blocks = [(self._dtype(b["dtype"]), _count(b["offset_bytes"])) for b in index["macroblocks"]]
            for row in index["index"]:
                name, shape = row["name"], [_count(n) for n in row["shape"]]
                offset, length, number = _count(row["offset"]), _count(row["length"]), _count(row.get("macroblock", 0))
                dtype, start = blocks[number]
                if not isinstance(name, str) or math.prod(shape) != length:
                    self._refuse(f"tensor {name!r} has the shape {shape} and {length} elements")
                yield start + offset * dtype.itemsize, length, name, dtype, shape
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            self._refuse(f"its index is damaged: {type(e).__name__}: {e}")

    def _dtype(self, name: Any) -> Any:
        import torch

        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if not isinstance(dtype, torch.dtype):
            self._refuse(f"the type {name!r} is unknown")
        return dtype


def _count(value: Any) -> int:
    """Return *value*, which must be a whole number that counts something."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no count")
    return value
