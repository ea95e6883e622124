"""Says so when a coroutine of ours is dropped without having been awaited.

Several platforms call a load hook that is ``async def`` as if it were a plain function, throw the coroutine away and report
ready. Python warns of that too, but cannot say what was not done, nor whose habit it is.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: Module that only this platform's own process imports → whose hook is called and never awaited (run with each SDK).
_CALLERS = {
    "litserve": "LitServe calls setup()",
    "_truss_shared": "Truss calls load()",
    "pipeline.objects.graph": "Mystic calls startup functions",
    "beta9": "Beam's task queue calls on_start",
}


def platform_habit() -> str | None:
    """Return who calls hooks without awaiting them in this process, as the start of a sentence, or ``None``."""
    return next((habit for module, habit in _CALLERS.items() if module in sys.modules), None)


class _Watch:
    """Lives in the frame of the coroutine that it watches, and dies with it."""

    def __init__(self, what: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._what = what
        self._coroutine = coroutine
        self._watched: weakref.ref[object] | None = None
        self._begun = False

    def watch(self, coroutine: Any) -> None:
        for name in ("__name__", "__qualname__"):
            setattr(coroutine, name, getattr(self._coroutine, name))
        self._watched = weakref.ref(coroutine)

    def begin(self) -> Coroutine[Any, Any, Any]:
        self._begun = True
        return self._coroutine

    def __del__(self) -> None:
        if self._begun:
            return
        self._coroutine.close()
        # Closed, or cancelled before its first step: then the coroutine is still there, and somebody cared for it.
        if self._watched is not None and self._watched() is None and not sys.is_finalizing():
            habit = platform_habit()
            warnings.warn(
                f"{self._what} was called and what it returned was dropped without `await`: nothing was loaded."
                + (f" {habit} without awaiting it" if habit else " Platforms that call hooks without awaiting them")
                + (": " if habit else " need ")
                + ("make the hook a plain function (`def`) with fastload.load or @fastload.on_start"),
                RuntimeWarning,
                stacklevel=2,
            )


async def _begun(watch: _Watch) -> Any:
    return await watch.begin()


def watched(what: str, coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return a coroutine that does what *coroutine* does, and warns, as *what*, if it is dropped before it began."""
    watch = _Watch(what, coroutine)
    outer = _begun(watch)
    watch.watch(outer)
    return outer


def warns_unawaited(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate a public ``async def``: a call whose result is dropped warns, and names the platform that does so."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        return watched(f"fastload.{function.__name__}()", function(*args, **kwargs))

    mark = getattr(inspect, "markcoroutinefunction", None)  # Python 3.12
    if mark is not None:
        mark(call)
    return call
