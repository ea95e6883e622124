"""A CUDA device for every test here: an emulated one where FAKECUDA_LIB says so (``tox -e cuda``), else a real one, else none.

Whoever wants both kinds of proof writes tests against ``cuda``: on the emulated runtime every test runs with operations as
late as possible and with the race checker, and ends without a violation. What only the emulation can do (faults, holding
all copies) asks for ``fake``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fakecuda
import pytest

if fakecuda.library_folder() is not None:
    fakecuda.install(devices=2)

from arrival import Arrival

from fastload import plugins
from fastload.settings import Settings
from fastload.tensors import TensorStream


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cuda")


@pytest.fixture(autouse=True)
def cuda() -> Iterator[Any]:
    """``torch.cuda``; the emulated device ends without violations and without memory that a test left behind."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; `tox -e cuda` emulates one")
    gc.collect()
    if not fakecuda.installed():
        yield torch.cuda
        return
    fakecuda.reset()
    torch.cuda.empty_cache()
    with fakecuda.settings(schedule="late", check=1):
        yield torch.cuda
        torch.cuda.synchronize()
        assert fakecuda.stat("violations") == 0
    gc.collect()
    assert fakecuda.stat("registered") == 0, "pinned memory was not given back"


@pytest.fixture
def fake(cuda: Any) -> ModuleType:
    """The emulation's own switches."""
    if not fakecuda.installed():
        pytest.skip("needs the emulated runtime; `tox -e cuda`")
    return fakecuda


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two weight files with the tensors of :func:`model`, the second one's names with a dash."""
    folder = tmp_path / "model"
    folder.mkdir()
    from device_weights import model, save_misaligned

    save_misaligned(model(), folder / "a.safetensors")
    save_misaligned({f"{name}-": tensor for name, tensor in model().items()}, folder / "b.safetensors")
    return folder


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Arrival]]:
    """Let the model arrive."""
    made: list[Arrival] = []

    def start(**options: Any) -> Arrival:
        made.append(Arrival(options.pop("folder", folder), tmp_path / f"cache{len(made)}", **options))
        return made[-1]

    yield start
    for arrival in made:
        arrival.close()


@pytest.fixture
def open_stream() -> Iterator[Callable[..., TensorStream]]:
    """Open streams (first argument: an arrival; then those of TensorStream and settings) that end with the test."""
    made: list[TensorStream] = []

    def open_stream(arrival: Arrival, device: Any = "cuda", dtype: Any = None, **values: Any) -> TensorStream:
        settings = Settings(**{"pinned_bytes": 64 << 10, **values})
        pm = plugins.manager(Settings(plugins=()))
        made.append(TensorStream(arrival.transfer, pm, device=device, dtype=dtype, settings=settings))
        return made[-1]

    yield open_stream
    for stream in made:
        stream.close()
