"""What HTTP clients see: the supervisor's own endpoints, and the app behind them, held back until it is ready."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import aiohttp
from aiohttp import hdrs, web

from .exposition import Counts, exposition
from .proxy import Proxy, TooLarge
from .supervisor import Supervisor

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

#: Guessed: as often as a person sees, and how many of them may look on.
_LIVE_EVERY_S = 0.2
_LIVE_AT_LEAST_S = 15.0
_MAX_LIVE = 32
_PAGE = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def _source_hash(tag: str) -> str:
    """Return the Content-Security-Policy's word for the one <tag> of the page (CSP 3, 2.3.1)."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.S)
    digest = hashlib.sha256((found[1] if found else "").encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


_PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_source_hash('script')}; style-src"
    f" {_source_hash('style')}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Front:
    """Answers requests. Use from one event loop.

    Attributes:
        counts: What :mod:`.exposition` shows.
    """

    def __init__(self, supervisor: Supervisor, proxy: Proxy) -> None:
        self.counts = Counts()
        self._supervisor = supervisor
        self._options = supervisor.options
        self._proxy = proxy
        self._live = 0
        self._made_s, self._made = float("-inf"), (0, "")
        self._closing = asyncio.Event()
        prefix = supervisor.options.prefix
        self._routes: dict[str, dict[str, Handler]] = {
            f"{prefix}/": {"GET": self._page},
            f"{prefix}/wake": {"POST": self._wake},
            f"{prefix}/ready": {"GET": self._ready},
            f"{prefix}/healthz": {"GET": self._health},
            f"{prefix}/metrics": {"GET": self._metrics},
            f"{prefix}/state": {"GET": self._state},
            f"{prefix}/events": {"GET": self._events},
        }
        if prefix:
            self._routes[prefix] = self._routes[f"{prefix}/"]

    def close(self) -> None:
        """End the live views, which otherwise never end."""
        self._closing.set()
        self._supervisor.changes.tell()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        if not request.rel_url.raw_path.startswith("/"):  # `OPTIONS *`, CONNECT
            return _json({"error": "no path"}, 400)
        methods = self._routes.get(request.rel_url.raw_path)
        if methods is None:
            return await self._forward(request)
        handler = methods.get("GET" if request.method == hdrs.METH_HEAD else request.method)
        if handler is None:
            allowed = ", ".join(["GET", "HEAD"] if "GET" in methods else methods)
            return _json({"error": f"{request.method} means nothing here"}, 405, Allow=allowed)
        return await handler(request)

    # -- our own endpoints --------------------------------------------------------------------------------------------

    async def _page(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text=_PAGE, content_type="text/html", headers=_PAGE_HEADERS)

    async def _health(self, request: web.BaseRequest) -> web.Response:
        return _json({"ok": True, "state": self._supervisor.life.to_record()["state"]})

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        if self._is_ready:
            return _json({"ready": True})
        life = self._supervisor.life
        return _json({"ready": False, **self._brief()}, 503, **{"Retry-After": str(life.retry_after_s)})

    async def _wake(self, request: web.BaseRequest) -> web.Response:
        # Browsers say where a request comes from: a page somewhere on the net must not wake what listens on loopback.
        if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return _json({"error": "not from another site"}, 403)
        if self._supervisor.life.draining:
            return self._refuse("draining", "this server is about to end")
        self._wake_up("wake")
        return _json(self._brief(), 202)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        s = self._supervisor
        text = exposition(self.counts, s.life, s.progress, s.travelled_bytes)
        return web.Response(text=text, headers={hdrs.CONTENT_TYPE: "text/plain; version=0.0.4; charset=utf-8"})

    async def _state(self, request: web.BaseRequest) -> web.Response:
        return _json(self.record())

    async def _events(self, request: web.BaseRequest) -> web.StreamResponse:
        """Send the whole state whenever it has changed, as server-sent events (HTML standard, 9.2)."""
        if self._live >= _MAX_LIVE:
            return _json({"error": f"{_MAX_LIVE} others look on already"}, 503, **{"Retry-After": "30"})
        response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        if request.method == hdrs.METH_HEAD:
            return response
        self._live += 1
        try:
            await response.prepare(request)
            while not self._closing.is_set():
                shown, text = self._shown()
                await response.write(f"data: {text}\n\n".encode())
                await asyncio.sleep(_LIVE_EVERY_S)
                if self._supervisor.changes.count == shown:
                    await self._changed(_LIVE_AT_LEAST_S if self._is_still else 1.0)
        finally:
            self._live -= 1
        return response

    async def _changed(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._supervisor.changes.wait()
        except TimeoutError:
            pass

    # -- what they tell -----------------------------------------------------------------------------------------------

    @property
    def _is_ready(self) -> bool:
        return bool(self._supervisor.base) and not self._supervisor.life.draining

    @property
    def _is_still(self) -> bool:
        """Whether nothing changes by the passing of time alone."""
        life = self._supervisor.life
        return life.state in ("asleep", "ready", "failed") and not life.wanted and life.idle_in_s is None

    def _brief(self) -> dict[str, Any]:
        """Return what a caller of ``/wake`` wants to know."""
        life, progress = self._supervisor.life.to_record(), self._supervisor.progress
        models = progress.models.values()
        return {
            "state": "waking" if life["wanted"] else life["state"],
            "doing": progress.doing if life["state"] == "starting" else "",
            "for_s": round(life["for_s"], 3),
            "eta_s": life["eta_s"],
            "error": life["error"],
            "progress": {
                "landed_bytes": sum(m.tally.landed_bytes for m in models),
                "total_bytes": sum(m.tally.total_bytes for m in models),
                "files": sum(len(m.tally.sizes) for m in models),
                "verified_files": sum(len(m.tally.done) for m in models),
            },
        }

    def _shown(self) -> tuple[int, str]:
        """Return how many changes there had been, and :meth:`record` as JSON: the same for all who look at that moment."""
        now_s = self._supervisor.life.clock()
        if now_s - self._made_s >= _LIVE_EVERY_S / 2:
            self._made_s, self._made = now_s, (self._supervisor.changes.count, json.dumps(self.record()))
        return self._made

    def record(self) -> dict[str, Any]:
        """Return all that the page shows."""
        supervisor, options = self._supervisor, self._options
        return {
            "name": options.name,
            "prefix": options.prefix,
            "life": supervisor.life.to_record(),
            "start": supervisor.progress.to_record(supervisor.life.clock()) if supervisor.life.attempt else None,
            "requests": {
                "in_flight": supervisor.life.in_flight,
                "held": self.counts.held,
                "hold_requests": options.hold_requests,
                "answered": self.counts.answers.total(),
                "errors": sum(n for status, n in self.counts.answers.items() if status >= 500),
                "refused": self.counts.refused.total(),
            },
        }

    # -- the app's ----------------------------------------------------------------------------------------------------

    async def _forward(self, request: web.BaseRequest) -> web.StreamResponse:
        if (request.content_length or 0) > self._options.body_bytes:
            return self._refuse_large()
        if not self._is_ready:
            refusal = await self._hold()
            if refusal is not None:
                return refusal
        base = self._supervisor.base
        with self._supervisor.life.request():
            try:
                return await self._proxy.forward(request, base, self._answered)
            except TooLarge:
                return self._refuse_large()
            except (aiohttp.ClientError, TimeoutError) as e:
                self._answered(502)
                return _json({"error": f"the app did not answer: {e or type(e).__name__}"}, 502)

    def _answered(self, status: int) -> None:
        self.counts.answers[status] += 1

    async def _hold(self) -> web.Response | None:
        """Wait until the app is ready, and wake it if need be; return the refusal if it is not to be."""
        life, counts = self._supervisor.life, self.counts
        if life.draining:
            return self._refuse("draining", "this server is about to end")
        self._wake_up("request")
        if counts.held >= self._options.hold_requests:
            return self._refuse("full", f"{counts.held} requests wait for the start already")
        began_s, crashes = life.clock(), life.crashes
        counts.held += 1
        try:
            async with asyncio.timeout(self._options.hold_s):
                await self._supervisor.changes.until(lambda: self._is_ready or life.draining or life.crashes > crashes)
        except TimeoutError:
            return self._refuse("timeout", f"not ready after {self._options.hold_s:g} s")
        finally:
            counts.held -= 1
            counts.held_s += life.clock() - began_s
        if self._is_ready:
            return None
        if life.draining:
            return self._refuse("draining", "this server is about to end")
        return self._refuse("failed", life.error.message if life.error is not None else "the start failed")

    def _wake_up(self, cause: str) -> None:
        if self._supervisor.life.wake():
            self.counts.wakes[cause] += 1

    def _refuse(self, reason: str, message: str) -> web.Response:
        self.counts.refused[reason] += 1
        life = self._supervisor.life
        response = _json(
            {"error": message, "reason": reason, **{k: v for k, v in self._brief().items() if k != "error"}},
            503,
            **{"Retry-After": str(life.retry_after_s)},
        )
        if life.draining:
            response.force_close()
        return response

    def _refuse_large(self) -> web.Response:
        self.counts.refused["too_large"] += 1
        response = _json({"error": f"the body may have {self._options.body_bytes} bytes"}, 413)
        response.force_close()
        return response


def _json(record: dict[str, Any], status: int = 200, **headers: str) -> web.Response:
    return web.json_response(record, status=status, headers={"Cache-Control": "no-store", **headers})
