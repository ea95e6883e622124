"""The least that receiving takes: threads with blocking sockets, the kernel copying into memory that is there."""

from __future__ import annotations

import socket
from threading import local
from typing import Any
from urllib.parse import urlsplit

from ..floor import spread
from ..plainhub import files

TITLE = "receiving alone, recv_into in threads"
REFERENCE = True
VERIFIES = "nothing"
RANGE_BYTES = 8 << 20
_HEAD_BYTES = 65536


class Connection:
    """One kept connection and the buffer that all its answers land in."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._buffer = memoryview(bytearray(b"x") * (RANGE_BYTES + _HEAD_BYTES))  # of zeros it would not be there yet

    def get(self, host: str, path: str, start: int, stop: int) -> None:
        """Receive one range.

        Raises:
            RuntimeError: The server answered with anything else.
        """
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
        self._socket.sendall(head.encode())
        got = 0
        while (end := bytes(self._buffer[:got]).find(b"\r\n\r\n")) < 0:
            read = self._socket.recv_into(self._buffer[got:_HEAD_BYTES])
            if not read:
                raise RuntimeError("the server closed the connection")
            got += read
        if not bytes(self._buffer[:got]).startswith(b"HTTP/1.1 206"):
            raise RuntimeError(f"answered with {bytes(self._buffer[:30])!r}")
        left = stop - start - (got - end - 4)
        while left:
            read = self._socket.recv_into(self._buffer[:left], left, socket.MSG_WAITALL)
            if not read:
                raise RuntimeError("the server closed the connection")
            left -= read


def run(job: dict[str, Any]) -> Any:
    """Tell what it took."""
    wanted = files(job["repo"])
    ranges = [
        (urlsplit(file.url), start, min(start + RANGE_BYTES, file.size))
        for file in wanted
        for start in range(0, file.size, RANGE_BYTES)
    ]
    mine = local()

    def receive(one: tuple[Any, int, int]) -> None:
        address, start, stop = one
        connections = mine.__dict__.setdefault("connections", {})
        if address.netloc not in connections:
            connections[address.netloc] = Connection(address.hostname, address.port)
        path = f"{address.path}?{address.query}" if address.query else address.path
        connections[address.netloc].get(address.netloc, path, start, stop)

    return spread(receive, ranges, job["connections"])
