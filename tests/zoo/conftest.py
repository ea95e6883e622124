"""The zoo: saved once, read by many tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from building import Builder


pytest.register_assert_rewrite("building")


@pytest.fixture(scope="package")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a saved architecture, made once; not to be changed."""
    import torch
    import transformers
    from architectures import ZOO

    root = tmp_path_factory.mktemp("zoo")
    transformers.utils.logging.disable_progress_bar()

    def saved(name: str, dtype: Any = torch.bfloat16, shard: str = "10KB", **options: Any) -> Path:
        folder = root / f"{name}-{dtype}-{shard}-{options}".replace("/", "-")
        return folder if folder.exists() else ZOO[name].save(folder, dtype, shard, **options)

    return saved


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[Builder]:
    """Builds models; everything is given back after the test."""
    from building import Builder

    made = Builder(tmp_path)
    yield made
    made.close()
