"""A pytest plugin (``-p accelerated``): the whole run is one ``with fastload.accelerate():``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastload


@pytest.fixture(scope="session", autouse=True)
def accelerated() -> Iterator[None]:
    """On before the first test, off after the last."""
    with fastload.accelerate():
        yield
