"""A real headless Chromium, driven over the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp


def executable() -> str | None:
    """Return the path of a Chromium (or Chrome), or ``None``."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("FASTLOAD_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; what the page complains about meanwhile is kept."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show *url* in a window of that size."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.look(width=width, height=height, dark=dark)
        await self.call("Page.navigate", url=url)

    async def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Change the size of the window, and whether its user likes it dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        await self.call("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])

    async def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str, timeout_s: float = 60.0) -> None:
        """Wait until the JavaScript *condition* holds; it is asked at each change of the document."""
        watch = (
            "new Promise(done => { const look = () => { try { if (%s) done(true); } catch (e) {} };"
            "new MutationObserver(look).observe(document, {subtree: true, childList: true, attributes: true,"
            " characterData: true}); setInterval(look, 100); look(); })"
        )
        async with asyncio.timeout(timeout_s):
            await self.ask(watch % condition)

    async def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {**size, "scale": 1}
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Start Chromium with a profile of its own and give its page; it ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="fastload-chromium-"))
    words = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
             "--no-default-browser-check", "--hide-scrollbars", "--no-proxy-server"]  # fmt: skip
    if os.getuid() == 0 or os.environ.get("CI"):
        words.append("--no-sandbox")  # Chromium has none for root, nor in most containers; all pages are our own
    process = await asyncio.create_subprocess_exec(
        str(executable()), *words, "about:blank", stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stderr is not None
        said = []
        while not (line := (await process.stderr.readline()).decode()).startswith("DevTools listening on "):
            said.append(line)
            assert line, f"Chromium did not start: {''.join(said)}"
        host = line.split()[-1].split("/")[2]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{host}/json/list") as answer:
                [tab] = [t for t in await answer.json() if t["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
