"""fastload loads from olah, a hub by others with habits of its own (``tox run -e olah``)."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from testbed.olah import Olah, olah_command

pytestmark = pytest.mark.skipif(olah_command() is None, reason="olah is not installed (tox run -e olah)")

LLAMA = "tb/llama-tiny-bf16"


@pytest.fixture(scope="module")
def olah(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Olah]:
    with Olah([tiny_llama], tmp_path_factory.mktemp("olah")) as server:
        yield server


def assert_same_files(snapshot: Path, model: Path) -> None:
    names = sorted(p.name for p in model.iterdir())
    assert filecmp.cmpfiles(snapshot, model, names, shallow=False) == (names, [], [])


def test_huggingface_hub_downloads_from_olah(olah: Olah, tiny_llama: Path, tmp_path: Path) -> None:
    folder = snapshot_download(LLAMA, revision="main", endpoint=olah.url, cache_dir=tmp_path, token=False)
    assert Path(folder).name == olah.commits[LLAMA]
    assert_same_files(Path(folder), tiny_llama)


def test_prefetch_from_olah_is_complete_and_verified(olah: Olah, tiny_llama: Path, tmp_path: Path) -> None:
    import fastload

    snapshot = fastload.prefetch(LLAMA, settings={"endpoint": olah.url, "cache_dir": tmp_path})
    assert snapshot.commit == olah.commits[LLAMA]
    assert_same_files(snapshot.path, tiny_llama)
    offline = snapshot_download(LLAMA, cache_dir=tmp_path, local_files_only=True)
    assert Path(offline) == snapshot.path


def test_tensors_from_olah_are_those_of_the_files(olah: Olah, tiny_llama: Path, tmp_path: Path) -> None:
    import fastload

    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = fastload.load_tensors(LLAMA, settings={"endpoint": olah.url, "cache_dir": tmp_path})
    expected = {}
    for shard in sorted(tiny_llama.glob("*.safetensors")):
        expected.update(load_file(shard))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype is tensor.dtype and torch.equal(tensors[name], tensor), name
