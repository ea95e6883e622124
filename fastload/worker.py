"""The transfer process: the engine in a child that imports no torch and shares no GIL with the program.

Beside a busy Python thread (imports, model construction) an engine in the same process falls to a seventh of its speed,
a child keeps two thirds (measured). The child gets its orders as one line of JSON on standard input, tells what it does
as lines of JSON on standard output, and ends with its transfer, or when standard input closes because the program is
gone: whoever else waits for the same files takes over from the journal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from .carrier import Carrier
from .errors import FastloadError
from .events import log
from .priority import give_way
from .settings import Settings
from .standby import Standby, close_pipes, started
from .transfer import Transfer
from .types import Digest, Manifest, RemoteFile, Request

#: Guessed: how long a child may take to put its files away before it is killed; the journal survives that too.
_PATIENCE_S = 5.0


class Child(Carrier):
    """A transfer process and the thread that reads what it tells.

    Args:
        standby: A process to give the orders to, instead of a new one.

    Raises:
        OSError: No process can be started here.
    """

    def __init__(
        self, request: Request, settings: Settings, transfer: Transfer, standby: Standby | None = None
    ) -> None:
        self._transfer = transfer
        self._stopped = False
        self._speaking = threading.Lock()
        orders = {"request": request_record(request), "settings": settings.to_record()}
        self._process = started(orders, settings.plugins, standby)
        self._begin(self._read, "fastload-child")

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def _read(self) -> None:
        stdout = self._process.stdout
        for line in stdout if stdout is not None else ():
            if not line.endswith(b"\n"):  # it was killed in the middle of a word
                break
            message = json.loads(line)
            if message["kind"] == "log":
                log.log(message["level"], "%s", message["text"])
            else:
                self._transfer.apply(message)
        status = self._process.wait()
        if not self._transfer.finished:
            self._transfer.fail(
                FastloadError(
                    "the transfer was stopped"
                    if self._stopped
                    else f"the transfer process ended with status {status} before its transfer did",
                    hint=None
                    if self._stopped
                    else "load again: what has landed is kept (FASTLOAD_PROCESS=0 does without the process)",
                )
            )
        close_pipes(self._process)

    def want(self, paths: Iterable[str]) -> None:
        """Let a transfer on demand deliver *paths*; call it once its manifest is known. Thread-safe, does not raise."""
        stdin = self._process.stdin
        line = json.dumps({"want": list(paths)}).encode() + b"\n"
        try:
            with self._speaking:
                if stdin is not None and not stdin.closed:
                    stdin.write(line)
                    stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended: its last message says how
            pass

    def rest(self, timeout_s: float) -> bool:
        """Let it end what it has begun and begin nothing more; tell whether it has been reaped by then."""
        if self._transfer.finished and self._process.stdin is not None:
            with self._speaking:
                try:
                    self._process.stdin.close()
                except BrokenPipeError:
                    pass
        return super().rest(timeout_s)

    def stop(self) -> None:
        """End the transfer if it still runs; return when the process is gone. Harmless when repeated.

        A child that has delivered everything is left to finish its disk writes by itself.
        """
        if self._transfer.finished or self.ended:
            return
        self._stopped = True
        # Not by closing its standard input: a process that was forked from this one meanwhile holds that open too.
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.join()


# -- orders as plain data -------------------------------------------------------------------------------------------


def request_record(request: Request) -> dict[str, Any]:
    """Return *request* as plain data."""
    record: dict[str, Any] = {
        "source": request.source,
        "revision": request.revision,
        "patterns": request.patterns,
        "everything": request.everything,
        "options": dict(request.options),
        "locked": None,
        "on_demand": request.on_demand,
    }
    if request.locked is not None:
        record["locked"] = asdict(request.locked)
        record["locked"]["local"] = None
    return record


def request_from(record: Mapping[str, Any]) -> Request:
    """Return what :func:`request_record` wrote."""
    values = dict(record)
    patterns = values["patterns"]
    values["patterns"] = None if patterns is None else tuple(patterns)
    if values["locked"] is not None:
        locked = dict(values["locked"])
        files = [{**f, "digest": Digest(**f["digest"]) if f["digest"] else None} for f in locked["files"]]
        values["locked"] = Manifest(**{**locked, "files": tuple(RemoteFile(**f) for f in files)})
    return Request(**values)


# -- the child's side -----------------------------------------------------------------------------------------------


def main() -> None:
    """Import what every transfer needs, then run the one that the orders on standard input describe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the program's to handle; it closes our standard input
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a plugin prints must not end up among the messages

    import asyncio
    import logging

    class ToProgram(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell({"kind": "log", "level": record.levelno, "text": record.getMessage()})

    lock = threading.Lock()

    def tell(message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            with lock:
                while data:  # a signal cuts a write short
                    data = data[out.write(data) :]
        except BrokenPipeError:  # the program is gone; the end of standard input ends us
            pass

    log.addHandler(ToProgram())
    log.propagate = False
    _prepare()
    line = sys.stdin.readline()
    if not line:  # the program is gone, or needs nobody
        os._exit(0)
    orders = json.loads(line)
    settings = Settings.from_record(orders["settings"])
    status = asyncio.run(_serve(request_from(orders["request"]), settings, tell))
    sys.stdout.flush()
    os._exit(status)  # nothing is left to put away, and a thread stuck in a dead disk must not keep the process


def _prepare() -> None:
    """Import what every transfer needs; which plugins these are stands on standard input."""
    from . import engine as engine
    from .plugins import manager

    line = sys.stdin.readline()
    if line:
        manager(Settings.from_record({"plugins": json.loads(line)}))


async def _serve(request: Request, settings: Settings, tell: Any) -> int:
    import asyncio

    from .engine import Engine
    from .plugins import manager

    task = asyncio.current_task()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(0)  # once is enough
        loop.add_signal_handler(signal.SIGTERM, lambda: None)
        if task is not None:
            task.cancel()

    heard = bytearray()

    def hear() -> None:
        data = os.read(0, 65536)
        if not data:
            stop()
        heard.extend(data)
        while b"\n" in heard:
            line, _, rest = heard.partition(b"\n")
            heard[:] = rest
            engine.want(json.loads(line)["want"])

    loop.add_signal_handler(signal.SIGTERM, stop)
    told: list[str] = []

    def emit(message: dict[str, Any]) -> None:
        tell(message)
        if message["kind"] == "manifest":
            give_way()
        if message["kind"] == "finished":
            told.append("finished")
            loop.remove_reader(0)  # delivered: the program may end; what is left is making the files safe

    engine = Engine(settings, emit, manager(settings))
    loop.add_reader(0, hear)
    try:
        await engine.run(request, settle=True)
        loop.add_reader(0, stop)  # what follows is of use to the program alone
        await engine.read_ahead()
    except FastloadError:
        return 0 if told else 1
    except asyncio.CancelledError:
        return 0 if told else 130
    return 0
