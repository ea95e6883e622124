"""The hooks: what a plugin may add. Built-in parts and plugins of this distribution enter by the same door.

Hooks are synchronous and cheap: they return objects whose methods do the I/O. Only ``fastload_build_model`` may block.
A plugin is a module (or object) under the entry-point group ``fastload``; each hook is a function of the same name
marked with :data:`hookimpl`. A hook exists only when a real plugin uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from .events import Observer
    from .settings import Settings
    from .types import Format, Platform, Snapshot, Source

#: The project name of hooks and of the entry-point group.
GROUP = "fastload"

hookspec = pluggy.HookspecMarker(GROUP)
#: Marks a function of a plugin as the implementation of the hook with its name.
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec(firstresult=True)
def fastload_platform(environ: Mapping[str, str]) -> Platform | None:
    """Recognise the platform that this process runs on.

    Called once, before settings are resolved. The platform's settings are defaults: environment variables and
    arguments win over them.

    Args:
        environ: A copy of ``os.environ``.

    Returns:
        Name and settings (for example a cache directory on a volume that outlives the container), or ``None``. Stops
        at the first result.
    """


@hookspec(firstresult=True)
def fastload_source(uri: str, revision: str | None, settings: Settings) -> Source | None:
    """Turn *uri* into a source of files, or decline.

    Decide from the text of *uri* (and from what is on this machine) alone; ask the network in ``Source.files()``.

    Args:
        uri: As the user wrote it.
        revision: As the user wrote it; ``None`` means the source's default.

    Returns:
        A :class:`fastload.types.Source`, or ``None``. Stops at the first result.
    """


@hookspec
def fastload_mirrors(source: Source, settings: Settings) -> Iterable[str] | None:
    """Offer further base URLs that serve the same bytes under the Hub's paths.

    The results of all plugins are joined; the origin is always a candidate. Mirrors need no trust: every file is
    checked against the source's (or the lock's) digest, and the token goes to the origin alone.

    Returns:
        Base URLs, or ``None``.
    """


@hookspec(firstresult=True)
def fastload_format(filename: str, head: bytes) -> Format | None:
    """Recognise a weight file by name and first bytes.

    Args:
        filename: Relative path within the source.
        head: The first 64 KiB of the file, or all of it where it is shorter.

    Returns:
        A :class:`fastload.types.Format`, or ``None``. Stops at the first result.
    """


@hookspec(firstresult=True)
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: Any, options: Mapping[str, Any]
) -> object | None:
    """Build the framework's object while weights still arrive.

    Called in the caller's thread or in a worker thread, never in an event loop: it may block and may import heavy
    packages. Configuration files are complete under ``snapshot.path``; weights may still be arriving.

    Args:
        framework: The name that the user asked for, or ``None`` to judge by the files.
        snapshot: Where the files are.
        stream: A :class:`fastload.tensors.TensorStream` over the weights. ``with stream.served() as path`` gives a
            folder that unchanged ``from_pretrained`` code can load from at once.
        options: All further keyword arguments of ``fastload.load``, with ``device`` and ``dtype``.

    Returns:
        The object, or ``None`` to decline. Stops at the first result.
    """


@hookspec
def fastload_observer(source: str, settings: Settings) -> Observer | None:
    """Watch one load.

    Returns:
        A callable that gets every :class:`fastload.events.Event` of this load and returns within microseconds, or
        ``None``. One that raises is dropped with a warning.
    """
