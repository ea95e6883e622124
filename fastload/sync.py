"""The engine for callers without an event loop: in a loop of its own, in a thread that lives as long as the transfer.

Works from any thread, under a running loop, in notebooks and after a fork, because it never touches the caller's loop and
keeps nothing between two transfers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .ahead import ReadAhead, ahead
from .carrier import Carrier
from .errors import FastloadError
from .events import log
from .readahead import is_resident
from .settings import Settings
from .transfer import Transfer
from .types import Request

if TYPE_CHECKING:
    from .engine import Engine

#: Guessed, as for a child: how long a thread may take to put its files away.
_PATIENCE_S = 5.0


def unexpected(error: Exception) -> FastloadError:
    """Return the error for something that should not have happened in a transfer; *error* is its cause."""
    result = FastloadError(f"the transfer ended with {type(error).__name__}: {error}", hint="please report this")
    result.__cause__ = error
    return result


def engine_class() -> type[Engine]:
    """Import the engine, and aiohttp with it, which a program whose transfers run in a child never needs. Blocks."""
    from .engine import Engine

    return Engine


class InThread(Carrier):
    """Runs one transfer in a thread.

    Args:
        settle: The transfer is over when its files are safe from a power cut; otherwise they are made so after it, and
            nobody waits for that.
    """

    def __init__(
        self, request: Request, settings: Settings, transfer: Transfer, pm: Any, *, settle: bool = False
    ) -> None:
        self._request = request
        self._settings = settings
        self._transfer = transfer
        self._pm = pm
        self._settle = settle
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._ahead: ReadAhead | None = None
        self._stopped = False
        self._begin(self._main, "fastload-loop")

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            try:
                runner.run(self._run())
            except FastloadError:
                pass  # told as a message
            except asyncio.CancelledError:
                self._transfer.fail(FastloadError("the transfer was stopped"))
            except Exception as e:  # a defect of ours must end the readers' waits too
                self._transfer.fail(unexpected(e))
            finally:
                with self._lock:
                    self._loop = None
        if self._engine is not None and self._transfer.finished and not self._settle:
            # Here, not in a pool: the program may end meanwhile, and the interpreter would wait for a pool's threads.
            self._rest_of(self._engine)

    def _rest_of(self, engine: Engine) -> None:
        """Do what nobody waits for."""
        try:
            cold = [path for path in engine.found if not is_resident(path)]
        except OSError:  # whoever reads it will say so
            cold = []
        with self._lock:
            if not self._stopped:
                self._ahead = ahead(cold, self._settings)
        try:
            engine.settle()
        except FastloadError as e:
            log.warning("what was fetched may be gone after a power cut, and will be fetched again then: %s", e)
        if self._ahead is not None:
            self._ahead.join()

    async def _run(self) -> None:
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.current_task()
            if self._stopped:
                raise asyncio.CancelledError
        engine = (await asyncio.to_thread(engine_class))(self._settings, self._transfer.apply, self._pm)
        self._engine = engine
        await engine.run(self._request, settle=self._settle)

    def want(self, paths: Iterable[str]) -> None:
        """As :meth:`fastload.worker.Child.want`."""
        with self._lock:
            if self._loop is not None and self._engine is not None:
                self._loop.call_soon_threadsafe(self._engine.want, list(paths))

    def rest(self, timeout_s: float) -> bool:
        """As :meth:`fastload.worker.Child.rest`."""
        if self._transfer.finished and not self._settle:
            with self._lock:
                self._stopped = True
            if self._ahead is not None:
                self._ahead.rest(0)
        return super().rest(timeout_s)

    def stop(self) -> None:
        """Cancel the transfer if it still runs; return when its thread has ended. Harmless when repeated.

        As with a child, what was delivered is left to be made safe. A thread that a system call holds (a name that nobody
        resolves, a dead disk) is not waited for longer than a child would be; it ends with that call.
        """
        if self._transfer.finished and not self._settle:
            return
        with self._lock:
            stopped, self._stopped = self._stopped, True
            if not stopped and self._loop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)
        if not super().rest(_PATIENCE_S):
            log.warning("a transfer that was stopped waits for the system; its thread ends with that")
