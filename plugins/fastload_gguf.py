"""Reads GGUF files: tensors as they are stored, while the file arrives, or dequantised to torch.

``fastload.load_tensors("org/model", files="*.gguf")`` gives every tensor as the file has it: plain types as torch's own,
quantised ones as ``uint8`` blocks, shaped as the ``gguf`` package shapes them. ``fastload.load(…, framework="gguf")`` gives
them dequantised: to ``dtype=``, else to float32. What kind of blocks a tensor has stands in the stream's ``metadata()`` under
``tensor.NAME.type``, beside the fields of the file's header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fastload.errors import FormatError, PluginError, SettingsError
from fastload.hookspecs import hookimpl
from fastload.types import ByteRange, Format, NeedBytes, Snapshot, TensorInfo

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

_MAGIC = b"GGUF"
#: Specified (ggml): type → its code in the file, for types that torch has too.
_PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_PLAIN_BYTES = {"F32": 4, "F16": 2, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8, "BF16": 2}
#: Specified (ggml): type → name, elements a block, bytes a block.
_BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
#: Specified (GGUF): kinds of fields, with struct's letters; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_LISTED = 1024  # guessed: arrays up to this length (not vocabularies) are worth keeping as metadata
_DEPTH = 4  # guessed: arrays within arrays
_OPTIONS = frozenset({"device", "dtype", "gguf_file", "subfolder"})


@hookimpl
def fastload_format(filename: str, head: bytes) -> Format | None:
    """Recognise GGUF files by their first four bytes."""
    return Gguf(filename) if head.startswith(_MAGIC) else None


@hookimpl
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Return all tensors by name, dequantised, for ``framework="gguf"``; declines all others.

    Raises:
        PluginError: The gguf package is missing, or cannot dequantise a type.
    """
    if framework != "gguf":
        return None
    for name in options.keys() - _OPTIONS:
        raise SettingsError(f"{name}= means nothing with framework='gguf'", hint="dtype= and device= do")
    types = stream.metadata()
    return {
        name: _plain(name, tensor, types.get(f"tensor.{name}.type"), options.get("dtype")) for name, tensor in stream
    }


def _plain(name: str, tensor: Any, kind: str | None, dtype: Any) -> Any:
    """Return *tensor*, which has blocks of *kind*, as numbers."""
    if kind is None:
        return tensor
    try:
        import torch
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as e:
        raise PluginError(
            f"dequantising needs the gguf package: {e}", plugin="gguf", hint='pip install "fastload-weights[gguf]"'
        ) from e
    try:
        numbers = dequantize(tensor.cpu().numpy(), GGMLQuantizationType[kind])
    except (NotImplementedError, KeyError) as e:
        raise PluginError(
            f"tensor {name!r}: the installed gguf package cannot dequantise {kind}", plugin="gguf",
            hint="fastload.load_tensors gives the blocks as they are",
        ) from e  # fmt: skip
    wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    return torch.from_numpy(numbers).to(tensor.device, wanted)


class _TooShort(Exception):
    """The head ends before what is read; args: how many bytes the head needs at least."""


class _Cursor:
    """Reads a head from its start, little-endian."""

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.at = 0

    def skip(self, count: int) -> int:
        """Go on by *count* bytes, which must be there; return where they start."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.head):
            raise _TooShort(self.at)
        return start

    def scalar(self, letter: str) -> Any:
        return struct.unpack_from(f"<{letter}", self.head, self.skip(struct.calcsize(f"<{letter}")))[0]

    def raw_string(self) -> bytes:
        count = self.scalar("Q")
        start = self.skip(count)
        return self.head[start : start + count]

    def expect(self, count: int) -> None:
        """Say that at least *count* more bytes follow."""
        if self.at + count > len(self.head):
            raise _TooShort(self.at + count)


class Gguf:
    """One GGUF file (version 2 or 3, little-endian), known by its head.

    Attributes:
        name: Of the format.
    """

    name = "gguf"

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self._metadata: dict[str, str] = {}

    def parse(self, head: bytes) -> Sequence[TensorInfo] | NeedBytes:
        """Return the tensors in the order of the header, or how many bytes the header takes at least.

        Raises:
            FormatError: The header breaks a rule of the format.
        """
        cursor = _Cursor(head)
        try:
            tensors, fields = self._header(cursor)
        except _TooShort as e:
            return NeedBytes(e.args[0], likely=2 * len(head))
        self._metadata = fields
        return tensors

    def metadata(self, head: bytes) -> dict[str, str]:
        """Return the header's fields as text (lists as JSON, long ones left out), and the types of quantised tensors."""
        return self._metadata

    def _refuse(self, reason: str) -> NoReturn:
        raise FormatError(
            f"{self.filename}: not a sound GGUF file: {reason}",
            hint="the file is so in the repository (its digest matches): tell its owner, or try another revision",
        )

    def _header(self, cursor: _Cursor) -> tuple[list[TensorInfo], dict[str, str]]:
        cursor.skip(len(_MAGIC))
        version = cursor.scalar("I")
        if version not in (2, 3):
            self._refuse("it is big-endian" if not version & 0xFFFF else f"version {version} is unknown (2 and 3 are)")
        tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
        cursor.expect(13 * field_count + 24 * tensor_count)  # the shortest of each
        fields: dict[str, str] = {}
        alignment = 32  # specified: where the file does not say
        for _ in range(field_count):
            name, value = self._text(cursor, "a field's name"), self._value(cursor, cursor.scalar("I"))
            if name in fields:
                self._refuse(f"field {name!r} occurs twice")
            if value is not None:
                fields[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
            if name == "general.alignment":
                alignment = value if type(value) is int else 0
        if alignment <= 0 or alignment & (alignment - 1):
            self._refuse(f"its alignment is {fields.get('general.alignment')}, no power of two")
        heads = [self._tensor_head(cursor) for _ in range(tensor_count)]
        start = -(-cursor.at // alignment) * alignment
        tensors = list(self._tensors(heads, start, alignment, fields))
        return tensors, fields

    def _text(self, cursor: _Cursor, what: str) -> str:
        try:
            return cursor.raw_string().decode("utf-8")
        except UnicodeDecodeError as e:
            self._refuse(f"{what} is not UTF-8: {e.reason}")

    def _value(self, cursor: _Cursor, kind: int, depth: int = 0) -> Any:
        """Return a field's value; ``None`` for a long list."""
        if kind in _SCALARS:
            return cursor.scalar(_SCALARS[kind])
        if kind == _STRING:
            return cursor.raw_string().decode("utf-8", "replace")
        if kind != _ARRAY or depth == _DEPTH:
            self._refuse(
                f"it has a field of the unknown type {kind}" if kind != _ARRAY else "its lists are nested too deeply"
            )
        item, count = cursor.scalar("I"), cursor.scalar("Q")
        if item in _SCALARS:
            letter = _SCALARS[item]
            start = cursor.skip(count * struct.calcsize(f"<{letter}"))
            return list(struct.unpack_from(f"<{count}{letter}", cursor.head, start)) if count <= _LISTED else None
        cursor.expect(count * (8 if item == _STRING else 12))
        if count <= _LISTED:
            return [self._value(cursor, item, depth + 1) for _ in range(count)]
        for _ in range(count):
            if item == _STRING:
                cursor.skip(cursor.scalar("Q"))
            else:
                self._value(cursor, item, depth + 1)
        return None

    def _tensor_head(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape (slowest axis first), type and offset."""
        name = self._text(cursor, "a tensor's name")
        dimensions = cursor.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            self._refuse(f"tensor {name!r} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
        return name, shape, cursor.scalar("I"), cursor.scalar("Q")

    def _tensors(
        self, heads: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, fields: dict[str, str]
    ) -> Iterator[TensorInfo]:
        for name, shape, kind, offset in heads:
            if offset % alignment:
                self._refuse(f"tensor {name!r} is at {offset}, no multiple of {alignment}")
            if kind in _PLAIN:
                dtype, size = _PLAIN[kind], _PLAIN_BYTES[_PLAIN[kind]]
            elif kind in _BLOCKS:
                quant, elements, block_bytes = _BLOCKS[kind]
                if not shape or shape[-1] % elements:
                    self._refuse(f"tensor {name!r} ({quant}) has the shape {list(shape)}, no rows of whole blocks")
                fields[f"tensor.{name}.type"] = quant
                dtype, size, shape = "U8", 1, (*shape[:-1], shape[-1] // elements * block_bytes)
            else:
                self._refuse(f"tensor {name!r} has the unknown type {kind}")
            for count in shape:
                size *= count
            yield TensorInfo(name, dtype, shape, ByteRange(start + offset, start + offset + size))
