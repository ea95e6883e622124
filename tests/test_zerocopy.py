"""The share of zero-copy bytes: what lies in a file's mapping counts, once, and nothing else does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

import fastload  # noqa: E402
from fastload.testing import Hub  # noqa: E402
from fastload.zerocopy import zero_copy_bytes  # noqa: E402


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """Two tensors of 4000 bytes each that safetensors mapped, and their file."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.rand(1000), "b": torch.rand(1000)}, path)
    return safetensors.torch.load_file(path), [(os.stat(path).st_ino, os.path.realpath(path))]


def test_views_count_and_copies_do_not(mapped: Any) -> None:
    tensors, files = mapped
    assert zero_copy_bytes(tensors, files) == (8000, 8000)
    assert zero_copy_bytes({"a": tensors["a"], "b": tensors["b"].clone()}, files) == (4000, 8000)
    assert zero_copy_bytes({"a": tensors["a"].half()}, files) == (0, 2000)
    assert zero_copy_bytes(tensors, []) == (0, 8000)


def test_either_inode_or_path_is_enough(mapped: Any) -> None:
    tensors, ((inode, path),) = mapped
    assert zero_copy_bytes(tensors, [(inode, "/elsewhere")]) == (8000, 8000)
    assert zero_copy_bytes(tensors, [(0, path)]) == (8000, 8000)


def test_tied_weights_count_once(mapped: Any) -> None:
    tensors, files = mapped
    assert zero_copy_bytes([tensors["a"], tensors["a"], tensors["a"][5:]], files) == (4000, 4000)


def test_modules_pipelines_and_containers_are_looked_into(mapped: Any) -> None:
    tensors, files = mapped
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight = torch.nn.Parameter(tensors["a"])
    module.register_buffer("kept", tensors["b"])
    module.register_buffer("made", torch.zeros(50), persistent=False)  # of no checkpoint
    assert zero_copy_bytes((torch.nn.Sequential(module), {"info": []}), files) == (8000, 8000)

    class Pipeline:
        def __init__(self) -> None:
            self.unet, self.name = module, "x"

    assert zero_copy_bytes(Pipeline(), files) == (8000, 8000)


@pytest.mark.parametrize("nothing", [None, "text", {}, [1, 2], torch.empty(3, device="meta")], ids=str)
def test_what_has_no_tensor_on_the_host_has_no_share(mapped: Any, nothing: Any) -> None:
    assert zero_copy_bytes(nothing, mapped[1]) is None


def test_tensors_of_a_load_are_views_cold_and_warm(hub: Hub) -> None:
    for _ in range(2):
        with fastload.profile() as profiles:
            tensors = fastload.load_tensors("org/tiny")
        (profile,) = profiles.loads
        assert profile.zero_copy_share == 1
        assert profile.result_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert profile.to_record()["zero_copy_bytes"] == profile.zero_copy_bytes
