"""Where the app's process tells what it does: a Unix datagram socket without a file, read by the event loop."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..events import log

#: Specified, unix(7): struct ucred is three ints, pid, uid, gid.
_CREDENTIALS = struct.Struct("3i")
#: As much as :mod:`fastload.builtin.supervised` sends at once.
_MESSAGE_BYTES = 64 * 1024
#: Reasoned: what comes in a burst must not keep requests from being answered.
_AT_ONCE = 100


class Channel:
    """Hands each message to *take*, in the running loop's thread, while the block runs.

    Its name lives in the kernel's abstract namespace, where anybody may write to it: what comes from processes of another
    user is not read (the kernel says who they are).

    Args:
        take: Gets each message, a dict with ``kind``.
    """

    def __init__(self, take: Callable[[dict[str, Any]], None]) -> None:
        self._take = take
        self.address = f"@fastload-serve-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def __enter__(self) -> Channel:
        self._socket.bind(f"\0{self.address[1:]}")
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def _read(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_MESSAGE_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
            except BlockingIOError:
                return
            if not any(
                (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
                and _CREDENTIALS.unpack(content)[1] in (os.getuid(), 0)
                for level, kind, content in ancillary
                if len(content) == _CREDENTIALS.size
            ):
                continue
            try:
                self._take(json.loads(data))
            except (ValueError, KeyError, TypeError, AttributeError) as e:  # not of ours, or of another version
                log.debug("fastload serve: a message that means nothing: %s", e)
