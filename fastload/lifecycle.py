"""The load hook: once per process, whoever asks first.

    @fastload.on_start("org/model", device="cuda")
    def setup(model): ...

The first call loads the model and calls the function with it; calls that come meanwhile, from any thread, task or event
loop, wait for that one run, and all get what it returned or raised. One download per machine comes from the cache, whose
lock lets one process fetch a file while the others read along.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import MethodType, TracebackType
from typing import Any, Literal, get_args

from .errors import FastloadError, SettingsError
from .loader import aload, load
from .unawaited import watched

State = Literal["pending", "running", "ready", "failed"]
Retry = Literal["call", "never"]


class _Run:
    """One run of a hook, held by everybody who waits for it.

    Attributes:
        over: Done when the run is; carries nothing.
        interrupted: Its caller was: it has neither succeeded nor failed, and whoever still waits does it.
        waiting: Callers that wait for it, the one who does it included.
        owner: The thread (its ident) or the task that does it.
    """

    def __init__(self) -> None:
        self.over: Future[None] = Future()
        self.over.set_running_or_notify_cancel()  # so that a waiter that is cancelled does not cancel it
        self.value: Any = None
        self.error: Exception | None = None
        self._traceback: TracebackType | None = None
        self.interrupted = False
        self.waiting = 1
        self.owner: object = None

    @property
    def failed(self) -> bool:
        return self.over.done() and self.error is not None

    def interrupt(self) -> None:
        """End it without an outcome, unless it has ended."""
        if not self.over.done():
            self.interrupted = True
            self.over.set_result(None)

    def ended(self, task: asyncio.Task[None]) -> None:
        """*task*, which did it, has ended; perhaps it was cancelled before its first step."""
        self.interrupt()

    def outcome(self) -> Any:
        if self.error is None:
            return self.value
        raise self.error.with_traceback(self._traceback)

    def succeed(self, value: Any) -> None:
        self.value = value
        self.over.set_result(None)

    def fail(self, error: Exception) -> None:
        # Kept, because each raise adds to the traceback of the one exception that all callers get.
        self.error, self._traceback = error, error.__traceback__
        self.over.set_result(None)


_hooks: weakref.WeakSet[OnStart] = weakref.WeakSet()


class OnStart:
    """A load hook that runs once per process: what :func:`on_start` makes of a plain function. Thread-safe.

    Called as the function would be, but without the model, which the hook puts behind the other positional arguments.
    Arguments of any call but the one that runs are ignored. On a class it is a method, and runs once per process all the
    same, for the first instance that calls it: return what other instances need instead of keeping it on ``self``.

    After a fork the child runs it again when it is called there.
    """

    def __init__(self, function: Callable[..., Any], load: Callable[[], Any], *, retry: Retry = "call") -> None:
        functools.update_wrapper(self, function)
        self.__name__: str = getattr(_plain(function), "__name__", "load hook")
        self.__signature__ = _without_model(function)
        self._function = function
        self._load = load
        self._retry = retry
        self._lock = threading.Lock()
        self._run: _Run | None = None
        _hooks.add(self)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """``pending`` (nobody has called it), ``running``, ``ready`` or ``failed``."""
        run = self._run
        if run is None or run.interrupted:
            return "pending"
        if not run.over.done():
            return "running"
        return "ready" if run.error is None else "failed"

    @property
    def result(self) -> Any:
        """What the function returned; ``None`` unless the state is ``ready``."""
        return self._run.value if self._run is not None else None

    @property
    def error(self) -> Exception | None:
        """Why the last run failed; ``None`` unless the state is ``failed``."""
        return self._run.error if self._run is not None else None

    def reset(self) -> None:
        """Forget that it ran, for tests: the next call runs it again.

        Raises:
            FastloadError: It is running.
        """
        with self._lock:
            if self.state == "running":
                raise FastloadError(f"{self._name} is running", hint="wait for it first")
            self._run = None

    def _forget(self) -> None:
        self._lock, self._run = threading.Lock(), None

    @property
    def _name(self) -> str:
        return f"{getattr(self, '__qualname__', self.__name__)}()"

    # -- running -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hook, or wait until it has run, and return what the function returned."""
        while True:
            run, mine = self._join(threading.get_ident())
            if mine:
                run.owner = threading.get_ident()
                self._do(run, args, kwargs)
            else:
                run.over.result()
            if not run.interrupted:
                return run.outcome()

    def _join(self, caller: object) -> tuple[_Run, bool]:
        """Return the run to wait for, and whether it is the caller's to do."""
        with self._lock:
            run = self._run
            if run is None or run.interrupted or (run.failed and self._retry == "call"):
                self._run = run = _Run()
                return run, True
            if run.owner == caller and not run.over.done():
                raise FastloadError(f"{self._name} calls itself while it runs: it would wait for ever")
            run.waiting += 1
            return run, False

    def _do(self, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            run.succeed(self._function(*args, self._load(), **kwargs))
        except Exception as e:
            run.fail(e)
        finally:
            run.interrupt()  # Ctrl-C, or another way in which the caller was stopped


class AsyncOnStart(OnStart):
    """As :class:`OnStart`, of an ``async def``: to be awaited, from any number of tasks and event loops.

    It runs as a task of the loop that asks first, for as long as anybody waits for it. If that loop ends early, a waiter
    in another one starts it again.
    """

    def __init__(self, function: Callable[..., Any], load: Callable[[], Any], *, retry: Retry = "call") -> None:
        super().__init__(function, load, retry=retry)
        # Platforms ask inspect.iscoroutinefunction, which takes what looks like a function for one.
        self.__code__ = _plain(function).__code__
        self.__defaults__, self.__kwdefaults__ = _plain(function).__defaults__, _plain(function).__kwdefaults__

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Return a coroutine that runs the hook, or waits until it has run; it warns when it is not awaited."""
        return watched(self._name, self._called(args, kwargs))

    async def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        while True:
            run, mine = self._join(asyncio.current_task())
            if mine:
                run.owner = task = asyncio.create_task(self._ado(run, args, kwargs))
                task.add_done_callback(run.ended)
            await self._wait(run)
            if not run.interrupted:
                return run.outcome()
            if mine:  # it was cancelled from within: as if it had been awaited here
                raise asyncio.CancelledError

    async def _ado(self, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            run.succeed(await self._function(*args, await self._load(), **kwargs))
        except Exception as e:
            run.fail(e)
        finally:
            run.interrupt()

    async def _wait(self, run: _Run) -> None:
        try:
            await asyncio.wrap_future(run.over)
        finally:
            with self._lock:
                run.waiting -= 1
                abandoned = not run.waiting and not run.over.done()
            if abandoned and isinstance(run.owner, asyncio.Task):
                await _cancel(run.owner)


async def _cancel(task: asyncio.Task[Any]) -> None:
    """Cancel *task*; if it is of this loop, wait until it has put its things away."""
    loop = task.get_loop()
    if loop is asyncio.get_running_loop():
        task.cancel()
        await asyncio.wait({task})
    elif not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)


def _plain(function: Callable[..., Any]) -> Any:
    """Return the function under partials and bound methods."""
    while isinstance(function, functools.partial | MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function


def _without_model(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature that callers see: the last positional parameter is the model, which the hook passes."""
    signature = inspect.signature(function)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [name for name, p in signature.parameters.items() if p.kind in positional][-1:]
    return signature.replace(parameters=[p for name, p in signature.parameters.items() if name not in taken])


def on_start(source: str, *, retry: Retry = "call", **options: Any) -> Callable[[Callable[..., Any]], OnStart]:
    """Make a function or method the load hook of a server: it gets the loaded model, once per process.

    An ``async def`` stays one (and uses :func:`fastload.aload`); a platform that does not await it gets a warning that
    names it.

    Args:
        source: As for :func:`fastload.load`.
        retry: After a failure: ``"call"``, the next call tries again; ``"never"``, it raises the same exception again.
            Callers that waited for the failed run get its exception either way.
        options: All keyword arguments of :func:`fastload.load`.

    Raises:
        SettingsError: *retry* is neither.
    """
    if retry not in get_args(Retry):
        raise SettingsError(f"retry={retry!r} of fastload.on_start", hint='"call" or "never"')

    def decorate(function: Callable[..., Any]) -> OnStart:
        if inspect.iscoroutinefunction(function):
            return AsyncOnStart(function, functools.partial(aload, source, **options), retry=retry)
        return OnStart(function, functools.partial(load, source, **options), retry=retry)

    return decorate


def _after_fork() -> None:
    for hook in tuple(_hooks):
        hook._forget()


os.register_at_fork(after_in_child=_after_fork)
