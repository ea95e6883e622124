"""Starts the transfer process, if need be before it is known what to transfer.

A child needs 0.2 s for its own imports, aiohttp's above all, and the program's first call needs 0.1 s to find out what it is
asked for. So the first ``load``, ``load_tensors``, ``stream`` or ``start`` that is likely to need one has its child started
before its own imports, and the two run side by side: the engine begins 0.25 s after the call instead of 0.44 (measured,
``load_tensors`` of 100 MB on two cores, medians of 4). Later calls know at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import SourceError
from .settings import Settings

#: The child sees the same modules as the program, whatever the program did to sys.path; nothing runs __main__ again.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); from fastload.worker import main; main()"
#: What makes a starting Python begin transfers of its own.
_NOT_FOR_CHILDREN = ("FASTLOAD_START", "FASTLOAD_ACCELERATE")
#: Says that ``fastload exec`` has begun the transfer (:mod:`fastload.rendezvous`, which costs an import).
_LAUNCHED = "FASTLOAD_LAUNCHED"
#: Specified, pipe(7): what an ordinary user may ask for. About 5000 messages, so 40 GB in ranges of 8 MiB.
_PIPE_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")

_is_first = True


def executable() -> Path | None:
    """Return the interpreter that a child would run, or ``None`` where there is none.

    A program that embeds Python (uWSGI, a frozen application) names itself in ``sys.executable``; started with our
    arguments it would do who knows what. Its Python lies in its prefix, or nowhere.
    """
    own, name = Path(sys.executable or "/"), f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = [own] if "python" in own.name.lower() or "pypy" in own.name.lower() else []
    places.append(Path(sys.exec_prefix, "bin", name))
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


class Standby:
    """A transfer process that imports what every transfer needs, and then waits for its orders.

    Whoever makes one either takes it or dismisses it.

    Args:
        plugins: The setting of that name: others are not imported.

    Raises:
        OSError: No process can be started here.
    """

    def __init__(self, plugins: tuple[str, ...] | None) -> None:
        python = executable()
        if python is None:
            raise OSError("there is no Python to run it")
        self._circumstances = _circumstances()
        path, environ = self._circumstances
        self._taken = False
        self._process = subprocess.Popen(
            # -P: the folder that the program stands in must not lend the child its modules. A group of its own: Ctrl-C is
            # the program's to handle, from the first moment on.
            [str(python), "-P", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
            env=environ,
        )
        try:
            with suppress(OSError, AttributeError):  # not Linux, or the user has many pipes: 64 KiB do too
                # The child must not wait for us: an import can hold the GIL, and with it the reader, for seconds.
                fcntl.fcntl(self._process.stdout or -1, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            _write(self._process, path, plugins)
        except BaseException:
            self.dismiss()
            raise

    def take(self, orders: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Give the process its orders, and the process to the caller. Standard input and output stay open."""
        self._taken = True
        _write(self._process, orders)
        return self._process

    @property
    def fits(self) -> bool:
        """Whether a process that was started now would be no other one."""
        return not self._taken and self._process.poll() is None and self._circumstances == _circumstances()

    def dismiss(self) -> None:
        """End the process, unless it was taken. Harmless when repeated."""
        if not self._taken:
            self._taken = True
            self._process.kill()  # it has begun nothing
            self._process.wait()
            close_pipes(self._process)


def close_pipes(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes to *process*, also if something that it never read stands in one."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def started(
    orders: dict[str, Any], plugins: tuple[str, ...] | None, standby: Standby | None
) -> subprocess.Popen[bytes]:
    """Return a transfer process with *orders*: the one that stands by, or a new one.

    Raises:
        OSError: No process can be started here.
    """
    if standby is None or not standby.fits:
        standby = Standby(plugins)
    return standby.take(orders)


@contextmanager
def standing_by(
    source: str | os.PathLike[str], settings: Settings, *, revision: str | None = None, locked: bool = False
) -> Iterator[Standby | None]:
    """Have a transfer process come up while the block finds out its orders, if somebody is likely to be asked for *source*.

    Only the first such call of a process has something to hide. Leaving the block ends what nobody took.
    """
    standby = None
    if _is_likely(str(source), settings, revision, locked) and _first():
        try:
            standby = Standby(settings.plugins)
        except OSError:  # whoever needs one tries again, and says so
            pass
    try:
        yield standby
    finally:
        if standby is not None:
            standby.dismiss()


def _first() -> bool:
    global _is_first
    first, _is_first = _is_first, False  # two threads may both be first: one child too many, which is dismissed
    return first


def _is_likely(source: str, settings: Settings, revision: str | None, locked: bool) -> bool:
    """Tell whether somebody will have to be asked for *source*; a wrong guess costs time, nothing else."""
    if settings.process is False or settings.offline or _LAUNCHED in os.environ:
        return False
    name, _, pinned = source.removeprefix("hf://").partition("@")
    if "://" in name or os.path.exists(source):
        return False
    if not locked and not _COMMIT.fullmatch(str(revision or pinned)):
        return True  # whether the cache holds what a branch means today, the hub must tell
    from .cache import RepoCache

    try:
        return not RepoCache(settings.cache_dir, name).folder.exists()
    except SourceError:  # no repository's name
        return False


def _circumstances() -> tuple[list[str], dict[str, str]]:
    """Return what a child inherits: where modules are found, and the environment."""
    return list(sys.path), {name: value for name, value in os.environ.items() if name not in _NOT_FOR_CHILDREN}


def _write(process: subprocess.Popen[bytes], *lines: Any) -> None:
    if process.stdin is None:
        return
    try:
        process.stdin.write("".join(json.dumps(line, default=str) + "\n" for line in lines).encode())
        process.stdin.flush()
    except BrokenPipeError:  # it died at once: whoever reads what it says finds with which status
        pass
