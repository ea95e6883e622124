"""The supervisor: wakes the app and its model's bytes, watches both, puts them to sleep. Knows nothing of HTTP clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from ..asking import Asked, ask
from ..errors import FastloadError, from_record
from ..events import Event, log
from ..running import Running
from .channel import Channel
from .child import Child, obituary
from .command import Weights, environment, hook_command, program_base, program_command, ready_url
from .life import Life
from .options import Options
from .progress import ROWS, Progress
from .proxy import Proxy


class Changes:
    """Wakes everybody who waits for something to change. Use from one event loop.

    Attributes:
        count: How many there were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._next: asyncio.Event | None = None

    def tell(self) -> None:
        """Something has changed."""
        self.count += 1
        if self._next is not None:
            self._next.set()
            self._next = None

    async def wait(self) -> None:
        """Return at the next change."""
        if self._next is None:
            self._next = asyncio.Event()
        await self._next.wait()

    async def until(self, condition: Callable[[], object]) -> None:
        """Return when *condition* holds; it is asked at each change."""
        while not condition():
            await self.wait()


class Supervisor:
    """One app and its lives. Use from one event loop.

    Attributes:
        life: In which state it is.
        progress: Of the newest start.
        base: Where a ready app answers; ``""`` where none is ready.
        changes: Told of everything that a client could see.
        travelled_bytes: Over the network, in all starts before the newest one.

    Args:
        environ: What the app inherits.
    """

    def __init__(self, options: Options, weights: Weights, proxy: Proxy, environ: Mapping[str, str]) -> None:
        self.options = options
        self.changes = Changes()
        self.life = Life(idle_s=options.idle_s)
        self.life.changed = self.changes.tell
        self.progress = Progress(self.life.clock(), [source for source, _ in weights.sources])
        self.base = ""
        self.travelled_bytes = 0
        self._weights = weights
        self._environ = environ
        self._proxy = proxy
        self._told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._hurry = asyncio.Event()
        self._abandoned = False

    def ask(self) -> list[Asked]:
        """Resolve what the models' transfers need, before any network. Blocks.

        Raises:
            FastloadError: A setting is wrong, or the lock does not hold a model.
        """
        return [ask(source, revision=revision, **self._weights.common) for source, revision in self._weights.sources]

    def abandon(self) -> None:
        """Wait no longer for requests that are under way when all is to end."""
        self._abandoned = True
        self.changes.tell()

    def hurry(self) -> None:
        """Wait for nobody any more: what is to be stopped is killed."""
        self._hurry.set()
        self.abandon()

    async def run(self) -> None:
        """Start the app whenever somebody wants it, until the life is drained and the app is gone."""
        with Channel(self._take) as channel:
            while True:
                await self.changes.until(lambda: self.life.wanted or self.life.draining)
                with suppress(TimeoutError):  # a pause after a failure, which nothing but the end cuts short
                    async with asyncio.timeout(self.life.pause_s):
                        await self.changes.until(lambda: self.life.draining)
                if self.life.draining:
                    return
                await self._once(channel.address)

    # -- one life -----------------------------------------------------------------------------------------------------

    async def _once(self, address: str) -> None:
        self.travelled_bytes += self.progress.travelled_bytes
        self.progress = Progress(self.life.clock(), [source for source, _ in self._weights.sources])
        self._told = asyncio.Queue()
        self.life.starting()
        child: Child | None = None
        transfers: list[Running] = []
        error: FastloadError | None = None
        try:
            asked = await asyncio.to_thread(self.ask)
            transfers += [self._begin(one) for one in asked[:1]]  # before the app: it is what takes longest
            child, base = self._spawn(address)
            error = await self._live(child, base, asked, transfers)
        except FastloadError as e:
            error = e
        finally:
            self.base = ""
            self.progress.end(self.life.clock())
            await self._put_away(child, transfers)
        if error is None:
            self.life.asleep()
        else:
            log.warning("fastload serve: %s", error)
            self.life.failed(error)

    async def _live(
        self, child: Child, base: str | None, asked: list[Asked], transfers: list[Running]
    ) -> FastloadError | None:
        """Return why the app ended; ``None`` where it was to."""
        async with asyncio.TaskGroup() as group:
            fetching = group.create_task(self._fetch(asked, transfers))
            gone = group.create_task(child.gone.wait())
            unwanted = group.create_task(self._until_unwanted())
            coming = group.create_task(self._come_up(base))
            try:
                await asyncio.wait({gone, unwanted, coming}, return_when=asyncio.FIRST_COMPLETED)
                if coming.done() and not unwanted.done():
                    result = coming.result()
                    if isinstance(result, FastloadError):
                        return result
                    if not gone.done():
                        self.base = result
                        self.progress.end(self.life.clock())
                        self.life.ready()
                        await asyncio.wait({gone, unwanted}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done() and not unwanted.done():
                    return self._last_words() or obituary(self.options.name, child.status or 0)
                return None
            finally:
                for task in (fetching, gone, unwanted, coming):
                    task.cancel()

    async def _until_unwanted(self) -> None:
        """Return when a ready app has been idle for too long, or this is to end and nobody uses the app any more."""
        while True:
            idle_in_s = self.life.idle_in_s
            if idle_in_s == 0 or (self.life.draining and (self._abandoned or not self.life.in_flight)):
                self.base = ""  # from this very moment on no request is let through
                self.life.stopping()
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(idle_in_s):
                    await self.changes.wait()

    async def _come_up(self, base: str | None) -> str | FastloadError:
        """Return where the app answers, once it has given a first output; or why it has not."""
        options = self.options
        try:
            async with asyncio.timeout(options.start_s or None):
                if base is None:
                    base = await self._listening()
                else:
                    await self._proxy.until_ready(ready_url(options, base), strict=options.ready_url is not None)
                    self.progress.close("process", time.monotonic())
                if options.warmup is not None:
                    self._begin_phase("warm-up")
                    await self._proxy.first_output(base + options.predict_path, options.warmup)
                return base
        except FastloadError as e:
            return e
        except TimeoutError:
            return FastloadError(
                f"{options.name} was not ready within {options.start_s:.0f} s", hint="--start-s allows more"
            )

    async def _listening(self) -> str:
        while True:
            message = await self._told.get()
            if message["kind"] == "failed":
                raise from_record(message["error"])
            if message["kind"] == "listening":
                return f"http://127.0.0.1:{int(message['port'])}"

    def _last_words(self) -> FastloadError | None:
        """Return what the app's process told of its failure just before it ended."""
        while not self._told.empty():
            message = self._told.get_nowait()
            if message["kind"] == "failed":
                return from_record(message["error"])
        return None

    # -- what it consists of ------------------------------------------------------------------------------------------

    def _begin(self, asked: Asked) -> Running:
        loop = asyncio.get_running_loop()

        def observe(event: Event) -> None:
            loop.call_soon_threadsafe(self._event, asked.request.source, event)

        # Here, not in a thread: a process whose start was cancelled half-way would be nobody's.
        running = Running(asked, process=True)
        running.observe([*asked.observers, observe])
        return running

    async def _fetch(self, asked: list[Asked], transfers: list[Running]) -> None:
        """Fetch one model after another; the first one's transfer has begun."""
        for index, one in enumerate(asked):
            if index:
                transfers.append(self._begin(one))
            transfer = transfers[index].transfer
            await asyncio.to_thread(_over, transfers[index])
            if transfer.error is not None:  # the app may find its model elsewhere, or will say so itself
                log.warning("fastload serve: %s: %s", one.request.source, transfer.error)
                self.progress.fail_transfer(one.request.source, str(transfer.error))
                self.changes.tell()

    def _spawn(self, address: str) -> tuple[Child, str | None]:
        """Start the app; return it, and where it will answer if that is known."""
        environ = environment(self._environ, self._weights, address)
        if self.options.app is not None:
            return Child(hook_command(self.options, self._weights, address), environ), None
        base = program_base(self.options)
        port = urlsplit(base).port or 80
        self._begin_phase("process")
        return Child(program_command(self.options, port), {**environ, "PORT": str(port)}), base

    async def _put_away(self, child: Child | None, transfers: list[Running]) -> None:
        """End the app and the transfers; return when they are gone."""
        try:
            if child is not None:
                await child.stop(self.options.stop_s, self._hurry)
        finally:
            if child is not None:
                child.end()
            for transfer in transfers:
                await asyncio.shield(asyncio.to_thread(transfer.cancel))

    # -- what is told -------------------------------------------------------------------------------------------------

    def _take(self, message: dict[str, Any]) -> None:
        """Take in one message of the app's process."""
        kind = message["kind"]
        if kind == "event":
            self._event(str(message["source"]), Event.from_record(message["event"]))
        elif kind == "phase":
            if message["name"] in ROWS:
                self.progress.phase(message["name"], message["start_s"], message["stop_s"])
                self.changes.tell()
        elif kind in ("listening", "failed"):
            self._told.put_nowait(message)

    def _event(self, source: str, event: Event) -> None:
        self.progress.observe(source, event)
        self.changes.tell()

    def _begin_phase(self, name: str) -> None:
        self.progress.phase(name, time.monotonic(), None)
        self.changes.tell()


def _over(running: Running) -> None:
    """Block until *running* has ended, well or not."""
    try:
        running.wait()
    except FastloadError:
        pass  # whoever waits looks at the transfer's error
