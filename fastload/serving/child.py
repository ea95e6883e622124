"""The supervised process: started so that it cannot outlive its supervisor, ended with all that it started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from ..errors import FastloadError

#: Becomes the program after its first word, our pid, once the kernel knows that it is to end with us (prctl(2)). The
#: parent may have died before that. A signal set to be ignored by Python would stay ignored in the program.
_BOOT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
for name in ("SIGPIPE", "SIGXFSZ"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as e:
    sys.stderr.write(f"fastload serve: {sys.argv[2]}: {e.strerror}\\n")
    sys.exit(127 if isinstance(e, FileNotFoundError) else 126)
"""
#: As shells do.
_CANNOT_RUN = {126: "it cannot be run", 127: "it cannot be found"}


class Child:
    """A process in a session of its own. Make and use it in the event loop's thread: it is to end with the thread that
    made it.

    Attributes:
        gone: Set when it, and whatever it has left in its session's group, is gone.
        status: Its exit status; negative: the signal that ended it; ``None`` while it runs.

    Args:
        command: Its words.
        environ: All of its environment.

    Raises:
        FastloadError: No process can be started.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self.gone = asyncio.Event()
        self.status: int | None = None
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, str(os.getpid()), *command],
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as e:
            raise FastloadError(f"no process can be started: {e.strerror}") from e
        self._thread = threading.Thread(target=self._reap, name="fastload-serve-child", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _reap(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            # Not reaped yet, so that nobody else can have got its pid, nor a group of that number.
            self._signal_group(signal.SIGKILL)
            self.status = self._process.wait()
        try:
            self._loop.call_soon_threadsafe(self.gone.set)
        except RuntimeError:  # the loop has ended early, and nobody waits
            pass

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # before it has become a session, or after its last process
            pass

    def terminate(self) -> None:
        """Ask it to end; harmless when it has."""
        with self._lock:
            if self.status is None:
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its group now; harmless when they have ended."""
        with self._lock:
            if self.status is None:
                self._signal_group(signal.SIGKILL)
                os.kill(self.pid, signal.SIGKILL)

    async def stop(self, patience_s: float, hurry: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL after *patience_s*, or when there is *hurry*; return when it is gone."""
        self.terminate()
        try:
            async with asyncio.TaskGroup() as group:
                waits = [group.create_task(event.wait()) for event in (self.gone, hurry)]
                await asyncio.wait(waits, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
        finally:
            self.kill()
        await self.gone.wait()

    def end(self) -> None:
        """Kill it and wait for its end, without an event loop."""
        self.kill()
        self._thread.join()


def obituary(name: str, status: int) -> FastloadError:
    """Return what to say of *name*, which has ended with *status* unasked."""
    if status < 0:
        try:
            how = f"was ended by {signal.Signals(-status).name}"
        except ValueError:  # a real-time signal has no name
            how = f"was ended by signal {-status}"
        killed = -status == signal.SIGKILL
        return FastloadError(f"{name} {how}", hint="out of memory? The kernel's log tells" if killed else None)
    if status in _CANNOT_RUN:
        return FastloadError(f"{name}: {_CANNOT_RUN[status]} (status {status})")
    return FastloadError(f"{name} ended with status {status}", hint="what it said stands in the log")
