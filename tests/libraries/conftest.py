"""Tests against libraries that build on transformers or beside it; ``tox -e libraries`` installs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from building import Builder

pytest.register_assert_rewrite("building")


def _name_operators_of_torchvision() -> list[Any]:
    """Make torchvision importable beside a torch for the CPU: its wheel on PyPI is built for CUDA.

    Its compiled operators do not load then, and the import fails because two of them are spoken of by name. Nothing here
    calls them.
    """
    try:
        metadata.version("torchvision")
        import torch
    except (metadata.PackageNotFoundError, ImportError):
        return []
    if torch.version.cuda is not None:
        return []
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


_KEPT = _name_operators_of_torchvision()


@pytest.fixture
def make_builder(tmp_path: Path) -> Iterator[Callable[[Any], Builder]]:
    """Make what builds models by the hook of a plugin; everything is given back after the test."""
    from building import Builder

    made: list[Builder] = []

    def make(plugin: Any) -> Builder:
        made.append(Builder(tmp_path, plugin.fastload_build_model))
        return made[-1]

    yield make
    for builder in made:
        builder.close()
