"""The promises of a weight format while its file arrives from a hub: late bytes, cut lines, wrong bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from .. import loader
from ..device import import_torch
from ..errors import DownloadError, IntegrityError, PluginError
from ..journal import BLOCK_BYTES
from ..types import NeedBytes
from ..weightfile import HEAD_BYTES
from .conformance import Broken, Subject, Unproven, within
from .faults import Fault
from .hub import Hub
from .samples import Plain, Sample, difference, plain

_REPO = "org/sample"
#: Guessed: what is there is given within milliseconds.
_PATIENCE_S = 10.0


def loads_from_a_hub(subject: Subject, sample: Sample) -> None:
    """From a hub, and once more from the cache without a byte, the tensors are those of the sample."""
    with _hub(sample) as hub:
        settings = _settings(subject, hub)
        for where in ("from the hub", "from the cache"):
            hub.clear()
            _equal(_load(sample, settings), sample, where)
        if hub.bytes_sent():
            raise Broken(f"the file travelled again although it was in the cache ({hub.bytes_sent()} bytes)")


def streams_while_bytes_arrive(subject: Subject, sample: Sample) -> None:
    """A tensor can be read as soon as its own bytes are there, while later ones still travel."""
    data = sample.data()
    found = subject.recognise(sample.name, data[:HEAD_BYTES])
    if found is None or hasattr(found, "load"):
        raise Unproven("the format reads whole files")
    answer = found.parse(data)
    stops = [] if isinstance(answer, NeedBytes) else sorted((t.span.stop, t.name) for t in answer if len(t.span))
    # What lands is counted in blocks, here by one request each, and the hook sees a head of at least 64 KiB.
    first = next((-(-stop // BLOCK_BYTES) * BLOCK_BYTES for stop, _ in stops), len(data))
    held_at = max(first, HEAD_BYTES)
    early = [name for stop, name in stops if stop <= held_at]
    if held_at >= len(data) or len(early) == len(stops):
        raise Unproven(f"it takes a sample with a tensor that ends {BLOCK_BYTES // 1024} KiB after another one")
    _import_torch()
    with _hub(sample) as hub:
        hub.script(Fault("hold", path=sample.name, offset=held_at))
        read: dict[str, Any] = {}
        errors: list[BaseException] = []
        reached, go_on = threading.Event(), threading.Event()

        def read_on() -> None:
            with loader.stream(_REPO, files=sample.name, settings=_settings(subject, hub)) as stream:
                read.update((name, stream.get_tensor(name)) for name in early)
                reached.set()
                go_on.wait()
                read.update((name, tensor) for name, tensor in stream if name not in read)

        def run() -> None:
            try:
                within(2 * _PATIENCE_S, read_on)
            except BaseException as e:
                errors.append(e)
                reached.set()

        reader = threading.Thread(target=run, name="fastload.testing.reader", daemon=True)
        reader.start()
        streamed = reached.wait(_PATIENCE_S)
        hub.script()
        hub.release()
        go_on.set()
        reader.join()
        if not streamed:
            raise Broken(f"tensor {early[0]!r} waited for bytes from {held_at} on, although it ends before")
        if errors:
            raise errors[0]
        _equal(read, sample, "as a stream")


def goes_on_after_a_cut(subject: Subject, sample: Sample) -> None:
    """A transfer that is cut is a DownloadError, never one of the format's; the next load goes on and is right."""
    _import_torch()
    size = len(sample.data())
    with _hub(sample) as hub:
        for offset in sorted({size // 3, size - 1}):
            settings = {**_settings(subject, hub), "cache_dir": str(subject.new_folder()), "attempts": 1}
            hub.script(Fault("reset", path=sample.name, offset=offset))
            try:
                _load(sample, settings)
            except DownloadError:
                pass
            else:
                raise Broken(f"nothing failed although byte {offset} never came")
            hub.script()
            _equal(_load(sample, settings), sample, f"after a cut at byte {offset}")


def gives_no_wrong_bytes(subject: Subject, sample: Sample) -> None:
    """A byte that was changed on the way, in the head or in the data, is an IntegrityError and nothing else."""
    _import_torch()
    size = len(sample.data())
    with _hub(sample) as hub:
        for offset in sorted({0, min(size - 1, 20), size // 2, size - 1}):
            settings = {**_settings(subject, hub), "cache_dir": str(subject.new_folder())}
            hub.script(Fault("flip", path=sample.name, offset=offset, mask=0xFF))
            try:
                _load(sample, settings)
            except IntegrityError:
                continue
            raise Broken(f"loaded although byte {offset} was changed on the way")


# -- what the checks share ------------------------------------------------------------------------------------------


def _import_torch() -> None:
    try:
        import_torch()
    except PluginError as e:
        raise Unproven(e.message) from e


def _hub(sample: Sample) -> Hub:
    # All of it as a large file: that is what a hub does with weights.
    return Hub({_REPO: {sample.name: sample.data()}}, lfs=lambda path, size: True)


def _settings(subject: Subject, hub: Hub) -> dict[str, Any]:
    return {
        "endpoint": hub.endpoint, "cache_dir": str(subject.new_folder()), "plugins": subject.settings.plugins or (),
        "process": False, "range_bytes": BLOCK_BYTES, "slow_bytes_per_s": 0, "stall_s": 10 * _PATIENCE_S, "token": "",
    }  # fmt: skip


def _load(sample: Sample, settings: Mapping[str, Any]) -> dict[str, Any]:
    _import_torch()
    return loader.load_tensors(_REPO, files=sample.name, settings=settings)


def _equal(read: Mapping[str, Any], sample: Sample, how: str) -> None:
    tensors: dict[str, Plain] = {name: plain(tensor) for name, tensor in read.items()}
    if reason := difference(tensors, sample.expected()):
        raise Broken(f"{how}: {reason}")
