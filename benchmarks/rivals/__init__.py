"""Who is measured: one file each, so that whoever knows a rival better can put its recipe right.

A file has ``TITLE``, what it ``REQUIRES`` (distributions) and which ``PROGRAMS``, what it ``VERIFIES`` of what it
delivers, and ``run(job)``, which a fresh process calls, or ``command(job)``, which is such a process. ``run`` imports
inside, for the imports are part of the time; ``prepare(job)`` does them where the clock starts with the call. ``run``
returns the model, or a dict of tensors; :class:`Delivered` where it has more to tell. ``REFERENCE`` marks what is no
way to load a model, but a limit to compare with, ``IMPORTS`` a reference that only imports. ``store(model, target)``
makes what has to lie on the store (:mod:`benchmarks.serving`) before it can run. ``launcher(job)`` returns the words of a
command that becomes the process which calls ``run``. ``CACHE = "hot"`` marks whoever gets a cache that holds the model,
and no network, also in cases where those of all others start empty.

A job says ``repo`` and ``model`` (names), ``auto_class``, ``family``, ``class`` (transformers' names), ``weights`` (names of
the weight files), ``sizes`` (theirs), ``folder`` (where the weight files lie when the cache is warm), ``store`` (URL),
``connections``, ``cores`` and ``clock``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Any


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a rival has, and what it alone can tell.

    Attributes:
        weights: A model or a dict of tensors; ``None``: files.
        told: Times of CLOCK_MONOTONIC: ``verified_s``. Seconds: ``stage_s`` and ``stage_cpu_s`` of a reference that is
            more than its stage.
    """

    weights: Any = None
    told: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rival:
    """What the file of a rival says.

    Attributes:
        name: Of the file.
        verifies: What is compared with what the hub says, in words.
        reference: A limit, not a way to load a model.
        imports: A reference that does what all others do before they load.
        hot: It always finds the model in its cache and in the page cache, and the network off.
        missing: What is not installed, in words; ``None`` where everything is.
    """

    name: str
    title: str
    verifies: str
    reference: bool
    imports: bool
    hot: bool
    missing: str | None
    module: Any

    def command(self, job: dict[str, Any]) -> list[str] | None:
        """Return a command of its own; ``None``: a fresh process calls ``run``."""
        make = getattr(self.module, "command", None)
        return None if make is None else list(make(job))

    def launcher(self, job: dict[str, Any]) -> list[str]:
        """Return the words that the command of its process follows."""
        make = getattr(self.module, "launcher", None)
        return [] if make is None else list(make(job))


def find(name: str) -> Rival:
    """Return the rival whose file is called *name*."""
    module = import_module(f"{__name__}.{name}")
    return Rival(
        name,
        module.TITLE,
        getattr(module, "VERIFIES", ""),
        getattr(module, "REFERENCE", False),
        getattr(module, "IMPORTS", False),
        getattr(module, "CACHE", "") == "hot",
        _missing(getattr(module, "REQUIRES", ()), getattr(module, "PROGRAMS", ())),
        module,
    )


def versions(rivals: Sequence[Rival]) -> dict[str, str]:
    """Return the installed versions of the distributions that *rivals* require."""
    wanted = {name for rival in rivals for name in getattr(rival.module, "REQUIRES", ()) if rival.missing is None}
    return {name: metadata.version(name) for name in sorted(wanted)}


def _missing(distributions: Sequence[str], programs: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"{name} is not installed"
    return next((f"{name} is not installed" for name in programs if shutil.which(name) is None), None)
