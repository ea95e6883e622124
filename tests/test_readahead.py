"""Cached weights that are not in memory are read in large pieces before a framework touches them, and only those."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pagecache import evict, read_bytes
from transfers import QUICK, noise

from fastload import readahead
from fastload.engine import Engine
from fastload.plugins import manager
from fastload.settings import Settings
from fastload.testing import Hub
from fastload.types import Request

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and the page cache")
SIZE = 20 << 20


def weights_in(cache: Path) -> Path:
    [blob] = [p for p in cache.glob("models--*/blobs/*") if p.stat().st_size == SIZE]
    return blob


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(noise(SIZE))
    evict(path)
    return path


async def test_a_file_that_is_not_in_memory_is_read_at_once(cold: Path):
    before = await asyncio.to_thread(read_bytes)
    await readahead.bring([cold])
    assert await asyncio.to_thread(read_bytes) - before > 0.9 * SIZE


async def test_a_file_that_is_in_memory_is_left_alone(cold: Path):
    await asyncio.to_thread(cold.read_bytes)
    assert await asyncio.to_thread(readahead.is_resident, cold)
    before = await asyncio.to_thread(read_bytes)
    await readahead.bring([cold])
    assert await asyncio.to_thread(read_bytes) == before


async def test_what_does_not_fit_into_memory_is_not_read_ahead(cold: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readahead, "_available_bytes", lambda: SIZE)
    before = await asyncio.to_thread(read_bytes)
    await readahead.bring([cold])
    assert await asyncio.to_thread(read_bytes) == before


async def test_a_file_that_vanished_is_left_to_whoever_needs_it(tmp_path: Path):
    await readahead.bring([tmp_path / "gone"])


@pytest.mark.parametrize(
    "wanted, read_ahead, reads",
    [
        (Request("org/m"), True, True),
        (Request("org/m"), False, False),
        (Request("org/m", everything=True), True, False),  # the aim is the cache: nobody will read it now
    ],
)
async def test_a_load_brings_its_cached_weights(
    wanted: Request, read_ahead: bool, reads: bool, make_hub: Callable[..., Hub], tmp_path: Path
):
    hub = make_hub({"org/m": {"config.json": b"{}", "model.safetensors": noise(SIZE)}})
    values = {**QUICK, "cache_dir": tmp_path, "endpoint": hub.endpoint, "read_ahead": read_ahead}
    settings = Settings.resolve({**values, "range_bytes": 1 << 20, "ring_bytes": 8 << 20})
    plugins = await asyncio.to_thread(manager, settings)
    await Engine(settings, lambda message: None, plugins).run(wanted)
    await asyncio.to_thread(evict, weights_in(tmp_path))
    engine = Engine(settings, lambda message: None, plugins)
    await engine.run(wanted)
    before = await asyncio.to_thread(read_bytes)
    await engine.read_ahead()
    assert (await asyncio.to_thread(read_bytes) - before > 0.9 * SIZE) == reads
