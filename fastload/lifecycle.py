"""The load hook: once per process, whoever asks first."""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, Literal

from .loader import load

State = Literal["pending", "running", "ready", "failed"]


class OnStart:
    """A load hook that runs exactly once per process, whatever number of threads calls it first.

    All callers wait for the one run and get its result, or its exception; after a failure the next call tries again.

    Attributes:
        state: ``pending``, ``running``, ``ready`` or ``failed``.
    """

    def __init__(self, function: Callable[..., Any], source: str, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._source = source
        self._options = options
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._result: Any = None
        self.state: State = "pending"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._pid != os.getpid():  # forked: the child has not run it, whatever the parent did
            self._pid, self._lock, self.state, self._result = os.getpid(), threading.Lock(), "pending", None
        with self._lock:
            if self.state != "ready":
                self._run(args, kwargs)
            return self._result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state = "running"
        try:
            self._result = self._function(*args, load(self._source, **self._options), **kwargs)
        except BaseException:
            self.state = "failed"
            raise
        self.state = "ready"


def on_start(source: str, **options: Any) -> Callable[[Callable[..., Any]], OnStart]:
    """Make a function the load hook of a server: it gets the loaded model, runs once per process, one transfer per node.

    Args:
        source: As for :func:`fastload.load`.
        options: All keyword arguments of :func:`fastload.load`.

    Raises:
        TypeError: The function is asynchronous: platforms that call hooks without awaiting would never run it.
    """

    def decorate(function: Callable[..., Any]) -> OnStart:
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"{function.__name__} is async: fastload.on_start takes a plain function; use aload inside your own"
            )
        return OnStart(function, source, options)

    return decorate
