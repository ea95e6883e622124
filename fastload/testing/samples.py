"""Sample files of a weight format, with the tensors that must come out of them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..device import DTYPES, dtype_code

#: What a tensor is, whoever made it: dtype as safetensors spells it, shape, little-endian bytes.
Plain = tuple[str, tuple[int, ...], bytes]

#: numpy's kinds of types → safetensors' first letters.
_KINDS = {"f": "F", "i": "I", "u": "U", "c": "C"}


@dataclass(frozen=True)
class Sample:
    """One file of a format and what it holds.

    Attributes:
        name: Of the file, as a repository would have it: ``weights.hello``.
        content: Its bytes, or the file that has them.
        tensors: What must come out of it: torch tensors, numpy arrays or ``(dtype, shape, bytes)`` with safetensors'
            names of types, as :func:`fastload.testing.random_tensor` gives them.
    """

    name: str
    content: bytes | Path
    tensors: Mapping[str, Any]

    def data(self) -> bytes:
        """Return the bytes of the file."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def expected(self) -> dict[str, Plain]:
        """Return the tensors in plain form."""
        return {name: plain(tensor) for name, tensor in self.tensors.items()}


def plain(tensor: Any) -> Plain:
    """Return dtype, shape and bytes of *tensor*, which may be torch's, numpy's or plain already.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(tensor, tuple) and len(tensor) == 3:
        dtype, shape, data = tensor
        return str(dtype), tuple(int(n) for n in shape), bytes(data)
    if hasattr(tensor, "untyped_storage"):
        tensor = tensor.detach().cpu().contiguous()
        data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
        return dtype_code(tensor.dtype), tuple(tensor.shape), data
    if hasattr(tensor, "__array_interface__"):
        kind, bits = tensor.dtype.kind, 8 * tensor.dtype.itemsize
        code = "BOOL" if kind == "b" else f"{_KINDS.get(kind, '?')}{bits}"
        return code, tuple(tensor.shape), tensor.astype(tensor.dtype.newbyteorder("<")).tobytes()
    raise TypeError(f"a sample's tensors are torch's, numpy's or (dtype, shape, bytes), not {type(tensor).__name__}")


def difference(found: Mapping[str, Plain], expected: Mapping[str, Plain]) -> str | None:
    """Return what is wrong with *found*, in a few words; ``None`` where all is as *expected*."""
    if found.keys() != expected.keys():
        lacking, more = expected.keys() - found.keys(), found.keys() - expected.keys()
        parts = [f"{what} {', '.join(map(repr, sorted(names)[:5]))}" for what, names in
                 (("lacks", lacking), ("has beyond them", more)) if names]  # fmt: skip
        return f"{len(found)} tensors instead of {len(expected)}: {'; '.join(parts)}"
    for name, (dtype, shape, data) in expected.items():
        dtype_found, shape_found, data_found = found[name]
        if dtype_found != dtype:
            return f"tensor {name!r} is {dtype_found} instead of {dtype}"
        # Where two elements share a byte, torch counts bytes.
        if shape_found != shape and DTYPES.get(dtype, (8, ""))[0] >= 8:
            return f"tensor {name!r} has the shape {list(shape_found)} instead of {list(shape)}"
        if data_found != data:
            at = next((n for n, (a, b) in enumerate(zip(data_found, data, strict=False)) if a != b), None)
            where = f"{len(data_found)} bytes instead of {len(data)}" if at is None else f"another byte {at}"
            return f"tensor {name!r} has {where}"
    return None
