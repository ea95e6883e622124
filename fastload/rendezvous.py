"""Where a program meets the transfers that ``fastload exec`` began for it: a socket, over which they tell what they do.

A load of the program then reads along as if the program had begun the transfer itself: it starts no process of its own, asks
no hub, and sees all events. Whoever is not met (another user, another network namespace, other arguments) is none the
worse: the load begins a transfer of its own, which finds in the cache what is there or on its way.

The socket is an abstract one (unix(7)): no file, so nothing is left behind whoever is killed. Anybody may call it by its
name, so both ends ask the kernel who the other one is. Lines of JSON: the program says what it wants, then hears the
messages of :mod:`fastload.transfer`, those of before included.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .carrier import Carrier
from .errors import FastloadError

if TYPE_CHECKING:
    import asyncio

    from .asking import Asked
    from .transfer import Transfer

#: Tells the program, and all that it starts, the name of the socket.
VARIABLE = "FASTLOAD_LAUNCHED"
_CREDENTIALS = struct.Struct("3i")  # specified: unix(7), struct ucred
_LONGEST_BYTES = 1 << 16  # guessed: a call is a name and two hashes
_ANSWER_S = 1.0  # guessed: a call is taken by the kernel, at once
_MET = b'{"kind": "met"}\n'


def listen() -> tuple[socket.socket, str]:
    """Return a socket that takes calls, and its name.

    Raises:
        OSError: There are no such sockets here.
    """
    name = f"fastload-{os.urandom(16).hex()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
        listener.listen()
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener, name


def names_of(asked: Asked) -> list[str]:
    """Return what says, in another process too, which transfers serve *asked*. Hashes: what is asked for holds the token."""
    keys = (key[1:] for key in (asked.key, asked.key_of_more))  # the first part is the pid
    return list(dict.fromkeys(hashlib.sha256(repr(key).encode()).hexdigest() for key in keys))


def _is_ours(connection: socket.socket) -> bool:
    """Tell whether the process at the other end is of this user."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(told)[1] == os.geteuid())


# -- the side of the transfers: one event loop ------------------------------------------------------------------------


class Feed:
    """What one transfer has told so far, for everybody who joins it.

    Args:
        asked: What it delivers.

    Attributes:
        failed: It has ended early; who comes now may have better luck alone.
        joined: Somebody hears it, or has.
        for_one: It serves one program and no further one.
    """

    def __init__(self, asked: Asked) -> None:
        import asyncio

        self.name = names_of(asked)[0]
        self.failed = False
        self.joined = False
        self.for_one = False
        self._lines: list[bytes] = []
        self._ended = False
        self._changed = asyncio.Event()

    def tell(self, message: dict[str, Any]) -> None:
        """Pass *message* on; one that says ``finished`` or ``failed`` is the last."""
        self._lines.append(json.dumps(message).encode() + b"\n")
        self.failed = self.failed or message["kind"] == "failed"
        # A temporary folder belongs to whoever hears of it.
        self.for_one = self.for_one or message["kind"] == "temporary"
        self._ended = self._ended or message["kind"] in ("finished", "failed")
        self._changed.set()

    async def send(self, connection: socket.socket) -> None:
        """Send everything; return after the last message.

        Raises:
            OSError: Nobody listens any more.
        """
        import asyncio

        loop, sent = asyncio.get_running_loop(), 0
        while True:
            self._changed.clear()
            lines = self._lines[sent:]
            sent += len(lines)
            await loop.sock_sendall(connection, b"".join(lines))
            if sent == len(self._lines):
                if self._ended:
                    return
                await self._changed.wait()


class Host:
    """Takes the calls of programs, from one event loop.

    Args:
        listener: Of :func:`listen`; :meth:`serve` closes it.
        sources: All that there will be a feed of.

    Attributes:
        heard: Set when there is nothing left to tell: of each source, somebody has heard all that there was.
    """

    def __init__(self, listener: socket.socket, sources: Sequence[str]) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        self._listener = listener
        self._feeds: dict[str, asyncio.Future[Feed]] = {source: loop.create_future() for source in sources}
        self._left = set(sources)
        self._begun: set[str] = set()
        self.heard = asyncio.Event()

    def begins(self, source: str) -> None:
        """Say that *source* is about to be fetched: who asks for it is answered. One that waits for its turn is not."""
        self._begun.add(source)

    def feed(self, source: str, feed: Feed) -> None:
        """Say who tells of *source*."""
        if not self._feeds[source].done():  # given twice: the first one counts
            self._feeds[source].set_result(feed)

    def over(self, source: str) -> None:
        """Say that there is nothing more to tell of *source*."""
        self._feeds[source].cancel()
        self._left.discard(source)
        if not self._left:
            self.heard.set()

    async def serve(self) -> None:
        """Take calls until cancelled; close the listener."""
        import asyncio

        loop = asyncio.get_running_loop()
        with self._listener:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        connection, _ = await loop.sock_accept(self._listener)
                    except OSError:  # no descriptors are left: who calls from now on will be none the worse
                        return
                    group.create_task(self._called(connection))

    async def _called(self, connection: socket.socket) -> None:
        with connection:
            try:
                if _is_ours(connection):
                    await self._answer(json.loads(await _line(connection)), connection)
            except (OSError, ValueError, KeyError, TypeError):  # it has gone, or is none of us
                pass

    async def _answer(self, call: dict[str, Any], connection: socket.socket) -> None:
        import asyncio

        waiting = self._feeds.get(call["source"])
        if waiting is None or call["source"] not in self._begun:
            return
        await asyncio.wait({waiting})
        feed = None if waiting.cancelled() else waiting.result()
        if feed is None or feed.failed or feed.name not in call["names"] or (feed.for_one and feed.joined):
            return
        feed.joined = True
        await asyncio.get_running_loop().sock_sendall(connection, _MET)
        await feed.send(connection)
        self.over(call["source"])


async def _line(connection: socket.socket) -> bytes:
    import asyncio

    loop, said = asyncio.get_running_loop(), b""
    while not said.endswith(b"\n") and len(said) < _LONGEST_BYTES:
        part = await loop.sock_recv(connection, _LONGEST_BYTES)
        if not part:
            break
        said += part
    return said


# -- the side of the program: a thread --------------------------------------------------------------------------------


def call() -> socket.socket | None:
    """Return a connection to the transfers that were begun for this program; ``None`` where there are none."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_S)
    try:
        connection.connect(f"\0{name}")  # waits where many have called and nobody takes them: that process was stopped
        if _is_ours(connection):
            connection.settimeout(None)
            return connection
    except (OSError, ValueError):  # they have ended, or somebody wrote what is no name
        pass
    connection.close()
    return None


class Joined(Carrier):
    """Carries a transfer that another process makes for us, by telling what that says.

    Where it does not make this one, or ends before its end, another carrier goes on from what has landed.

    Args:
        connection: Of :func:`call`; it is closed at the end.
        otherwise: Returns that other carrier, begun.
    """

    def __init__(
        self, asked: Asked, transfer: Transfer, connection: socket.socket, otherwise: Callable[[], Carrier]
    ) -> None:
        self._transfer = transfer
        self._connection = connection
        self._otherwise = otherwise
        self._lock = threading.Lock()
        self._stopped = False
        self._other: Carrier | None = None
        self._call = json.dumps({"source": asked.request.source, "names": names_of(asked)}).encode() + b"\n"
        self._begin(self._read, "fastload-joined")

    def _read(self) -> None:
        try:
            with self._connection, self._connection.makefile("rb") as lines:
                self._connection.sendall(self._call)
                if lines.readline() == _MET:
                    for line in lines:
                        if line.endswith(b"\n"):  # else it was killed in the middle of a word
                            self._transfer.apply(json.loads(line))
        except (OSError, ValueError, KeyError, TypeError):  # it has ended, or is of a version that speaks otherwise
            pass
        with self._lock:
            if self._transfer.finished or self._transfer.error is not None:
                return
            if not self._stopped:
                try:
                    self._other = self._otherwise()
                except (OSError, RuntimeError) as e:  # no thread can be started
                    self._transfer.fail(FastloadError(f"no transfer can be started: {e}"))
                return
        self._transfer.fail(FastloadError("the transfer was stopped"))

    def join(self) -> None:
        """Wait until it is over, and with it whatever goes on in its place."""
        super().join()
        if self._other is not None:
            self._other.join()

    @property
    def ended(self) -> bool:
        """Whether its thread, and whatever goes on in its place, is gone."""
        return super().ended and (self._other is None or self._other.ended)

    def rest(self, timeout_s: float) -> bool:
        """Wait up to *timeout_s* for the end, and as long for whatever goes on in its place; tell whether it has come."""
        if super().rest(timeout_s):
            return True
        return self._other is not None and self._other.rest(timeout_s) and self.ended

    def stop(self) -> None:
        """Hear no more; who makes the transfer goes on with it. Harmless when repeated."""
        with self._lock:
            self._stopped = True
            if self._other is None:
                try:
                    self._connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # closed already
                    pass
        super().join()
        if self._other is not None:
            self._other.stop()
