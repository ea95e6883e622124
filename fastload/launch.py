"""``fastload exec``: begin the transfers, then become the program that needs them.

The transfers run in a process that is nobody's child, in a session of its own: the program keeps the pid, the terminal, the
signals and the exit code that it would have without us, and finds no child that it did not start. When it loads the model,
it joins the running transfer (:mod:`fastload.rendezvous`). The transfer process ends with the program, or when the program
has been told everything, or a minute after the last file, whichever comes first; what has landed stays.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import rendezvous
from .priority import give_way

if TYPE_CHECKING:
    import asyncio
    import socket

#: Guessed: how often to look for the program where the kernel cannot tell us of its end (before Linux 5.3).
_POLL_S = 1.0
#: Guessed: twice the longest imports that were seen. So long the program may take to ask for what has arrived.
_STAY_S = 60.0

log = logging.getLogger("fastload")


def launch(sources: Sequence[tuple[str, str | None]], command: Sequence[str], common: Mapping[str, Any]) -> NoReturn:
    """Begin to fetch what ``load`` reads of *sources*, one after another, and become *command*. Never returns.

    A transfer that fails says so on stderr; the program runs all the same. Call it from a process of one thread.

    Args:
        sources: Each with its revision.
        common: Further keyword arguments of :func:`fastload.start`, the same for all.

    Raises:
        OSError: *command* cannot be run.
    """
    program = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    listener = _listen()
    _detach(lambda: _fetch(sources, common, program, listener))
    if listener is not None:
        listener.close()
    # Where the wheel is installed, an unchanged from_pretrained then reads along (fastload.starting).
    os.environ.setdefault("FASTLOAD_ACCELERATE", ",".join(source for source, _ in sources))
    for name in ("SIGPIPE", "SIGXFSZ"):  # the interpreter ignores them, and a program inherits what is ignored
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execvp(command[0], list(command))


def _listen() -> socket.socket | None:
    """Let the program know where its loads meet the transfers."""
    os.environ.pop(rendezvous.VARIABLE, None)
    try:
        listener, os.environ[rendezvous.VARIABLE] = rendezvous.listen()
    except OSError:  # a sandbox: they meet in the cache, as any two processes do
        return None
    return listener


def _detach(body: Callable[[], None]) -> None:
    """Run *body* in a process that is not a child of this one, if one can be started."""
    try:
        child = os.fork()
    except OSError as e:
        log.warning("fastload exec: no transfer process can be started: %s", e.strerror)
        return
    if child:
        try:
            os.waitpid(child, 0)
        except ChildProcessError:  # who started us ignores SIGCHLD: the kernel has reaped it
            pass
        return
    try:
        os.setsid()
        if os.fork() == 0:
            body()
    except Exception:  # nobody above us; nobody to raise to
        log.exception("the transfer process of `fastload exec` ended early")
    finally:
        os._exit(0)  # whatever happened: if the program is pid 1, it will be handed our status


def _fetch(
    sources: Sequence[tuple[str, str | None]],
    common: Mapping[str, Any],
    program: int,
    listener: socket.socket | None,
) -> None:
    import asyncio

    # The program's pipes and sockets must close when it closes them; stderr stays until there is nothing left to say.
    kept = -1 if listener is None else listener.fileno()
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != kept:
            _close(fd)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_Transfers(program, lambda: os.dup2(null, 2), listener).run(sources, common))


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:  # the one that listed them
        pass


class _Transfers:
    """Transfers for the program with the pid *program*; *silence* gives its stderr back."""

    def __init__(self, program: int, silence: Callable[[], object], listener: socket.socket | None = None) -> None:
        self._program = program
        self._silence = silence
        self._listener = listener
        self._host: rendezvous.Host | None = None
        self._arrived = False
        self._cancel: Callable[[], object] = lambda: None

    async def run(self, sources: Sequence[tuple[str, str | None]], common: Mapping[str, Any]) -> None:
        import asyncio

        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        if task is not None:
            self._cancel = task.cancel
        loop.add_signal_handler(signal.SIGTERM, self._cancel)
        self._watch(loop)
        try:
            async with asyncio.TaskGroup() as group:
                serving = None
                if self._listener is not None:
                    self._host = rendezvous.Host(self._listener, [source for source, _ in sources])
                    serving = group.create_task(self._host.serve())
                for source, revision in sources:
                    arrived = asyncio.Event()
                    if self._host is not None:
                        self._host.begins(source)
                    group.create_task(self._one(source, revision, common, arrived))
                    await arrived.wait()  # the program needs the first one first
                self._arrived = True
                self._silence()
                if self._host is not None and serving is not None:
                    await self._stay(self._host)
                    serving.cancel()
        except asyncio.CancelledError:
            pass

    async def _stay(self, host: rendezvous.Host) -> None:
        """Wait for the program to ask for what has arrived."""
        import asyncio

        try:
            async with asyncio.timeout(_STAY_S):
                await host.heard.wait()
        except TimeoutError:
            pass

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """End with the program; only what makes delivered files safe from a power cut may outlive it."""
        try:
            fd = os.pidfd_open(self._program)
        except ProcessLookupError:
            self._ended()
        except OSError:  # an old kernel, or a sandbox
            self._look(loop)
        else:
            loop.add_reader(fd, self._told, loop, fd)

    def _told(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        loop.remove_reader(fd)
        self._ended()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            os.kill(self._program, 0)
        except ProcessLookupError:
            self._ended()
        except PermissionError:  # it has become another user
            loop.call_later(_POLL_S, self._look, loop)
        else:
            loop.call_later(_POLL_S, self._look, loop)

    def _ended(self) -> None:
        self._silence()
        if not self._arrived:
            self._cancel()
        elif self._host is not None:
            self._host.heard.set()

    async def _one(self, source: str, revision: str | None, common: Mapping[str, Any], arrived: asyncio.Event) -> None:
        from .asking import ask
        from .engine import Engine
        from .errors import FastloadError

        feed: rendezvous.Feed | None = None

        def emit(message: dict[str, Any]) -> None:
            if feed is not None:
                feed.tell(message)
            if message["kind"] == "manifest":
                give_way()
            elif message["kind"] == "finished":
                arrived.set()

        try:
            asked = ask(source, revision=revision, **common)
            if self._host is not None:
                feed = rendezvous.Feed(asked)
                self._host.feed(source, feed)
            await Engine(asked.settings, emit, asked.pm).run(asked.request, settle=True)
        except FastloadError as e:
            log.error("fastload exec: %s: %s", source, e)
            if self._host is not None:
                self._host.over(source)
        finally:
            arrived.set()
