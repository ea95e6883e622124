"""A distribution that nobody here wrote brings a weight format; installed by pip, it simply works."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest

import fastload

HERE = Path(__file__).parent

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from arrival import Arrival
from fastload import plugins
from fastload.settings import Settings
from fastload.tensors import TensorStream
import fastload_hello

folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
folder.mkdir()
values = {f"layer.{i}": torch.arange(i * 7, dtype=torch.int32).reshape(i, 7) for i in range(3)}
raw = {n: ("I32", list(t.shape), t.numpy().tobytes()) for n, t in values.items()}
(folder / "weights.hello").write_bytes(fastload_hello.dumps(raw))
arrival = Arrival(folder, cache, weights=["weights.hello"])
arrival.finish()
stream = TensorStream(arrival.transfer, plugins.manager(Settings()))
assert stream.keys() == list(values), stream.keys()
assert all(torch.equal(tensor, values[name]) for name, tensor in stream)
record = next(r for r in plugins.report(Settings()) if r.name == "hello")
print(json.dumps([record.distribution, record.version, list(record.hooks), record.error]))
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the stranger's distribution: this environment's, or one that pip fills now."""
    with suppress(metadata.PackageNotFoundError):
        return Path(str(metadata.distribution("fastload-hello").locate_file("")))
    pytest.importorskip("hatchling", reason="builds the stranger's distribution; `tox run -e hello` installs it")
    target = tmp_path_factory.mktemp("hello")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index",
         "--no-build-isolation", "--target", target, HERE / "data" / "fastload-hello"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def test_a_strangers_format_is_found_and_read(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    package = Path(fastload.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, tmp_path / "model", tmp_path / "cache"],
        env={"PYTHONPATH": f"{installed}:{package}:{package / 'plugins'}:{HERE}", "HOME": str(tmp_path)},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '["fastload-hello", "1.2", ["fastload_format"], null]'
