"""The command ``fastload``: parse, call the library, render. No logic lives here.

stdout carries the result and nothing else (one JSON document with ``--json``); progress and errors go to stderr.
Exit codes: 0 done, 1 an error of ours or an unsound file, 2 usage, 130 Ctrl-C, 141 nobody reads stdout, 143 SIGTERM.
``exec`` and ``profile`` end as their program does; 126 and 127 if that cannot be run, as in a shell. ``serve`` ends with 0
after both signals.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import fastload

from . import arguments
from .errors import FastloadError, to_record

if TYPE_CHECKING:
    from .settings import Settings

_INTERRUPTED = "interrupted; what has arrived is kept, and the same command goes on from there"


@dataclass(frozen=True, slots=True)
class _Result:
    record: dict[str, Any]
    text: str
    code: int = 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, on the way that Ctrl-C takes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The words after ``fastload``; ``sys.argv`` where ``None``.
    """
    try:
        with _terminable():
            words, command = arguments.split_command(sys.argv[1:] if argv is None else argv)
            args = _parser().parse_args(arguments.join_locked(words))
            args.command = command
            try:
                with redirect_stdout(sys.stderr):  # a framework that prints must not get into the result
                    result: _Result = args.run(args)
            except FastloadError as e:
                result = _Result({"error": to_record(e)}, "", 1)
                if not args.json:
                    print(e, file=sys.stderr)
            _print(json.dumps(result.record, indent=2) if args.json else result.text)
            return result.code
    except KeyboardInterrupt as e:
        print(_INTERRUPTED, file=sys.stderr)
        return 143 if isinstance(e, _Terminated) else 130
    except BrokenPipeError:
        # Else the interpreter complains when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _print(text: str) -> None:
    if text:
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # and so it stays, also for what `exec` starts
            yield
            return
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are the program's own affair
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- commands -------------------------------------------------------------------------------------------------------


def _prefetch(args: argparse.Namespace) -> _Result:
    snapshots = []
    for source, revision in _sources(args):
        with _progress(args, source) as observer:
            snapshot = fastload.prefetch(source, revision=revision, observers=[observer], **_common(args))
        record = {name: getattr(snapshot, name) for name in ("source", "revision", "commit")}
        snapshots.append({**record, "path": str(snapshot.path), "files": list(snapshot.files)})
    return _Result({"snapshots": snapshots}, "\n".join(s["path"] for s in snapshots))


def _load(args: argparse.Namespace) -> _Result:
    from . import profiling, report

    [(source, revision)] = _sources(args)
    outputs = profiling.Outputs.of(args)
    chosen = {"device": args.device, "dtype": args.dtype, "framework": args.framework}
    given = {name: value for name, value in chosen.items() if value is not None}
    with (
        _progress(args, source) as observer,
        fastload.profile(events=outputs.needs_events, imports=True) as profiles,
    ):
        try:
            load = fastload.load_tensors if args.tensors else fastload.load
            loaded = load(source, revision=revision, observers=[observer], **given, **_common(args))
        finally:  # of a load that failed most of all
            profiling.write(profiles, outputs)
    kind = f"{len(loaded)} tensors" if args.tensors else f"{type(loaded).__module__}.{type(loaded).__qualname__}"
    text = report.render(profiles, width=_columns(), ascii=not _draws())
    return _Result({"type": kind, **profiles.to_record()}, f"{kind}\n{text}\n{profiles.cold_start}")


def _profile(args: argparse.Namespace) -> _Result:
    from . import profiling

    if args.command and not args.words:
        words = profiling.command_for(args.command, profiling.Outputs.of(args))
        try:
            sys.stdout.flush()
            os.execvp(words[0], words)
        except OSError as e:
            print(f"fastload profile: {words[0]}: {e.strerror}", file=sys.stderr)
            return _Result({}, "", 127 if isinstance(e, FileNotFoundError) else 126)
    if args.command or len(args.words) != 3 or args.words[0] != "compare":
        args.parser.error("expected `-- PROGRAM …`, or `compare BEFORE.jsonl AFTER.jsonl`")
    return _compare(*args.words[1:])


def _compare(before: str, after: str) -> _Result:
    from . import history, report

    sides = [history.read(path) for path in (before, after)]
    changes = history.compare(*sides)
    rows = [
        (c.name, *(f"{value:.2f}" for value in (*c.before, *c.after)), f"{c.delta_s:+.2f}", "moved" if c.moved else "")
        for c in changes
    ]
    heading = ("seconds", "p50 before", "p90", "p50 after", "p90", "change", "")
    counts = [sum(record["ok"] for record in side) for side in sides]
    lines = [
        report.table(rows, heading=heading),
        f"loads that came to a good end: {counts[0]} before, {counts[1]} after",
    ]
    record = {"before": counts[0], "after": counts[1], "changes": [c.to_record() for c in changes]}
    return _Result(record, "\n".join(lines))


def _exec(args: argparse.Namespace) -> _Result:
    from .launch import launch

    if not args.command:
        args.parser.error("the following arguments are required: -- COMMAND")
    try:
        launch(_sources(args), args.command, _common(args))
    except OSError as e:
        print(f"fastload exec: {args.command[0]}: {e.strerror}", file=sys.stderr)
        return _Result({}, "", 127 if isinstance(e, FileNotFoundError) else 126)


def _serve(args: argparse.Namespace) -> _Result:
    from .serving.command import Weights
    from .serving.options import Options
    from .serving.serve import serve

    if (args.app is None) == (not args.command):
        args.parser.error("expected MODULE:NAME, or `-- PROGRAM …`")
    options = Options.of(args, args.command)
    weights = Weights(_sources(args) if args.source or args.locked else (), _common(args))

    def announce(url: str) -> None:
        print(f"fastload serve: {options.name} at {url}", file=sys.stderr, flush=True)

    serve(options, weights, announce, os.environ)
    return _Result({}, "")


def _verify(args: argparse.Namespace) -> _Result:
    from .asking import ask
    from .cache import check_snapshot
    from .known import find_source

    asked = ask(args.source[0], revision=args.revision, settings=_overrides(args))
    source = find_source(asked.request, asked.settings, asked.pm)
    checks = check_snapshot(asked.settings.cache_dir, source.name, source.revision)
    bad = [check for check in checks if check.state in ("corrupt", "missing")]
    lines = [f"{c.state}: {c.path} (expected {c.expected}, is {c.actual or 'not there'})" for c in bad]
    lines += [f"{c.state}: {c.path}" for c in checks if c.state == "unknown"]
    lines.append(f"{source.name} at {source.revision}: {len(bad)} of {len(checks)} files are corrupt or missing")
    record = {"source": source.name, "revision": source.revision, "ok": not bad, "files": [asdict(c) for c in checks]}
    return _Result(record, "\n".join(lines), 1 if bad else 0)


def _lock(args: argparse.Namespace) -> _Result:
    from . import loader
    from .lock import Lock

    lock, lines = Lock.read(args.output) if os.path.exists(args.output) else Lock(), []
    for source in args.source:
        manifest = loader.resolve(source, revision=args.revision, settings=_overrides(args))
        lock = lock.with_manifest(manifest)
        size = sum(file.size for file in manifest.files)
        lines.append(
            f"{manifest.source} at {manifest.revision}: {manifest.commit}, {len(manifest.files)} files, {size} bytes"
        )
    lock.write(args.output)
    return _Result({"path": args.output, **lock.to_record()}, "\n".join([*lines, f"written: {args.output}"]))


def _doctor(args: argparse.Namespace) -> _Result:
    from . import doctor

    examination = doctor.examine(
        args.source, revision=args.revision, settings=_overrides(args), link_bytes_per_s=args.link
    )
    return _Result(examination.to_record(), "\n".join(examination.lines()), 0 if examination.ok else 1)


def _plugins(args: argparse.Namespace) -> _Result:
    from . import plugins, report

    records = plugins.report(_settings(args))
    rows = [(r.name, r.version, r.distribution, r.error or ", ".join(r.hooks)) for r in records]
    heading, *lines = report.table(rows, heading=("plugin", "version", "from", "hooks, or why it is out")).split("\n")
    lines = [_red(line) if r.error else line for line, r in zip(lines, records, strict=True)]
    return _Result({"plugins": [asdict(r) for r in records]}, "\n".join([heading, *lines]))


def _show_settings(args: argparse.Namespace) -> _Result:
    from . import report

    records = _settings(args).table()
    rows = [(r["name"], _value(r["value"]), r["origin"], r["help"]) for r in records]
    return _Result({"settings": records}, report.table(rows, heading=("setting", "value", "from", "")))


_COMMANDS: dict[str, Callable[[argparse.Namespace], _Result]] = {
    "prefetch": _prefetch,
    "load": _load,
    "exec": _exec,
    "serve": _serve,
    "profile": _profile,
    "verify": _verify,
    "lock": _lock,
    "doctor": _doctor,
    "plugins": _plugins,
    "settings": _show_settings,
}


# -- what the arguments say -------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    return arguments.parser(_COMMANDS)


def _sources(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    from .lock import Lock

    if not args.source and args.locked is None:
        args.parser.error("the following arguments are required: SOURCE (or --locked)")
    if args.source:
        return [(source, args.revision) for source in args.source]
    return [(m.source, m.revision) for m in Lock.read(args.locked).manifests]


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {"files": args.files, "mirrors": args.mirror, "settings": _overrides(args), "lock": args.locked}


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {**dict(args.set), **({"cache_dir": args.cache_dir} if args.cache_dir else {})}


# -- rendering ------------------------------------------------------------------------------------------------------


def _progress(args: argparse.Namespace, source: str) -> Any:
    from .builtin.progress import shown

    return shown(source, quiet=args.quiet)


def _settings(args: argparse.Namespace) -> Settings:
    from .plugins import resolve_settings

    return resolve_settings(_overrides(args))


def _value(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)


def _red(line: str) -> str:
    terminal = sys.__stdout__ is not None and sys.__stdout__.isatty()
    return f"\x1b[31m{line}\x1b[0m" if terminal and not os.environ.get("NO_COLOR") else line


def _columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _draws() -> bool:
    try:
        "░▒▓█└─┘".encode(sys.__stdout__.encoding if sys.__stdout__ else "ascii")
    except UnicodeEncodeError:
        return False
    return True
