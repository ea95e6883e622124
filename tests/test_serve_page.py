"""The status page of ``fastload serve`` in a real headless Chromium: live, complete in itself, and deaf to what is no text."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from chromium import Page, browser, executable
from supervised import Gate, supervised

from fastload.testing import Fault, Hub, write_tiny_llama

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(
        executable() is None and not os.environ.get("FASTLOAD_REQUIRE_CHROMIUM"),
        reason="no Chromium (Debian: apt-get install chromium)",
    ),
]

APP = """
from pathlib import Path
HERE = Path(__file__).parent
def setup():
    (HERE / "gate").read_text()
    return lambda request: request
def fails():
    raise ValueError("<img src=x onerror=alert(1)> & <b>bold</b>")
"""
#: Gives no output, and ends when it is let.
STUBBORN = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (open("gate").read(), os._exit(0)))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
#: What no page may show: a bar to scroll sideways, or text that is cut off at the side.
FITS = "document.documentElement.scrollWidth <= innerWidth"
SIZES = [(1280, 900), (390, 844)]


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    async with browser() as opened:
        yield opened
        assert opened.complaints == []  # no exception in a script, nothing that the policy refused


@pytest.fixture
def hub(tmp_path: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = write_tiny_llama(tmp_path / "model", shards=3, hidden=256, vocabulary=4096)
    started = make_hub({"org/model": folder}, faults=[Fault("hold", path="*00002*", offset=300_000)])
    monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
    monkeypatch.setenv("FASTLOAD_RANGE_BYTES", "65536")
    return started


async def keep(page: Page, name: str) -> None:
    """Look at the page in every size and light; keep pictures where FASTLOAD_SCREENSHOTS names a folder for them."""
    for width, height in SIZES:
        for dark in (False, True):
            await page.look(width=width, height=height, dark=dark)
            assert await page.ask(FITS), f"{name} is wider than {width} pixels"
            picture = await page.screenshot()
            assert picture.startswith(b"\x89PNG")
            save(picture, f"{name}-{width}-{'dark' if dark else 'light'}.png")


def save(picture: bytes, name: str) -> None:
    folder = os.environ.get("FASTLOAD_SCREENSHOTS")
    if folder:
        Path(folder, name).write_bytes(picture)


def text(selector: str) -> str:
    return f"document.querySelector({selector!r}).innerText"


async def test_the_page_follows_a_start_from_wake_to_ready(page: Page, hub: Hub, tmp_path: Path):
    (tmp_path / "app.py").write_text(APP)
    gate = Gate(tmp_path / "gate")
    with supervised("--asleep", "--model", "org/model", "app:setup", folder=tmp_path) as server:
        await page.open(server.url)
        await page.until(f"{text('#state')} === 'asleep'")
        assert await page.ask(text("#name")) == "app:setup"
        await keep(page, "asleep")

        await page.ask("document.querySelector('#wake').click()")
        await page.until("document.querySelectorAll('.file[data-state=verified]').length >= 3")
        await page.until("document.querySelector('.file[data-state=arriving]')")
        assert await page.ask(text("#state")) == "downloading"
        assert await page.ask("document.querySelector('#wake').hidden")
        files = await page.ask("[...document.querySelectorAll('.file > b')].map(e => e.innerText)")
        assert "model-00002-of-00003.safetensors" in files
        share = await page.ask("document.querySelector('#bar').getAttribute('aria-valuenow')")
        assert 0 < int(share) < 100
        rows = await page.ask("[...document.querySelectorAll('#rows .row span:first-child')].map(e => e.innerText)")
        assert {"resolve", "download"} <= set(rows)
        await keep(page, "start")

        hub.script()
        hub.release()
        gate.open()
        await page.until(f"{text('#state')} === 'ready'")
        await page.until("document.querySelector('#bar').getAttribute('aria-valuenow') === '100'")
        assert "first output" in await page.ask(text("#lead"))
        await keep(page, "ready")

        # The page needs no reload to see that the supervisor is gone.
        assert server.end()[0] == 0
        await page.until(f"{text('#state')} === 'no connection'")
        page.complaints.clear()  # the browser notes that its requests fail


async def test_what_the_app_says_is_shown_as_text(page: Page, tmp_path: Path):
    (tmp_path / "app.py").write_text(APP)
    with supervised("--model", "<i>org</i>/<u>x</u>", "app:fails", folder=tmp_path) as server:
        await page.open(server.url)
        await page.until("!document.querySelector('#alert').hidden")
        assert "<img src=x onerror=alert(1)> & <b>bold</b>" in await page.ask(text("#alert"))
        assert await page.ask("document.querySelectorAll('img, #alert b, #models i:not(.bar i), u').length") == 0
        await page.until("!document.querySelector('#models').hidden")
        assert await page.ask(text("#models h2")) == "<i>org</i>/<u>x</u>"
        await keep(page, "failed")


async def test_a_start_that_has_failed_is_shown_while_its_app_is_being_stopped(page: Page, tmp_path: Path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    gate = Gate(tmp_path / "gate")
    words = ["--asleep", "--warmup", "1", "--stop-s", "60", "--", sys.executable, "stubborn.py", "{port}"]
    with supervised(*words, folder=tmp_path) as server:
        await page.open(server.url)
        await page.until("!document.querySelector('#wake').hidden")
        await page.ask("document.querySelector('#wake').click()")
        await page.until(f"{text('#state')} === 'stopping'")
        assert "being stopped" in await page.ask(text("#lead"))
        await asyncio.to_thread(gate.open)
        await page.until(f"{text('#state')} === 'failed'")


async def test_the_page_works_behind_a_prefix(page: Page, tmp_path: Path):
    (tmp_path / "app.py").write_text("def setup(): return lambda request: request\n")
    with supervised("--prefix", "/status", "app:setup", folder=tmp_path) as server:
        await page.open(server.url)
        await page.until(f"{text('#state')} === 'ready'")
        links = await page.ask("[...document.querySelectorAll('footer a')].map(e => e.getAttribute('href'))")
        assert links == ["/status/ready", "/status/healthz", "/status/metrics", "/status/state"]
        server.predict(1)
        await page.until("document.querySelectorAll('.tile b')[2].innerText === '1'")
