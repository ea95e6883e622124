"""The user's hook: found by its name, called as its signature asks, and what it made called as a predictor. No HTTP."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import SettingsError, UnsupportedSourceError

#: What an object is asked for, in this order, before it can predict.
_PREPARES = ("setup", "load")


def find(name: str) -> Any:
    """Import and return what *name*, ``module:attribute``, stands for.

    Raises:
        SettingsError: There is no such thing. What the module itself raises is passed on.
    """
    module_name, _, path = name.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):  # one that the module imports
            raise
        raise SettingsError(
            f"{name}: there is no module {e.name!r}", hint="it is looked for in the current folder and on PYTHONPATH"
        ) from None
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [n for n, v in vars(sys.modules[module_name]).items() if callable(v) and not n.startswith("_")]
            raise SettingsError(
                f"{name}: {module_name} has no {path}", hint=f"it has {', '.join(names[:10])}" if names else None
            ) from None
    return found


def _wants(function: Callable[..., Any]) -> int:
    """Return how many arguments *function* cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


class Hook:
    """A hook of one of these forms; *load* gives the model for those that take one.

    ======================================  ==========================================================================
    ``def setup()``                         is called; what it returns is the predictor
    ``def setup(model)``                    is called with the loaded model; what it returns is the predictor
    ``def predict(model, request)``         is the predictor, its first argument is the loaded model
    an object, or a class without arguments its ``setup()`` or ``load()`` is called, if it has one; it is the predictor
    ======================================  ==========================================================================

    Each may be ``async``. A predictor is called with the request, or its ``predict`` is. Where a hook returns nothing that
    can predict, ``predict`` of its module is the predictor.

    Args:
        name: As of :func:`find`.
        target: What that stands for.
        load: Gives the model; ``None`` where none is known.
    """

    def __init__(self, name: str, target: Any, load: Callable[[], Any] | None) -> None:
        self._name = name
        self._target = target
        self._load = load

    def prepare(self, run: Callable[[Awaitable[Any]], Any]) -> Callable[[Any], Any]:
        """Call the hook in this thread and return its predictor.

        Args:
            run: Runs what is awaitable to its end.

        Raises:
            SettingsError: It needs a model and there is none, or is nothing that can be called.
            UnsupportedSourceError: It made nothing that can predict.
        """
        target = self._target
        if not (inspect.isroutine(target) or inspect.isclass(target) or _is_hook(target)):
            return self._object(target, run)
        wanted = 0 if inspect.isclass(target) else _wants(target)
        if wanted > 2:
            raise SettingsError(
                f"{self._name} needs {wanted} arguments", hint="setup(), setup(model) or predict(model, request)"
            )
        if wanted and self._load is None:
            raise SettingsError(f"{self._name} takes a model, and there is none", hint="--model org/name")
        given = (self._load(),) if wanted and self._load is not None else ()
        if wanted == 2:
            return functools.partial(target, *given)
        made = target(*given)
        if inspect.isawaitable(made):
            made = run(made)
        if inspect.isclass(target):
            return self._object(made, run)
        return self._predictor(made)

    def _object(self, made: Any, run: Callable[[Awaitable[Any]], Any]) -> Callable[[Any], Any]:
        for name in _PREPARES:
            prepare = getattr(made, name, None)
            if callable(prepare):
                result = prepare(*((self._load(),) if _wants(prepare) == 1 and self._load is not None else ()))
                if inspect.isawaitable(result):
                    run(result)
                break
        return self._predictor(made)

    def _predictor(self, made: Any) -> Callable[[Any], Any]:
        module = sys.modules.get(self._name.partition(":")[0])
        instance = None if inspect.isclass(made) else made
        for candidate in (getattr(instance, "predict", None), instance, getattr(module, "predict", None)):
            if callable(candidate):
                return candidate  # type: ignore[no-any-return]
        raise UnsupportedSourceError(
            f"{self._name} returned {type(made).__name__}, which can neither be called nor has predict(), "
            f"and its module has no predict() either",
            hint="return a function that takes the request, or an object with predict(request)",
        )


def _is_hook(target: Any) -> bool:
    from ..lifecycle import OnStart

    return isinstance(target, OnStart | functools.partial)


class Predictor:
    """Calls a predictor for requests: plain functions one at a time in a thread, ``async`` ones in the running loop."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self._call = call
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastload-predict")

    async def __call__(self, request: Any) -> Any:
        """Return what it makes of *request*."""
        plain = self._call if not hasattr(self._call, "func") else self._call.func
        if inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None)):  # noqa: B004
            return await self._call(request)
        answer = await asyncio.get_running_loop().run_in_executor(self._pool, self._call, request)
        return await answer if inspect.isawaitable(answer) else answer

    def close(self) -> None:
        """Take no more calls."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def encode(answer: Any) -> tuple[bytes, str]:
    """Return *answer* as the body of an HTTP answer, and its content type: bytes as they are, all else as JSON.

    Raises:
        UnsupportedSourceError: It has no place in JSON, or holds NaN or infinity.
    """
    if isinstance(answer, bytes | bytearray | memoryview):
        return bytes(answer), "application/octet-stream"
    try:
        return json.dumps(answer, allow_nan=False, default=_plain).encode(), "application/json"
    except ValueError as e:
        raise UnsupportedSourceError(
            f"the output cannot be sent as JSON: {e}",
            hint="NaN or infinity from a model mostly means wrong weights or dtype",
        ) from e
    except TypeError as e:
        raise UnsupportedSourceError(
            f"the output cannot be sent as JSON: {e}", hint="return dicts, lists, texts, numbers, tensors, or bytes"
        ) from e


def _plain(value: Any) -> Any:
    """Return *value*, of a type that JSON does not know, as one that it knows: tensors, arrays, numbers of numpy."""
    for name in ("tolist", "model_dump", "_asdict"):
        method = getattr(value, name, None)
        if callable(method):
            return method()
    if isinstance(value, Sequence | set | frozenset):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not plain data")
