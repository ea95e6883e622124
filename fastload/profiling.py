"""What the command line does with profiles: options, files, ``fastload profile``.

A profile becomes a Chrome trace, an HTML waterfall, Prometheus text and lines of a history. Each file is complete or not
there: it is written beside its place and moved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CacheError, UnsupportedSourceError

if TYPE_CHECKING:
    from .profile import Profiles

#: Options of the interpreter that take the next word.
_WITH_VALUE = {"-W", "-X", "--check-hash-based-pycs"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """Paths of the files to be written; those that are ``None`` are not."""

    trace: str | None = None
    html: str | None = None
    svg: str | None = None
    metrics: str | None = None
    history: str | None = None

    @classmethod
    def of(cls, args: Namespace) -> Outputs:
        """Return what the options of :func:`add_options` say, as paths that stay right in another folder."""
        given = {name: getattr(args, name) for name in cls.__slots__}
        return cls(**{name: os.path.abspath(path) for name, path in given.items() if path})

    @property
    def needs_events(self) -> bool:
        """Whether one of them draws single ranges."""
        return bool(self.trace or self.html or self.svg)

    def for_process(self, pid: int) -> Outputs:
        """Return paths of its own for another process; a history is shared."""
        named = {name: path and f"{path}.{pid}" for name, path in asdict(self).items()}
        return Outputs(**{**named, "history": self.history})


def add_options(parser: ArgumentParser) -> None:
    """Add the options that name :class:`Outputs`."""
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace, which Perfetto opens")
    parser.add_argument("--html", metavar="FILE", help="write a waterfall as one HTML file")
    parser.add_argument(
        "--svg", metavar="FILE", help="draw who had the bytes when: connections, hashes, slots, devices"
    )
    parser.add_argument("--metrics", metavar="FILE", help="write Prometheus text")
    parser.add_argument("--history", metavar="FILE", help="add one JSON line a load, for `fastload profile compare`")


def write(profiles: Profiles, outputs: Outputs) -> None:
    """Write the files that *outputs* names.

    Raises:
        CacheError: One cannot be written.
    """
    from . import history, metrics, timeline, trace, waterfall

    makers: dict[str | None, Callable[[], str]] = {
        outputs.trace: lambda: json.dumps(trace.chrome_trace(profiles)),
        outputs.html: lambda: waterfall.html(profiles),
        outputs.svg: lambda: timeline.svg(profiles),
        outputs.metrics: lambda: metrics.prometheus(profiles),
    }
    for path, make in makers.items():
        if path is not None:
            _write(Path(path), make())
    if outputs.history is not None:
        history.append(outputs.history, profiles.loads, cold_start=profiles.cold_start)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as e:
        raise CacheError(f"{path}: cannot be written: {e.strerror}") from e


def command_for(command: Sequence[str], outputs: Outputs) -> list[str]:
    """Return *command*, a Python program, as it is to be run so that it is profiled.

    Raises:
        UnsupportedSourceError: It is no Python program.
    """
    orders = json.dumps(asdict(outputs))
    first, rest = command[0], list(command[1:])
    if not Path(first).name.startswith("python"):
        interpreter, script = _script(first)
        return [interpreter, "-m", "fastload.observed", orders, script, *rest]
    flags = []
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c", "-"):
        word = rest.pop(0)
        if re.fullmatch("-[A-VYZa-z]+[mc]", word):  # as in `python -um module`
            word, last = word[:-1], word[-1]
            rest.insert(0, f"-{last}")
        flags.append(word)
        if word in _WITH_VALUE and rest:
            flags.append(rest.pop(0))
    if not rest or rest[0] == "-" or (rest[0] in ("-m", "-c") and len(rest) < 2):
        raise UnsupportedSourceError(
            f"{' '.join(command)} names no program", hint="`fastload profile -- python app.py`"
        )
    return [first, *flags, "-m", "fastload.observed", orders, *rest]


def _script(word: str) -> tuple[str, str]:
    """Return the interpreter and the path of a script like those that pip installs."""
    path = shutil.which(word)
    head = b""
    if path is not None:
        with open(path, "rb") as f:
            head = f.readline(4096)
    interpreter = head.removeprefix(b"#!").decode(errors="replace").split()
    if path is None or not head.startswith(b"#!") or "python" not in head.decode(errors="replace"):
        raise UnsupportedSourceError(
            f"{word} is no Python program that can be found", hint="`fastload profile -- python app.py`"
        )
    return (interpreter[0] if len(interpreter) == 1 else sys.executable), path
