"""The safetensors format: 8 bytes of header length, a JSON header, the data section.

Stricter than the reference reader, never laxer: names that occur twice are refused, and every header is also shown to
the installed safetensors library, whose word counts where it refuses.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..device import DTYPES
from ..errors import FormatError
from ..hookspecs import hookimpl
from ..types import ByteRange, Format, NeedBytes, TensorInfo

#: Specified (safetensors): the longest header that a reader accepts.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_MAX_COUNT = 2**64 - 1
_METADATA = "__metadata__"


@hookimpl
def fastload_format(filename: str, head: bytes) -> Format | None:
    """Recognise ``*.safetensors`` by name."""
    return Safetensors(filename) if filename.endswith(".safetensors") else None


class Safetensors:
    """One safetensors file, known by its head.

    Attributes:
        name: Of the format.
        file_bytes: How long the file must be; known once :meth:`parse` returned tensors.
    """

    name = "safetensors"

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.file_bytes = 0

    def parse(self, head: bytes) -> Sequence[TensorInfo] | NeedBytes:
        """Return the tensors in the order of their data, or how many bytes the header takes.

        Raises:
            FormatError: The header breaks a rule of the format; names the file and the tensor.
        """
        header = self._header(head)
        if isinstance(header, NeedBytes):
            return header
        fields, start = header
        tensors = [self._tensor(name, value, start) for name, value in fields.items() if name != _METADATA]
        tensors.sort(key=lambda t: (t.span.start, t.span.stop))
        self._check_order(tensors, start)
        _metadata(fields, self._refuse)
        self.file_bytes = tensors[-1].span.stop if tensors else start
        self._ask_reference(head[:start], self.file_bytes)
        return tensors

    def metadata(self, head: bytes) -> dict[str, str]:
        """Return the free-form part of the header; empty where there is none."""
        header = self._header(head)
        return {} if isinstance(header, NeedBytes) else _metadata(header[0], self._refuse)

    def _refuse(self, reason: str) -> NoReturn:
        raise FormatError(
            f"{self.filename}: not a sound safetensors file: {reason}",
            hint="the file is so in the repository (its digest matches): tell its owner, or try another revision",
        )

    def _header(self, head: bytes) -> tuple[dict[str, Any], int] | NeedBytes:
        """Return the decoded header and where the data starts."""
        if len(head) < _LENGTH_BYTES:
            return NeedBytes(_LENGTH_BYTES)
        (length,) = struct.unpack_from("<Q", head)
        if length > MAX_HEADER_BYTES:
            self._refuse(f"its header claims {length} bytes, more than {MAX_HEADER_BYTES}")
        start = _LENGTH_BYTES + length
        if len(head) < start:
            return NeedBytes(start)
        try:
            text = head[_LENGTH_BYTES:start].decode("utf-8")
            fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except UnicodeDecodeError as e:
            self._refuse(f"its header is not UTF-8: {e.reason} at byte {_LENGTH_BYTES + e.start}")
        except RecursionError:
            self._refuse("its header is nested too deeply")
        except ValueError as e:
            self._refuse(f"its header is not JSON as the format wants it: {e}")
        if not isinstance(fields, dict):
            self._refuse(f"its header is a JSON {type(fields).__name__}, not an object")
        return fields, start

    def _tensor(self, name: str, value: Any, start: int) -> TensorInfo:
        if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
            self._refuse(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self._refuse(f"tensor {name!r} has the unknown dtype {dtype!r}")
        if not _counts(shape):
            self._refuse(f"tensor {name!r} has the shape {shape!r}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._refuse(f"tensor {name!r} has the data_offsets {offsets!r}")
        bits = DTYPES[dtype][0]
        for count in shape:
            bits *= count
            if bits > _MAX_COUNT:
                self._refuse(f"tensor {name!r} has the shape {shape[:8]!r}, more than 64 bits can count")
        if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
            self._refuse(
                f"tensor {name!r} ({dtype}, shape {shape}) needs {bits / 8:g} bytes, "
                f"its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
            )
        return TensorInfo(name, dtype, tuple(shape), ByteRange(start + offsets[0], start + offsets[1]))

    def _check_order(self, tensors: Sequence[TensorInfo], start: int) -> None:
        end, before = start, "the header"
        for tensor in tensors:
            if tensor.span.start != end:
                how = "overlaps" if tensor.span.start < end else "leaves a hole after"
                self._refuse(f"tensor {tensor.name!r} at byte {tensor.span.start} {how} {before}, which ends at {end}")
            end, before = tensor.span.stop, f"tensor {tensor.name!r}"

    def _ask_reference(self, header: bytes, size: int) -> None:
        """Show the header, in a sparse file of the right size, to the safetensors library."""
        from safetensors import SafetensorError, safe_open

        # The framework only decides which package gets imported: take the one that is there already.
        framework = "pt" if "torch" in sys.modules else "numpy"
        try:
            fd = os.memfd_create("fastload-header", os.MFD_CLOEXEC)
        except (AttributeError, OSError):
            return  # not Linux, or forbidden: our own reading has to do
        try:
            os.write(fd, header)
            os.ftruncate(fd, size)
            safe_open(f"/proc/self/fd/{fd}", framework=framework)
        except SafetensorError as e:
            self._refuse(f"the safetensors library says: {e}")
        except (OSError, ImportError):
            return  # no /proc, a limit on file sizes, or neither torch nor numpy
        finally:
            os.close(fd)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _counts(values: Any) -> bool:
    """Tell whether *values* is a list of whole numbers that fit into 64 bits."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_COUNT for v in values)


def _metadata(fields: dict[str, Any], refuse: Any) -> dict[str, str]:
    found = fields.get(_METADATA)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        refuse("its __metadata__ is not a table of strings")
    return dict(found)
