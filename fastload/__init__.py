"""Streams model weights: verified while they download, into the Hugging Face cache and the framework at once.

    import fastload

    model = fastload.load("org/model", device="cuda")

Importing this package imports nothing else: every name below is fetched from its module when it is first used, so that
the first line of a program can start a download before ``import torch``.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing's own costs its import, half of this module's time
if TYPE_CHECKING:
    from typing import Any

    from . import errors as errors
    from . import testing as testing
    from .dropin import accelerate as accelerate
    from .errors import FastloadError as FastloadError
    from .events import Event as Event
    from .hookspecs import hookimpl as hookimpl
    from .lifecycle import on_start as on_start
    from .loader import aload as aload
    from .loader import aload_tensors as aload_tensors
    from .loader import aprefetch as aprefetch
    from .loader import astream as astream
    from .loader import load as load
    from .loader import load_tensors as load_tensors
    from .loader import prefetch as prefetch
    from .loader import start as start
    from .loader import stream as stream
    from .profile import Profile as Profile
    from .profile import profile as profile
    from .running import quiesce as quiesce
    from .settings import Settings as Settings
    from .types import Snapshot as Snapshot

    __version__: str

#: Public name → module that holds it; a module stands for itself.
_HOME = {
    "Event": "events",
    "FastloadError": "errors",
    "Profile": "profile",
    "Settings": "settings",
    "Snapshot": "types",
    "accelerate": "dropin",
    "aload": "loader",
    "aload_tensors": "loader",
    "aprefetch": "loader",
    "astream": "loader",
    "errors": "errors",
    "hookimpl": "hookspecs",
    "load": "loader",
    "load_tensors": "loader",
    "on_start": "lifecycle",
    "prefetch": "loader",
    # The import system binds a submodule's name in its package whenever anybody imports it, so `fastload.profile` is
    # the module, before and after; the module is callable and that call is the function.
    "profile": "profile",
    "quiesce": "running",
    "start": "loader",
    "stream": "loader",
    "testing": "testing",
}
_MODULES = {"errors", "profile", "testing"}

__all__ = [
    "Event",
    "FastloadError",
    "Profile",
    "Settings",
    "Snapshot",
    "__version__",
    "accelerate",
    "aload",
    "aload_tensors",
    "aprefetch",
    "astream",
    "errors",
    "hookimpl",
    "load",
    "load_tensors",
    "on_start",
    "prefetch",
    "profile",
    "quiesce",
    "start",
    "stream",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        module = import_module(f"{__name__}.{_HOME[name]}")
        value = module if name in _MODULES else getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastload-weights")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"
