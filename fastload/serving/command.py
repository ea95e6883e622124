"""How the app is started: its words, its environment, and where it will answer. No process is touched here."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..settings import Settings
from .options import Options


@dataclass(frozen=True, slots=True)
class Weights:
    """The models whose bytes start at wake.

    Attributes:
        sources: Each with its revision.
        common: Further keyword arguments of :func:`fastload.start`, the same for all.
    """

    sources: Sequence[tuple[str, str | None]] = ()
    common: Mapping[str, Any] = field(default_factory=dict)


def hook_command(options: Options, weights: Weights, address: str) -> list[str]:
    """Return the words that run the hook.

    Args:
        address: Of the supervisor's channel.
    """
    chosen = {"device": options.device, "dtype": options.dtype, "framework": options.framework}
    load = {name: value for name, value in chosen.items() if value is not None}
    load |= {name: weights.common[name] for name in ("files", "mirrors", "lock") if weights.common.get(name)}
    source, revision = next(iter(weights.sources), (None, None))
    orders = {
        "app": options.app,
        "address": address,
        "spawned_s": time.monotonic(),
        "model": source,
        "load": load if revision is None else {**load, "revision": revision},
        "path": options.predict_path,
        "body_bytes": options.body_bytes,
    }
    return [sys.executable, "-m", "fastload.serving.host", json.dumps(orders)]


def program_command(options: Options, port: int) -> list[str]:
    """Return the words of the program that is to listen on *port*."""
    return [word.replace("{port}", str(port)) for word in options.command]


def program_base(options: Options) -> str:
    """Return where the program will answer, without a slash at the end: as told, or a port that is free now."""
    port = options.app_port
    if port is None and options.ready_url is not None and "{port}" not in options.ready_url:
        parts = urlsplit(options.ready_url)
        if parts.scheme and parts.hostname:
            return f"{parts.scheme}://{parts.netloc}"
    if not port:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def ready_url(options: Options, base: str) -> str:
    """Return the URL that tells whether the program at *base* can work."""
    url = (options.ready_url or "/").replace("{port}", str(urlsplit(base).port or 80))
    return url if "://" in url else base + (url if url.startswith("/") else f"/{url}")


def environment(environ: Mapping[str, str], weights: Weights, address: str) -> dict[str, str]:
    """Return the app's environment: settings of the command line are its settings too, and its loads tell us their events.

    They are exported under every name, so that libraries that know nothing of fastload use the same cache and hub.
    """
    given = weights.common.get("settings") or {}
    settings = Settings.resolve(given, environ=environ)
    variables = {f.name: f.metadata["env"] for f in fields(Settings) if f.name in given}
    exported = {name: _text(getattr(settings, setting)) for setting, names in variables.items() for name in names}
    # As `fastload exec` does: where the wheel is installed, an unchanged from_pretrained reads along (fastload.starting).
    joining = {"FASTLOAD_ACCELERATE": ",".join(source for source, _ in weights.sources)} if weights.sources else {}
    return {**joining, **environ, **exported, "FASTLOAD_EVENT_SOCKET": address}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, Path):
        return os.path.abspath(value)
    return ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
