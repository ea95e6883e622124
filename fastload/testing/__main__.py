"""``python -m fastload.testing serve FOLDER``: a hub until SIGTERM, Ctrl-C or the end of stdin.

Prints one JSON line with ``endpoint``, ``cdn``, ``pid``, ``commits`` and ``ca_file``. Each line of stdin may be a
command (``{"do": "requests" | "clear" | "release" | "script", "faults": [...]}``) and is answered by one line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import Any, NoReturn

from ..errors import FastloadError
from .faults import Fault
from .files import read_models
from .hub import Hub


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; return the exit status."""
    arguments = _parser().parse_args(argv)
    options: dict[str, Any] = json.loads(arguments.options)
    for name in ("rate_bytes_per_s", "latency_s", "shape", "token", "port"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    options["tls"] = options.get("tls", False) or arguments.tls
    signal.signal(signal.SIGTERM, _stop)
    try:
        with Hub(arguments.folder, **options) as hub:
            commits = {repo: hub.commit(repo) for repo in read_models(arguments.folder)}
            ca_file = None if hub.ca_file is None else str(hub.ca_file)
            _say({"endpoint": hub.endpoint, "cdn": hub.cdn, "pid": os.getpid(), "commits": commits, "ca_file": ca_file})
            for line in sys.stdin:
                _say(_obey(hub, json.loads(line)))
    except FastloadError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastload.testing", description="A Hugging Face Hub on loopback.")
    commands = parser.add_subparsers(required=True)
    serve = commands.add_parser("serve", help="serve a folder of org/name folders until SIGTERM or the end of stdin")
    serve.add_argument("folder")
    serve.add_argument("--rate-bytes-per-s", type=float, help="of each connection")
    serve.add_argument("--latency-s", type=float, help="before every answer")
    serve.add_argument("--shape", choices=["hub", "mirror", "presigned"])
    serve.add_argument("--token", help="opens gated and private repositories")
    serve.add_argument("--port", type=int, help="of the hub; default: any free one")
    serve.add_argument("--tls", action="store_true")
    serve.add_argument("--options", default="{}", help="further arguments of fastload.testing.Hub, as JSON")
    return parser


def _obey(hub: Hub, command: dict[str, Any]) -> Any:
    if command["do"] == "requests":
        return [r.to_record() for r in hub.requests]
    if command["do"] == "script":
        hub.script(*(Fault(**f) for f in command["faults"]))
    elif command["do"] == "clear":
        hub.clear()
    elif command["do"] == "release":
        hub.release()
    else:
        return {"error": f"unknown command {command['do']!r}"}
    return {}


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
