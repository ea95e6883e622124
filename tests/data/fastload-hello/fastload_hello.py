"""The hello format: the line ``hello weights N``, N bytes of JSON, then the tensors, each at a multiple of 16.

The JSON is a list of ``[name, dtype, shape, start, stop]``; dtypes as in safetensors, bytes counted from the file's start.
"""

import json

from fastload.errors import FormatError
from fastload.hookspecs import hookimpl
from fastload.types import ByteRange, NeedBytes, TensorInfo

MAGIC = b"hello weights "


@hookimpl
def fastload_format(filename, head):
    return Hello(filename) if head.startswith(MAGIC) else None


class Hello:
    name = "hello"

    def __init__(self, filename):
        self.filename = filename

    def parse(self, head):
        line, newline, _ = head.partition(b"\n")
        if not newline and len(line) < 64:
            return NeedBytes(len(head) + 1, likely=64)
        try:
            start = len(line) + len(newline)
            stop = start + int(line.removeprefix(MAGIC))
            if len(head) < stop:
                return NeedBytes(stop)
            return [tensor(*row) for row in json.loads(head[start:stop])]
        except (ValueError, TypeError, RecursionError) as e:
            raise FormatError(f"{self.filename}: not a hello file: {e}") from e


def tensor(name, dtype, shape, start, stop):
    if not isinstance(name, str) or not isinstance(dtype, str):
        raise ValueError("a name is no text")
    if not all(type(number) is int and 0 <= number < 2**63 for number in [*shape, start, stop]):
        raise ValueError(f"{name} has a shape or an offset that is none")
    return TensorInfo(name, dtype, tuple(shape), ByteRange(start, stop))


def dumps(tensors):
    """Return the bytes of a hello file with *tensors*: name → (dtype, shape, bytes)."""
    room = 256 + 128 * len(tensors)
    table, data, at = [], b"", room
    for name, (dtype, shape, raw) in tensors.items():
        table.append([name, dtype, shape, at, at + len(raw)])
        padded = raw + bytes(-len(raw) % 16)
        data += padded
        at += len(padded)
    text = json.dumps(table).encode()
    line = MAGIC + str(room - 32).encode() + b"\n"
    text = text.ljust(room - 32)
    return (line + text).ljust(room, b"\0") + data
