"""``fastload.accelerate()``: unchanged code, our bytes.

While it is on, two names are bound to ours, in every module that holds them:

1. ``huggingface_hub.file_download._hf_hub_download_to_cache_dir``, through which ``hf_hub_download``, ``snapshot_download`` and
   every ``from_pretrained`` fetch each file of the cache. Ours puts the file into its place, then calls theirs, which finds it
   there. So every check, exception and return value stays theirs.
2. ``safetensors.safe_open`` (:mod:`fastload.router`), as long as a file is in flight whose path was given out.

Whatever goes another way than expected is left to the real function, with one warning.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .asking import Asked
from .errors import (
    AccessError,
    FastloadError,
    FastloadWarning,
    IntegrityError,
    NotFoundError,
    RefusedFileError,
    SettingsError,
    SourceChangedError,
    from_record,
    to_record,
)
from .interception import AfterImport, rebind
from .ondemand import OnDemand, Transfers, asked_for, end_all
from .plainway import checked, identity
from .plan import is_weight
from .readers import lets_os_errors_through, reads_by_safe_open
from .settled import Place

_MODULE, _NAME = "huggingface_hub.file_download", "_hf_hub_download_to_cache_dir"
#: What the function takes, in huggingface_hub 1.31 to 2.4. Those that are read here:
_READ = {"cache_dir", "repo_id", "filename", "repo_type", "revision", "endpoint", "headers", "local_files_only",
         "force_download", "dry_run", "tqdm_class"}  # fmt: skip
_KNOWN = _READ | {"etag_timeout", "token"}
#: Reasoned: a smaller file is complete before it could be given out in flight.
_LEAST_IN_FLIGHT_BYTES = 1 << 20


class _State:
    """What is accelerated. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        #: One entry a block that is open: the repositories, or None for all.
        self.scopes: list[frozenset[str] | None] = []
        self.transfers = Transfers()
        self.watch: AfterImport | None = None
        self.real: Any = None
        self.ours: Any = None
        self.warned = False

    def covers(self, repo: str) -> bool:
        """Tell whether *repo* is accelerated."""
        with self.lock:
            return any(scope is None or repo in scope for scope in self.scopes)


_state = _State()
_local = threading.local()


@contextmanager
def accelerate(*models: str) -> Iterator[None]:
    """Let unchanged ``from_pretrained``, ``hf_hub_download`` and ``snapshot_download`` fetch through fastload.

    For the length of the block and in all threads: verified, over several connections, resumed after a crash, and, within
    the ``from_pretrained`` of transformers and diffusers, loaded while the bytes still arrive. Blocks may be nested and
    overlap. Leaving the last one waits until every file in flight is verified; an exception out of it does not.

    What fastload does not do is left to huggingface_hub: other types of repositories, ``local_dir``, ``force_download``,
    ``dry_run``, offline mode.

    Args:
        models: The repositories (``org/model``) for which this holds; none: all.

    Raises:
        IntegrityError: A file is not what the hub says, whichever way it came.
    """
    scope = _scope(models)
    _enter(scope)
    try:
        yield
    except BaseException:
        for transfer in _leave(scope):
            transfer.stop()
        raise
    end_all(_leave(scope))


def switch_on(*models: str) -> None:
    """As :func:`accelerate`, to the end of the process. Harmless when repeated."""
    scope = _scope(models)
    with _state.lock:
        if scope in _state.scopes:
            return
    _enter(scope)


def _scope(models: tuple[str, ...]) -> frozenset[str] | None:
    for model in models:
        if not isinstance(model, str):
            raise SettingsError(f"accelerate() takes names of models, not {type(model).__name__}")
    return frozenset(model.strip().removeprefix("hf://").partition("@")[0] for model in models) or None


def _enter(scope: frozenset[str] | None) -> None:
    with _state.lock:
        _state.scopes.append(scope)
        if len(_state.scopes) == 1:
            _state.warned = False
            _state.watch = AfterImport(_MODULE, _install)


def _leave(scope: frozenset[str] | None) -> list[OnDemand]:
    """End a block; return the transfers that are to end with the last one."""
    with _state.lock:
        _state.scopes.remove(scope)
        if _state.scopes:
            return []
        if _state.watch is not None:
            _state.watch.close()
            _state.watch = None
        if _state.real is not None:
            rebind(_state.ours, _state.real, _MODULE)
            _state.real = _state.ours = None
        return _state.transfers.take()


def _forked() -> None:
    """Transfers and threads are the parent's; the names stay bound."""
    _state.lock = threading.RLock()
    _state.transfers = Transfers()


os.register_at_fork(after_in_child=_forked)


# -- the name ---------------------------------------------------------------------------------------------------------


def _install(module: ModuleType) -> None:
    real = getattr(module, _NAME, None)
    try:
        parameters = inspect.signature(real).parameters if real is not None else {}
    except (TypeError, ValueError):
        parameters = {}
    if real is None or not parameters.keys() >= _READ:
        _warn(f"this huggingface_hub downloads in another way ({_MODULE}.{_NAME})")
        return

    @functools.wraps(real)
    def download_to_cache_dir(*args: Any, **kwargs: Any) -> Any:
        return _download(real, module, args, kwargs)

    with _state.lock:
        if _state.scopes:
            _state.real, _state.ours = real, download_to_cache_dir
            rebind(real, download_to_cache_dir, _MODULE)


def _warn(what: str) -> None:
    with _state.lock:
        warned, _state.warned = _state.warned, True
    if not warned:
        warnings.warn(f"fastload: {what}; it is downloaded the plain way", FastloadWarning, stacklevel=2)


def _download(real: Any, module: ModuleType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Put the file into its place if we can, then do what the real function does."""
    if getattr(_local, "plain", False):  # asked for by ourselves
        return real(*args, **kwargs)
    try:
        return _fetch(real, module, args, kwargs)
    except IntegrityError as e:
        if not lets_os_errors_through(str(kwargs.get("repo_id"))):
            raise
        raise from_record({**to_record(e), "type": RefusedFileError.__name__}) from e


def _fetch(real: Any, module: ModuleType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    started_s, verified = time.time(), None
    if kwargs.keys() >= _READ:
        brought = _unless_odd(kwargs, lambda: not args and _is_ours(kwargs, module) and _prepare(real, module, kwargs))
        if brought:
            verified = identity(brought)
        elif not kwargs["dry_run"] and kwargs["repo_type"] in (None, "model"):
            _unless_odd(kwargs, lambda: Place(kwargs).land())
    else:
        _warn(f"huggingface_hub asks without arguments that it had ({', '.join(sorted(_READ - kwargs.keys()))})")
    return checked(lambda: real(*args, **kwargs), str(kwargs.get("filename")), started_s, _warn, verified)


def _unless_odd(kwargs: Mapping[str, Any], step: Callable[[], Any]) -> Any:
    """Do *step*, and return what it returns; where it cannot be done, the real function's own way stays open."""
    try:
        return step()
    except SourceChangedError as e:  # the real one takes what is there now
        _warn(f"{kwargs['repo_id']}/{kwargs['filename']}: {e.message}")
    except IntegrityError:
        raise
    except (NotFoundError, AccessError):  # the real one has its own words for it
        pass
    except Exception as e:  # another library's arguments and files: whatever is odd here
        _warn(f"{kwargs['repo_id']}/{kwargs['filename']}: {type(e).__name__}: {e}")


def _plainly(real: Any, kwargs: Mapping[str, Any]) -> Path:
    """Call the real function, for a file that our way did not bring."""
    _local.plain = True
    try:
        return Path(real(**kwargs))
    finally:
        _local.plain = False


def _is_ours(kwargs: Mapping[str, Any], module: ModuleType) -> bool:
    """Tell whether fastload does what these arguments ask for."""
    unknown = kwargs.keys() - _KNOWN
    if unknown:
        _warn(f"huggingface_hub asks with other arguments ({', '.join(sorted(unknown))})")
        return False
    if kwargs["force_download"] or kwargs["local_files_only"] or kwargs["dry_run"]:
        return False
    if kwargs["repo_type"] not in (None, "model") or not _state.covers(kwargs["repo_id"]):
        return False
    return not module.constants.HF_HUB_OFFLINE and sys.platform == "linux" and not _has_own_client()


def _has_own_client() -> bool:
    """Tell whether the program has given huggingface_hub an HTTP client of its own, of which we know nothing."""
    http = sys.modules.get("huggingface_hub.utils._http")
    theirs = getattr(http, "default_client_factory", None)
    return bool(getattr(http, "_GLOBAL_CLIENT_FACTORY", theirs) is not theirs)


# -- one file ---------------------------------------------------------------------------------------------------------


def _prepare(real: Any, module: ModuleType, kwargs: dict[str, Any]) -> Path | None:
    """Bring the file where the real function looks for it, verified or in flight; return that place if it is there."""
    path, repo = str(kwargs["filename"]), kwargs["repo_id"]
    reader = reads_by_safe_open(repo)
    place = Place(kwargs)
    if place.flying() is not None and reader:
        return place.pointer
    if place.settled:
        return None
    asked = _asked(module, kwargs)
    transfer = _state.transfers.started(asked, path)
    if transfer is None and is_weight(path):
        transfer = _state.transfers.begin(asked)
    elif transfer is None:
        transfer = _state.transfers.find(asked)
        if transfer is None or not transfer.known:
            if reader:  # its weights will be asked for: let the process start, and the hub list them, meanwhile
                _state.transfers.begin(asked)
            return None
    snapshot = transfer.snapshot()
    if not transfer.has(path):
        return None
    symlinks = asked.settings.symlinks
    size = transfer.size(path)
    if reader and symlinks and path.endswith(".safetensors") and size > _LEAST_IN_FLIGHT_BYTES:
        pinned = {**kwargs, "revision": snapshot.commit}
        try:
            if transfer.give(path, lambda over: _plainly(real, {**pinned, "force_download": over}), _warn):
                return snapshot.path / path
        except OSError as e:
            if isinstance(e, FastloadError):
                raise
    brought = _deliver(transfer, asked, path, size, kwargs["tqdm_class"])
    return snapshot.path / path if brought else None


def _deliver(transfer: OnDemand, asked: Asked, path: str, size: int, tqdm_class: Any) -> bool:
    bar = _progress_bar(tqdm_class, path, size)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        count = min(count, size - done)
        done += count
        bar.update(count)
        if callable(transferred := getattr(bar, "update_transfer", None)):
            transferred(count)

    try:
        brought = transfer.deliver(path, progress)
        if not brought:  # it had ended, because nobody wanted anything
            brought = _state.transfers.begin(asked).deliver(path, progress)
        progress(size)
        return brought
    finally:
        bar.close()


def _progress_bar(tqdm_class: Any, path: str, size: int) -> Any:
    """Return the bar that huggingface_hub would have shown."""
    chosen = tqdm_class or sys.modules["huggingface_hub.utils"].tqdm
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "total": size, "initial": 0, "desc": path[-40:]}
    if tqdm_class is None:
        options.update(name="huggingface_hub.http_get", disable=None)
    return chosen(**options)


def _asked(module: ModuleType, kwargs: Mapping[str, Any]) -> Asked:
    authorization = str((kwargs["headers"] or {}).get("authorization") or "")
    return asked_for(
        kwargs["repo_id"],
        str(kwargs["revision"]),
        cache_dir=kwargs["cache_dir"],
        endpoint=kwargs["endpoint"] or module.constants.ENDPOINT,
        token=authorization.removeprefix("Bearer ") or None,
        symlinks=not module.constants.HF_HUB_DISABLE_SYMLINKS,
    )
