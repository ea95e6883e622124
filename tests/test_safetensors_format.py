"""The safetensors reader is never laxer than the reference one, and says which file and which tensor is wrong."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from fastload.builtin import safetensors as ours
from fastload.errors import FormatError
from fastload.types import ByteRange, NeedBytes

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """Return one entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def head(header: Any) -> bytes:
    """Return the first bytes of a file with *header*: bytes, or what JSON makes of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw


#: What is malformed → header. Every file has the size that its header asks for.
MALFORMED: dict[str, Any] = {
    "no json": b"tensors",
    "empty": b"",
    "a list": [],
    "a number": b"7",
    "cut": b'{"a":',
    "bytes after the object": json.dumps({"a": A}).encode() + b"x",
    "zero after the object": json.dumps({"a": A}).encode() + b"\0",
    "trailing comma": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}',
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": A}).encode(),
    "not utf-8": b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "NaN": b'{"a":NaN}',
    "control character": b'{"\x01":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "nested deeply": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a tensor that is null": {"a": None},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "unknown dtype": {"a": tensor("X32")},
    "lower-case dtype": {"a": tensor("f32")},
    "dtype that is a list": {"a": tensor(["F32"])},
    "negative dimension": {"a": tensor(shape=[-2])},
    "fractional dimension": b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
    "boolean dimension": {"a": tensor("U8", [True], [0, 1])},
    "shape that is a number": {"a": tensor(shape=2)},
    "dimension beyond 64 bits": {"a": tensor(shape=[2**70])},
    "product beyond 64 bits": {"a": tensor(shape=[2**40, 2**40])},
    "product beyond 64 bits, then zero": {"a": tensor(shape=[2**40, 2**40, 0], offsets=[0, 0])},
    "negative offset": {"a": tensor(offsets=[-8, 0])},
    "fractional offset": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}',
    "offsets in reverse": {"a": tensor(offsets=[8, 0])},
    "one offset": {"a": tensor(offsets=[0])},
    "three offsets": {"a": tensor(offsets=[0, 8, 9])},
    "too few bytes for the shape": {"a": tensor(offsets=[0, 7])},
    "too many bytes for the shape": {"a": tensor(offsets=[0, 9])},
    "half bytes": {"a": tensor("F4", [3], [0, 2])},
    "hole at the start": {"a": tensor(offsets=[8, 16])},
    "hole between": {"a": A, "b": tensor(offsets=[16, 24])},
    "overlap": {"a": A, "b": tensor(offsets=[4, 12])},
    "two tensors on one place": {"a": A, "b": A},
    "empty tensor within another": {"a": A, "b": tensor(shape=[0], offsets=[4, 4])},
    "metadata with a number": {"__metadata__": {"a": 1}, "a": A},
    "metadata in metadata": {"__metadata__": {"a": {}}, "a": A},
    "metadata that is a list": {"__metadata__": [], "a": A},
    "metadata twice": b'{"__metadata__":{},"__metadata__":{}}',
    "dtype twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
}  # fmt: skip

#: Where the reference reader looks away, or reads what the specification does not allow → header, bytes of data.
STRICTER: dict[str, tuple[Any, int]] = {
    "name twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                   b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "name twice in metadata": (b'{"__metadata__":{"x":"1","x":"2"}}', 0),
    "tensor as a list": ({"a": ["F32", [2], [0, 8]]}, 8),
}  # fmt: skip

SOUND: dict[str, Any] = {
    "nothing": {},
    "only metadata": {"__metadata__": {"format": "pt"}},
    "metadata that is null": {"__metadata__": None, "a": A},
    "scalar": {"a": tensor(shape=[], offsets=[0, 4])},
    "empty tensors": {"a": tensor(shape=[0], offsets=[0, 0]), "b": A, "c": tensor(shape=[3, 0], offsets=[8, 8])},
    "zero, then a product beyond 64 bits": {"a": tensor(shape=[0, 2**40, 2**40], offsets=[0, 0])},
    "half bytes that fill bytes": {"a": tensor("F4", [4], [0, 2])},
    "spaces around": b"  " + json.dumps({"a": A}).encode() + b" \n ",
    "further fields": {"a": {**A, "note": "x"}},
    "empty name": {"": A},
    "order of names is not order of bytes": {"a": tensor(offsets=[8, 16]), "b": A},
    "1 GiB": {"a": tensor("U8", [2**30], [0, 2**30])},
}


def reference_refuses(data: bytes, size: int) -> bool:
    """Tell whether safetensors' own reader refuses a file of *size* bytes that starts with *data*."""
    fd = os.memfd_create("reference")
    try:
        os.write(fd, data)
        os.ftruncate(fd, max(size, len(data)))
        safe_open(f"/proc/self/fd/{fd}", framework="numpy")
    except SafetensorError:
        return True
    finally:
        os.close(fd)
    return False


def size_of(data: bytes) -> int:
    """Return the size that the header asks for, as far as it can be read."""
    try:
        ends = [t["data_offsets"][1] for name, t in json.loads(data[8:]).items() if name != "__metadata__"]
        return len(data) + int(max(ends, default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return len(data)


class Alone(ours.Safetensors):
    """Our reader where the reference one cannot be asked."""

    def _ask_reference(self, header: bytes, size: int) -> None:
        pass


@pytest.mark.parametrize("reader", [ours.Safetensors, Alone])
@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_header_is_refused_by_both(what: str, reader: type[ours.Safetensors]) -> None:
    data = head(MALFORMED[what])
    assert reference_refuses(data, size_of(data))
    with pytest.raises(FormatError, match=r"^model\.safetensors: not a sound safetensors file: ") as caught:
        reader("model.safetensors").parse(data)
    assert caught.value.hint


@pytest.mark.parametrize("what", STRICTER)
def test_ambiguous_header_is_refused_although_the_reference_takes_it(what: str) -> None:
    header, data_bytes = STRICTER[what]
    data = head(header)
    assert not reference_refuses(data, len(data) + data_bytes)
    with pytest.raises(FormatError):
        Alone("x").parse(data)


@pytest.mark.parametrize("what", SOUND)
def test_sound_header_is_read_as_the_reference_reads_it(what: str) -> None:
    data = head(SOUND[what])
    assert not reference_refuses(data, size_of(data))
    assert not isinstance(ours.Safetensors("x").parse(data), NeedBytes)


def test_tensors_come_in_the_order_of_their_bytes_with_places_in_the_file() -> None:
    data = head({"__metadata__": {"format": "pt"}, "b": tensor(offsets=[8, 16]), "a": A})
    found = ours.Safetensors("x").parse(data)
    assert not isinstance(found, NeedBytes)
    start = len(data)
    assert [(t.name, t.span) for t in found] == [
        ("a", ByteRange(start, start + 8)),
        ("b", ByteRange(start + 8, start + 16)),
    ]
    assert ours.Safetensors("x").metadata(data) == {"format": "pt"}


def test_short_head_asks_for_the_bytes_that_it_needs() -> None:
    data = head({"a": A})
    assert ours.Safetensors("x").parse(data[:5]) == NeedBytes(8)
    assert ours.Safetensors("x").parse(data[:20]) == NeedBytes(len(data))


def test_header_of_more_than_100_mb_is_refused_before_it_is_fetched() -> None:
    assert ours.Safetensors("x").parse(struct.pack("<Q", 100_000_000)) == NeedBytes(100_000_008)
    with pytest.raises(FormatError, match="100000001 bytes"):
        ours.Safetensors("x").parse(struct.pack("<Q", 100_000_001))


def test_word_of_the_reference_reader_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours.DTYPES, "F32", (16, "float32"))  # our own table is wrong
    with pytest.raises(FormatError, match="the safetensors library says"):
        ours.Safetensors("x").parse(head({"a": tensor(shape=[4], offsets=[0, 8])}))


@pytest.mark.parametrize("code", sorted(ours.DTYPES))
def test_every_dtype_has_the_reference_readers_size(code: str) -> None:
    data = head({"a": tensor(code, [8], [0, ours.DTYPES[code][0]])})
    assert not reference_refuses(data, size_of(data))


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Yield heads of files that are damaged in one or two places."""
    rng = random.Random(seed)
    sound = head({"__metadata__": {"format": "pt"}, "a": A, "bb": tensor("BF16", [2, 3], [8, 20]),
                  "c": tensor("U8", [], [20, 21])})  # fmt: skip
    for _ in range(count):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(8, len(data))
            how = rng.random()
            if how < 0.5:
                data[at] = rng.choice(b'0123456789[]{}",:.-eEFBU\\ \x00\xff')
            elif how < 0.75:
                del data[at]
            else:
                data.insert(at, rng.choice(b'0123456789[]{}",:'))
        yield struct.pack("<Q", len(data) - 8) + bytes(data[8:])


def test_damaged_headers_are_never_read_where_the_reference_refuses() -> None:
    refused = 0
    for data in mutations(seed=20261122, count=3000):
        size = size_of(data)
        if size < 1 << 40 and reference_refuses(data, size):
            refused += 1
            with pytest.raises(FormatError):
                Alone("x").parse(data)
    assert refused > 1000
