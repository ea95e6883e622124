"""In a notebook, whose cells run inside an event loop, sync functions block their cell and async ones are awaited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transfers import write_weights

from fastload.testing import Hub

nbformat = pytest.importorskip("nbformat", reason="tox -e notebook installs a Jupyter kernel")
nbclient = pytest.importorskip("nbclient", reason="tox -e notebook installs a Jupyter kernel")
pytest.importorskip("ipykernel", reason="tox -e notebook installs a Jupyter kernel")

CELLS = [
    "import asyncio, fastload\nassert asyncio.get_running_loop().is_running()",
    "one = fastload.load_tensors('org/m')\nassert len(one) == 12",
    "two = await fastload.aload_tensors('org/m')\nassert two.keys() == one.keys()",
    "with fastload.stream('org/m') as weights:\n    three = dict(weights)\nassert three.keys() == one.keys()",
    "async with fastload.astream('org/m') as weights:\n    four = {n: t async for n, t in weights}",
    "import torch\nfor other in (two, three, four):\n    assert all(torch.equal(one[n], other[n]) for n in one)",
    "fastload.quiesce()",
]


def test_cells_load_under_the_kernels_running_loop(
    make_hub: Callable[..., Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = write_weights(tmp_path / "model.safetensors")
    hub = make_hub({"org/m": {"config.json": b"{}", "model.safetensors": weights.read_bytes()}})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(book, timeout=100, kernel_name="python3").execute()
    said = [output for cell in book.cells for output in cell.outputs]
    assert not [o for o in said if o.output_type == "error" or o.get("name") == "stderr"], said
