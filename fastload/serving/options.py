"""What ``fastload serve`` can be told, as arguments of the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import SettingsError

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True, slots=True)
class Options:
    """How a supervisor behaves.

    Attributes:
        app: ``module:name`` of the hook; ``None`` where *command* is supervised.
        command: The program that listens on *app_port*; the word ``{port}`` in it stands for that.
        host: Address to listen on.
        port: To listen on; 0: any free one.
        prefix: Path before our own endpoints, for apps that have a ``/`` or ``/metrics`` themselves.
        asleep: Wait for the first wake or request.
        app_port: Of the program; ``None``: any free one, told as ``{port}`` and in the variable ``PORT``.
        ready_url: Answers 2xx when the program can work: a URL, or a path on it; ``None``: it answers anything below 500.
        warmup: Body of the request that must succeed before anybody else's is let through; ``None``: none.
        predict_path: Where that goes, and where a hook answers.
        hold_requests: How many requests may wait for a start.
        hold_s: How long one may.
        body_bytes: Largest body of a request.
        idle_s: After so long without a request the app is stopped; 0: never.
        start_s: A start that takes longer has failed; 0: none does.
        stop_s: Between SIGTERM and SIGKILL.
        drain_s: How long requests under way may take when the supervisor itself is told to end.
        device: For the model that a hook takes as its argument.
        dtype: As *device*.
        framework: As *device*.
    """

    app: str | None = None
    command: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    prefix: str = ""
    asleep: bool = False
    app_port: int | None = None
    ready_url: str | None = None
    warmup: str | None = None
    predict_path: str = "/predict"
    hold_requests: int = 64
    hold_s: float = 60.0
    body_bytes: int = 64 << 20
    idle_s: float = 0.0
    start_s: float = 1800.0
    stop_s: float = 10.0
    drain_s: float = 15.0  # reasoned: with stop_s below the 30 s after which Kubernetes kills by default
    device: str | None = None
    dtype: str | None = None
    framework: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace, command: Sequence[str]) -> Options:
        """Return what *args* and the words after ``--`` say.

        Raises:
            SettingsError: A value is wrong, or means nothing here.
        """
        given = {f.name: getattr(args, f.name) for f in fields(cls) if f.name != "command"}
        if given["app"] is not None and not re.fullmatch(r"[\w.]+:[\w.]+", given["app"]):
            raise SettingsError(f"{given['app']!r} is not module:name", hint="for example app:setup")
        for name in ("app_port", "ready_url") if given["app"] else ("device", "dtype", "framework"):
            if given[name] is not None:
                word = "--port-of-app" if name == "app_port" else f"--{name.replace('_', '-')}"
                raise SettingsError(f"{word} means nothing {'for a hook' if given['app'] else 'for a program'}")
        given["warmup"] = None if given["warmup"] is None else _body(given["warmup"])
        given["prefix"] = _path(given["prefix"], "--prefix").rstrip("/")
        given["predict_path"] = _path(given["predict_path"], "--predict-path")
        return cls(**given, command=tuple(command))

    @property
    def name(self) -> str:
        """What it supervises, in a few words: of a program those before the first option, which may hold a secret."""
        if self.app is not None:
            return self.app
        first, *rest = self.command
        plain = itertools.takewhile(lambda word: not word.startswith("-"), rest)
        return " ".join([os.path.basename(first), *itertools.islice(plain, 2)])


def _body(text: str) -> str:
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise SettingsError(f"--warmup {text}: cannot be read: {e}") from e
    try:
        json.loads(text)
    except ValueError as e:
        raise SettingsError(f"--warmup is not JSON: {e}", hint='for example --warmup \'{"inputs": "hello"}\'') from None
    return text


def _path(text: str, option: str) -> str:
    if text and not re.fullmatch(r"/[\w./~-]*", text):
        raise SettingsError(f"{option} {text!r} is not a path", hint="for example /fastload")
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :meth:`Options.of` reads."""
    default = Options()
    parser.add_argument(
        "app", nargs="?", metavar="MODULE:NAME", help="the hook that makes the model; or `-- PROGRAM …`"
    )

    def add(word: str, help: str, **more: object) -> None:
        name = str(more.get("dest") or word.removeprefix("--").replace("-", "_"))
        parser.add_argument(word, help=help, default=getattr(default, name), **more)  # type: ignore[arg-type]

    add("--host", "address to listen on (default: %(default)s)", metavar="ADDRESS")
    add("--port", "to listen on; 0: any free one (default: %(default)s)", type=_port, metavar="N")
    add("--prefix", "path before our own endpoints, for a program that has / or /metrics itself", metavar="PATH")
    add("--asleep", "start nothing before the first wake or request", action="store_true")
    add("--port-of-app", "where the program listens (default: any, as {port} and $PORT)", type=_port, metavar="N",
        dest="app_port")  # fmt: skip
    add("--ready-url", "URL, or path, of the program that answers 2xx when it can work", metavar="URL")
    add("--warmup", "first request, which must succeed: JSON, or @FILE", metavar="JSON")
    add(
        "--predict-path",
        "path that predicts: where the warm-up goes, and a hook answers (default: %(default)s)",
        metavar="PATH",
    )
    add("--hold-requests", "requests that may wait for a start (default: %(default)s)", type=_count, metavar="N")
    add("--hold-s", "seconds that one may wait (default: %(default)s)", type=_seconds, metavar="S")
    add("--body-bytes", "largest body of a request (default: 64MiB)", type=_bytes, metavar="N")
    add("--idle-s", "stop the app after so long without a request; 0: never (default)", type=_seconds, metavar="S")
    add("--start-s", "a start that takes longer has failed; 0: none (default: %(default)s)", type=_seconds, metavar="S")
    add("--stop-s", "between SIGTERM and SIGKILL (default: %(default)s)", type=_seconds, metavar="S")
    add("--drain-s", "for requests under way when this command is to end (default: %(default)s)", type=_seconds,
        metavar="S")  # fmt: skip
    add("--device", "of the model that the hook takes as its argument (default: cpu)")
    add("--dtype", "of its weights, for example bfloat16")
    add("--framework", "who builds it; the files decide where it is not given")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([kmg]i?)?b?", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; for example 64MiB")
    return int(found[1]) * _SUFFIXES[found[2] or ""]
