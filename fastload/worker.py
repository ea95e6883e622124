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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FastloadError
from .events import log
from .settings import Settings
from .transfer import Transfer
from .types import Digest, Manifest, RemoteFile, Request

if TYPE_CHECKING:
    import asyncio

#: The child sees the same modules as the program, whatever the program did to sys.path; nothing runs __main__ again.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); from fastload.worker import main; main()"
#: Guessed: how long a child may take to put its files away before it is killed; the journal survives that too.
_PATIENCE_S = 5.0


class Child:
    """A transfer process and the thread that reads what it tells.

    Raises:
        OSError: No process can be started here.
    """

    def __init__(self, request: Request, settings: Settings, transfer: Transfer) -> None:
        self._transfer = transfer
        self._stopped = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True
        )
        self._thread = threading.Thread(target=self._read, name="fastload-child", daemon=True)
        orders = {"request": request_record(request), "settings": settings.to_record()}
        stdin = self._process.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps(sys.path).encode() + b"\n" + json.dumps(orders).encode() + b"\n")
                stdin.flush()
        except BrokenPipeError:  # it died at once: the reader tells with which status
            pass
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def _read(self) -> None:
        stdout = self._process.stdout
        for line in stdout if stdout is not None else ():
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
        for pipe in (self._process.stdin, stdout):
            if pipe is not None:
                pipe.close()

    def join(self) -> None:
        """Wait until the process has ended and has been reaped."""
        self._thread.join()

    def stop(self) -> None:
        """End the transfer if it still runs; return when the process is gone. Harmless when repeated.

        A child that has delivered everything is left to finish its disk writes by itself.
        """
        if self._transfer.finished or not self._thread.is_alive():
            return
        self._stopped = True
        stdin = self._process.stdin
        if stdin is not None:
            stdin.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._thread.join()


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
    """Run one transfer as the orders on standard input say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the program's to handle; it closes our standard input
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a plugin prints must not end up among the messages
    orders = json.loads(sys.stdin.readline())
    settings = Settings.from_record(orders["settings"])

    import asyncio
    import logging

    class ToProgram(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell({"kind": "log", "level": record.levelno, "text": record.getMessage()})

    def tell(message: dict[str, Any]) -> None:
        try:
            out.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:  # the program is gone; the end of standard input ends us
            pass

    log.addHandler(ToProgram())
    log.propagate = False
    status = asyncio.run(_serve(request_from(orders["request"]), settings, tell))
    sys.stdout.flush()
    os._exit(status)  # nothing is left to put away, and a thread stuck in a dead disk must not keep the process


async def _serve(request: Request, settings: Settings, tell: Any) -> int:
    import asyncio

    from .engine import Engine
    from .plugins import manager

    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    if task is not None:
        loop.add_reader(0, _end_of_input, task)
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    told: list[str] = []

    def emit(message: dict[str, Any]) -> None:
        tell(message)
        if message["kind"] == "finished":
            told.append("finished")
            loop.remove_reader(0)  # delivered: the program may end; what is left is making the files safe

    try:
        await Engine(settings, emit, manager(settings)).run(request, settle=True)
    except FastloadError:
        return 0 if told else 1
    except asyncio.CancelledError:
        return 130
    return 0


def _end_of_input(task: asyncio.Task[Any]) -> None:
    if not os.read(0, 4096):
        task.cancel()


def executable() -> Path | None:
    """Return the interpreter that a child would run, or ``None`` where there is none (embedded interpreters)."""
    return Path(sys.executable) if sys.executable and os.access(sys.executable, os.X_OK) else None
