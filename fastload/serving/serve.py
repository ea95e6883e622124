"""``fastload serve``, from the open port to the last process that is gone."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping

from aiohttp import web
from aiohttp.http import HttpProcessingError

from ..errors import FastloadError
from ..events import log
from .command import Weights
from .front import Front
from .options import Options
from .proxy import LINE_BYTES, Proxy
from .supervisor import Supervisor

#: Reasoned: a body that is not read yet waits in the kernel and in this buffer, so a held request costs no more.
_BUFFER_BYTES = 1 << 16


def serve(options: Options, weights: Weights, announce: Callable[[str], None], environ: Mapping[str, str]) -> None:
    """Supervise the app until SIGTERM or Ctrl-C; a second one ends it without waiting for anybody. Blocks.

    Args:
        announce: Told the base URL when the port is open.
        environ: What the app inherits.

    Raises:
        FastloadError: The port cannot be opened, or a setting is wrong.
    """
    asyncio.run(_serve(options, weights, announce, environ))


async def _serve(
    options: Options, weights: Weights, announce: Callable[[str], None], environ: Mapping[str, str]
) -> None:
    async with Proxy(options.body_bytes) as proxy:
        supervisor = Supervisor(options, weights, proxy, environ)
        await asyncio.to_thread(supervisor.ask)  # what is wrong with the settings, before anybody is let in
        front = Front(supervisor, proxy)
        runner = web.ServerRunner(
            web.Server(
                front.answer,
                handler_cancellation=True,
                access_log=None,
                logger=_logger(),
                auto_decompress=False,
                read_bufsize=_BUFFER_BYTES,
                max_line_size=LINE_BYTES,
                max_field_size=LINE_BYTES,
            ),
            handle_signals=False,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        try:
            announce(await _open(runner, options))
            if not options.asleep:
                supervisor.life.wake()
            await _until_gone(supervisor, options)
            front.close()
        finally:
            await runner.cleanup()


def _logger() -> logging.Logger:
    """Return the server's logger: a client that does not speak HTTP gets a 400, and is no error of ours."""
    logger = logging.getLogger(f"{log.name}.server")
    logger.filters = [lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))]
    return logger


async def _open(runner: web.ServerRunner, options: Options) -> str:
    try:
        await web.TCPSite(runner, options.host, options.port).start()
    except OSError as e:
        raise FastloadError(
            f"{options.host}:{options.port} cannot be listened on: {e.strerror}", hint="--port 0 takes any free one"
        ) from e
    host, port = runner.addresses[0][:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{options.prefix}/"


async def _until_gone(supervisor: Supervisor, options: Options) -> None:
    """Run the supervisor; at a signal let requests under way come to their end, then end it."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()

    def end() -> None:
        if told.is_set():
            supervisor.hurry()
        told.set()
        supervisor.life.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    try:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(supervisor.run())
            waiting = group.create_task(told.wait())
            await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if told.is_set():
                await asyncio.wait({running}, timeout=options.drain_s)
                supervisor.abandon()
            await asyncio.wait({running})
            waiting.cancel()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
