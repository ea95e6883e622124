"""The public calls: load, load_tensors, stream, prefetch, start, and their asyncio twins.

The sync ones run the engine in a child process or a thread (:mod:`fastload.apart`) and build in the caller's thread; the twins
run it in the caller's event loop and build in a worker thread. Everything else is shared.

Little is imported with this module: the rest is, while the first call's child comes up (:mod:`fastload.opening`).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from .late import Late
from .opening import aopened, in_thread, opened, prepared
from .unawaited import warns_unawaited

if TYPE_CHECKING:
    import torch

    from . import asking, events, running, tensors, types
else:
    torch = Late("torch")
    asking, events, running, tensors, types = (
        Late(f"{__package__}.{name}") for name in ("asking", "events", "running", "tensors", "types")
    )


def resolve(source: str, *, revision: str | None = None, settings: asking.SettingsLike = None) -> types.Manifest:
    """Return the list of all files of *source* with sizes and digests: one metadata request, nothing is fetched."""
    from .asking import ask
    from .listing import list_files

    return list_files(ask(source, revision=revision, settings=settings))


# -- sync -----------------------------------------------------------------------------------------------------------


def load(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    framework: str | None = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
    **options: Any,
) -> Any:
    """Return the framework's object for *source*, as its ``from_pretrained`` gives it, built while the bytes arrive.

    Works in any thread, with or without a running event loop; blocks until everything delivered is verified.

    Args:
        source: ``org/name``, ``org/name@revision``, ``hf://org/name``, a folder, or what a plugin resolves.
        revision: Branch, tag or commit.
        device: Where weights go.
        dtype: As the framework's ``from_pretrained`` takes it.
        framework: ``"transformers"`` or a plugin's; ``None``: the files decide.
        files: Shell patterns of the files to fetch, instead of those that the framework reads.
        mirrors: Further base URLs with the Hub's paths; they need no trust.
        settings: Overrides by name, or a whole :class:`fastload.Settings`.
        observers: Called with every :class:`fastload.Event` of this load.
        lock: A ``fastload.lock``: its files are accepted and nothing else, without a metadata request.
        options: All further keyword arguments of the framework's ``from_pretrained``; ``auto_class=`` overrides the class;
            ``token``, ``cache_dir`` and ``local_files_only`` are taken as settings.

    Raises:
        FastloadError: See :mod:`fastload.errors`; what has landed is kept.
    """
    with opened(
        source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock,
        options=options, framework=framework,
    ) as loading:  # fmt: skip
        return loading.build(framework, device, dtype)


def load_tensors(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
) -> dict[str, torch.Tensor]:
    """Return all tensors of *source*'s weight files by name.

    On the CPU, without ``dtype``, they are views of private (copy-on-write) mappings of the cached files: writing to one
    changes neither the file nor another tensor. Arguments and errors as :func:`load`.
    """
    with opened(
        source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock
    ) as loading:
        return loading.tensors(device, dtype)


@contextmanager
def stream(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
) -> Iterator[tensors.TensorStream]:
    """Give *source*'s tensors under ``safe_open``'s names, each as soon as its bytes landed.

    Leaving the block without an exception waits until every file that tensors were taken from is verified, and raises if
    one is not; files that were not touched are given up. Arguments and errors as :func:`load`.

    Raises:
        IntegrityError: Tensors that were handed out did not match the digest: throw them away.
    """
    with (
        opened(
            source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock
        ) as loading,
        loading.stream(device, dtype) as tensors,
    ):
        yield tensors


def prefetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
) -> types.Snapshot:
    """Fetch *source* into the cache, verified and safe from a power cut; needs no torch.

    Args:
        files: Shell patterns; ``None``: everything that the repository holds. All else as :func:`load`.
    """
    from .asking import ask
    from .loading import Loading
    from .running import Running

    asked = ask(
        source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock,
        everything=True,
    )  # fmt: skip
    running = Running(asked, process=False, settle=True)
    try:
        with Loading(asked, running.transfer) as loading:
            loading.transfer.wait(lambda: loading.transfer.finished)
            running.join()
            loading.transfer.check()
            return loading.transfer.wait_manifest()
    finally:
        running.cancel()


def start(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
    **options: Any,
) -> running.Running:
    """Begin to fetch what a later :func:`load` of *source* will need; returns at once.

    A process without torch does it, so that imports and everything else go on beside it. A later ``load``,
    ``load_tensors`` or ``stream`` with the same source, revision, files and settings joins it; so does, through the cache, any
    other process.

    Args:
        options: Those of ``load``'s that choose files matter: framework, variant, subfolder, use_safetensors.
    """
    with prepared(
        source, imports_follow=True, revision=revision, files=files, mirrors=mirrors, settings=settings,
        observers=observers, lock=lock, framework=options.pop("framework", None), options=options,
    ) as (asked, standby, _):  # fmt: skip
        from .running import begin

        return begin(asked, standby)


# -- asyncio --------------------------------------------------------------------------------------------------------


@warns_unawaited
async def aload(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    framework: str | None = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
    **options: Any,
) -> Any:
    """As :func:`load`, in the running event loop; the framework builds in a worker thread."""
    async with aopened(
        source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock,
        options=options, framework=framework,
    ) as loading:  # fmt: skip
        return await in_thread(loading, loading.build, framework, device, dtype)


@warns_unawaited
async def aload_tensors(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
) -> dict[str, torch.Tensor]:
    """As :func:`load_tensors`, in the running event loop."""
    async with aopened(
        source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock
    ) as loading:
        return await in_thread(loading, loading.tensors, device, dtype)


@asynccontextmanager
async def astream(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
) -> AsyncIterator[tensors.AsyncTensorStream]:
    """As :func:`stream`, in the running event loop: ``async with``, ``async for``, ``await weights.get_tensor(name)``."""
    async with aopened(
        source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock
    ) as loading:
        import asyncio

        from .tensors import AsyncTensorStream

        tensors = AsyncTensorStream(loading.open_stream(device, dtype))
        try:
            yield tensors
            await in_thread(loading, loading.verify_delivered)
        finally:
            await asyncio.shield(asyncio.to_thread(tensors.close))


@warns_unawaited
async def aprefetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: asking.SettingsLike = None,
    observers: Iterable[events.Observer] = (),
    lock: asking.LockLike = None,
) -> types.Snapshot:
    """As :func:`prefetch`, in the running event loop."""
    async with aopened(
        source, revision=revision, files=files, mirrors=mirrors, settings=settings, observers=observers, lock=lock,
        everything=True, settle=True,
    ) as loading:  # fmt: skip
        return await in_thread(loading, loading.snapshot)
