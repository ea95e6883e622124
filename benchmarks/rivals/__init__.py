"""Who is measured: one file each, so that whoever knows a rival better can put its recipe right.

A file has ``TITLE``, what it ``REQUIRES`` (distributions and programs), whether it ``VERIFIES`` what it delivers, and
``run(job)``, which a fresh process calls, or ``command(job)``, which is such a process. ``run`` imports inside, for the
imports are part of the time, and returns the model where there is one. ``REFERENCE`` marks what is no way to load a
model, but a limit to compare with.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any


@dataclass(frozen=True, slots=True)
class Rival:
    """What the file of a rival says.

    Attributes:
        name: Of the file.
        verifies: What is compared with what the hub says, in words.
        reference: A limit, not a way to load a model.
        missing: What is not installed, in words; ``None`` where everything is.
    """

    name: str
    title: str
    verifies: str
    reference: bool
    missing: str | None
    module: Any

    def command(self, job: dict[str, Any]) -> list[str] | None:
        """Return a command of its own; ``None``: a fresh process calls ``run``."""
        make = getattr(self.module, "command", None)
        return None if make is None else list(make(job))


def find(name: str) -> Rival:
    """Return the rival whose file is called *name*."""
    module = import_module(f"{__name__}.{name}")
    return Rival(
        name,
        module.TITLE,
        getattr(module, "VERIFIES", ""),
        getattr(module, "REFERENCE", False),
        _missing(getattr(module, "REQUIRES", ()), getattr(module, "PROGRAMS", ())),
        module,
    )


def _missing(distributions: Sequence[str], programs: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"{name} is not installed"
    return next((f"{name} is not installed" for name in programs if shutil.which(name) is None), None)
