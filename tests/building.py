"""Models built while their files arrive, and plainly from the cache that results; and all that is said meanwhile."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from arrival import Arrival, finish_on_demand
from compare import diff_models
from fastload_transformers import fastload_build_model

from fastload import plugins
from fastload.settings import Settings
from fastload.tensors import TensorStream
from fastload.zerocopy import zero_copy_bytes

#: Wherever a snapshot lies.
_PLACE = re.compile(r"[^\s'\"]*/(?=models--)")


class Builder:
    """Builds models of folders that arrive while they are built, and plainly from the cache that results.

    Args:
        root: Where caches are made.
        hook: The ``fastload_build_model`` of a plugin; transformers' when left out.
    """

    def __init__(self, root: Path, hook: Callable[..., Any] = fastload_build_model) -> None:
        self.root = root
        self.hook = hook
        self.arrivals: list[Arrival] = []

    def arrive(self, folder: Path, **options: Any) -> Arrival:
        self.arrivals.append(Arrival(folder, self.root / f"cache{len(self.arrivals)}", **options))
        return self.arrivals[-1]

    def build(self, arrival: Arrival, framework: str | None = None, **options: Any) -> Any:
        """Call the hook as the loader does."""
        stream = TensorStream(arrival.transfer, plugins.manager(Settings(plugins=())))
        torch.manual_seed(7)  # for weights that the checkpoint lacks
        return self.hook(
            framework=framework,
            snapshot=arrival.transfer.wait_manifest(),
            stream=stream,
            options={"device": "cpu", "dtype": None, **options},
        )

    def streamed(self, folder: Path, **options: Any) -> tuple[Any, Arrival]:
        """Build while the bytes arrive: one block of each file at first, the rest once the build waits for it."""
        arrival = self.arrive(folder)
        for name in arrival.weights:
            arrival.land(name, 0, 1)
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            waited = pool.submit(finish_on_demand, arrival, ended)
            try:
                model = self.build(arrival, **options)
            finally:
                ended.set()
            assert waited.result(), "the build did not wait for a byte: nothing was streamed"
        return model, arrival

    def arrived(self, folder: Path, **options: Any) -> tuple[Any, Arrival]:
        """Build from files that are waited for before the build, whatever their kind."""
        kinds = (".safetensors", ".bin", ".gguf")
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in kinds)
        arrival = self.arrive(folder, weights=names)
        with ThreadPoolExecutor(1) as pool:
            arriving = pool.submit(arrival.finish)
            model = self.build(arrival, **options)
            arriving.result()
        return model, arrival

    def plain(self, arrival: Arrival, model_class: Any, **options: Any) -> Any:
        """Load the usual way, by name."""
        torch.manual_seed(7)
        cache = arrival.repo.parent
        if model_class.__name__.startswith("AutoModel"):  # else, with PEFT installed, the hub is asked for an adapter
            options["adapter_kwargs"] = {"cache_dir": cache, "local_files_only": True}
        return model_class.from_pretrained("org/model", cache_dir=cache, local_files_only=True, **options)

    def close(self) -> None:
        for arrival in self.arrivals:
            arrival.close()


def same_as_plain(builder: Builder, folder: Path, auto_class: Any, *, streams: bool = True, **options: Any) -> Any:
    """Load *folder* in both ways, compare what comes back and all that was said, and return ours.

    Args:
        auto_class: The class, or the name of one of transformers'.
        streams: Whether the build is to wait for bytes; else all files are to be there before it.
    """
    import transformers

    with heard("transformers", "accelerate") as ours:
        load = builder.streamed if streams else builder.arrived
        loaded, arrival = load(folder, auto_class=auto_class, **options)
    with heard("transformers", "accelerate") as plainly:
        chosen = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
        expected = builder.plain(arrival, chosen, **options)
    if options.get("output_loading_info"):
        assert loaded[1] == expected[1]
        assert diff_models(loaded[0], expected[0]) == []
    else:
        assert diff_models(loaded, expected) == []
    assert ours == plainly
    if streams:  # nothing is copied that is not copied plainly
        files = [(p.stat().st_ino, str(p.resolve())) for p in arrival.snapshot.rglob("*.safetensors")]
        assert zero_copy_bytes(loaded, files) == zero_copy_bytes(expected, files)
    return loaded


def same_error(builder: Builder, folder: Path, auto_class: str, **options: Any) -> Exception:
    """Load *folder* in both ways, check that both raise the same, and return ours."""
    import transformers

    with pytest.raises(Exception) as ours:
        builder.streamed(folder, auto_class=auto_class, **options)
    with pytest.raises(Exception) as plain:
        builder.plain(builder.arrivals[-1], getattr(transformers, auto_class), **options)
    raised = [(type(e.value), without_places(str(e.value))) for e in (ours, plain)]
    assert raised[0] == raised[1]
    return ours.value


def without_places(text: str) -> str:
    """Return *text* with snapshots named by what they are alone, wherever they lie."""
    return _PLACE.sub("", text)


@contextmanager
def heard(*loggers: str) -> Iterator[list[str]]:
    """Collect what is logged (from INFO on) under *loggers*, and every warning, without the places of snapshots."""
    from transformers.utils import logging as of_transformers

    said: list[str] = []

    def take(text: str) -> None:
        said.append(without_places(text))

    handler = logging.Handler()
    handler.emit = lambda record: take(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    for once in (of_transformers.warning_once, of_transformers.info_once):  # what is said once a process, each time
        once.cache_clear()
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
    finally:
        for name, level in before.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)
        for warning in warned:
            take(f"{warning.category.__name__}: {warning.message}")
