"""``python -m fastload.serving.host ORDERS``: the process that runs the user's hook and answers requests with what it made.

The hook runs in the main thread, without a running event loop if it is a plain function; if it is ``async``, in the loop
that later serves. Only then is a port opened, and told: what can be reached here has been loaded.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from ..builtin.supervised import tell
from ..errors import FastloadError, UnsupportedSourceError, to_record
from ..importing import ImportTimes
from .hook import Hook, Predictor, encode, find


class Host:
    """One hook and the server in front of it.

    Args:
        orders: ``app``, ``address`` of the supervisor, ``model`` (source or ``None``), ``load`` (keyword arguments of
            :func:`fastload.load`), ``path``, ``body_bytes``.
    """

    def __init__(self, orders: dict[str, Any]) -> None:
        self._orders = orders

    def _tell(self, kind: str, **data: Any) -> None:
        tell(self._orders["address"], {"kind": kind, **data})

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started_s = time.monotonic()
        self._tell("phase", name=name, start_s=started_s, stop_s=None)
        yield
        self._tell("phase", name=name, start_s=started_s, stop_s=time.monotonic())

    def run(self) -> int:
        """Do it all; return the exit status."""
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            imports = ImportTimes()
            try:
                with imports:
                    with self._phase("imports"):
                        target = find(self._orders["app"])
                    with self._phase("hook"):
                        call = Hook(self._orders["app"], target, self._load()).prepare(
                            lambda a: runner.run(_awaited(a))
                        )
            except Exception as e:  # the hook is a stranger's code
                traceback.print_exc()
                sys.stderr.flush()
                self._tell("failed", error=_record(e, self._orders["app"]))
                return 1
            for start_s, stop_s in imports.busy:
                if stop_s - start_s >= 0.01:
                    self._tell("phase", name="imports", start_s=start_s, stop_s=stop_s)
            runner.run(self._serve(Predictor(call)))
        return 0

    def _load(self) -> Any:
        source = self._orders["model"]
        if source is None:
            return None

        def load() -> Any:
            import fastload

            return fastload.load(source, **self._orders["load"])

        return load

    async def _serve(self, predictor: Predictor) -> None:
        async def predict(request: web.Request) -> web.Response:
            return await _answer(predictor, request)

        app = web.Application(client_max_size=self._orders["body_bytes"])
        app.router.add_post(self._orders["path"], predict)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.0)
        await runner.setup()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._tell("listening", port=runner.addresses[0][1])
            await ended.wait()
        finally:
            await runner.cleanup()
            predictor.close()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


async def _answer(predictor: Predictor, request: web.Request) -> web.Response:
    body: Any = await request.read()
    if request.content_type == "application/json" or request.content_type.endswith("+json"):
        try:
            body = json.loads(body)
        except ValueError as e:
            return _refusal(400, "ValueError", f"the body is not JSON: {e}")
    try:
        data, kind = encode(await predictor(body))
    except UnsupportedSourceError as e:
        return _refusal(500, "UnsupportedSourceError", str(e))
    except Exception as e:  # the predictor is a stranger's code
        traceback.print_exc()
        return _refusal(500, type(e).__name__, str(e))
    return web.Response(body=data, content_type=kind)


def _refusal(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"error": {"type": kind, "message": message}}, status=status)


def _record(error: Exception, name: str) -> dict[str, Any]:
    if isinstance(error, FastloadError):
        return to_record(error)
    return to_record(
        FastloadError(f"{name} failed: {type(error).__name__}: {error}", hint="the traceback is in the log")
    )


def main() -> None:
    """Run the hook that the orders in the command line name."""
    sys.argv, orders = sys.argv[:1], json.loads(sys.argv[1])
    began_s = time.monotonic()
    try:
        tell(orders["address"], {"kind": "phase", "name": "process", "start_s": orders["spawned_s"], "stop_s": began_s})
        status = Host(orders).run()
    except ConnectionRefusedError:  # the supervisor is gone, and the kernel is about to tell us
        status = 143
    sys.exit(status)


if __name__ == "__main__":
    main()
