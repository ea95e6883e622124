"""PyTorch's own files: tensors and nothing else come out of them, and what wants to run code is refused."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from arrival import Arrival  # noqa: E402

import fastload  # noqa: E402
from fastload import plugins  # noqa: E402
from fastload.builtin.pickled import fastload_format  # noqa: E402
from fastload.errors import DownloadError, FormatError, UnsupportedSourceError  # noqa: E402
from fastload.settings import Settings  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402

ZIP, LEGACY = {"_use_new_zipfile_serialization": True}, {"_use_new_zipfile_serialization": False}
BOTH = pytest.mark.parametrize("how", [ZIP, LEGACY], ids=["zip", "legacy"])


def saved(content: Any, how: dict[str, Any] = ZIP) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def read(tmp_path: Path, data: bytes, name: str = "model.pth") -> dict[str, torch.Tensor]:
    """Read a file as a WeightFile does once it is verified."""
    path = tmp_path / name
    path.write_bytes(data)
    found: Any = fastload_format(filename=name, head=data[: 64 * 1024])
    assert found is not None
    return dict(found.load(path))


WEIGHTS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(7)}


@BOTH
@pytest.mark.parametrize("name", ["pytorch_model.bin", "net.pt", "net.pth", "last.ckpt", "NET.PTH"])
def test_tensors_come_as_torch_load_gives_them(tmp_path: Path, how: dict[str, Any], name: str):
    found = read(tmp_path, saved(OrderedDict(WEIGHTS), how), name)
    assert list(found) == list(WEIGHTS)
    for key, tensor in WEIGHTS.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


@BOTH
def test_tensors_that_are_one_in_the_file_are_one_here(tmp_path: Path, how: dict[str, Any]):
    table = torch.rand(4, 4)
    parameter = torch.nn.Parameter(torch.rand(3))
    content = {"in": table, "out": table, "row": table[1], "bias": parameter, "bias2": parameter}
    found = read(tmp_path, saved(content, how))
    assert found["in"] is found["out"] and found["bias"] is found["bias2"]
    assert found["row"].untyped_storage().data_ptr() == found["in"].untyped_storage().data_ptr()
    assert not found["bias"].requires_grad and type(found["bias"]) is torch.Tensor


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"state_dict": WEIGHTS, "epoch": 3}, ["a", "b", "n"]),
        ({"model": WEIGHTS, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}}, ["a", "b", "n"]),
        ({"params": WEIGHTS, "params_ema": {"a": torch.ones(1)}}, ["params.a", "params.b", "params.n", "params_ema.a"]),
        ({"mean": torch.ones(1), "net": {"w": torch.ones(2)}}, ["mean", "net.w"]),
    ],
)
def test_tensors_may_stand_one_level_deeper(tmp_path: Path, content: Any, names: list[str]):
    assert list(read(tmp_path, saved(content))) == names


def test_plain_values_beside_the_tensors_are_metadata(tmp_path: Path):
    data = saved({"state_dict": WEIGHTS, "epoch": 3, "arch": "unet", "best": 0.5, "args": [1, 2]})
    (tmp_path / "x.pt").write_bytes(data)
    found: Any = fastload_format(filename="x.pt", head=data)
    found.load(tmp_path / "x.pt")
    assert found.metadata(data) == {"epoch": "3", "arch": "unet", "best": "0.5"}


class Evil:
    """Runs a program where it is unpickled carelessly."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@BOTH
def test_code_is_refused_and_never_run(tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    data = saved({"a": torch.ones(2), "b": Evil()}, how)
    with pytest.raises(
        FormatError, match=r"^model\.pth: it holds more than tensors and plain values: .*posix\.mkdir"
    ) as e:
        read(tmp_path, data)
    assert "safetensors" in str(e.value.hint)
    assert not (tmp_path / "owned").exists()


@BOTH
def test_whole_modules_are_refused_without_advice_to_trust_them(tmp_path: Path, how: dict[str, Any]):
    with pytest.raises(FormatError, match="more than tensors") as caught:
        read(tmp_path, saved(torch.nn.Linear(2, 2), how))
    assert "weights_only" not in str(caught.value) and "safe_globals" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_way_to_run_it(tmp_path: Path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "s.pt"))
    with pytest.raises(FormatError, match="it is a TorchScript program") as caught:
        read(tmp_path, (tmp_path / "s.pt").read_bytes())
    assert "torch.jit.load" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.ones(3), "holds a Tensor, not a dict"),
        ([torch.ones(1)], "holds a list"),
        ({"epoch": 1}, "holds no tensors"),
    ],
)
def test_what_is_no_dict_of_tensors_is_refused(tmp_path: Path, content: Any, reason: str):
    with pytest.raises(FormatError, match=reason):
        read(tmp_path, saved(content))


@BOTH
@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: d[:-20], lambda d: d[:40] + b"\xff" * 60 + d[100:]]
)
def test_damaged_file_is_a_format_error_that_names_it(
    tmp_path: Path, how: dict[str, Any], damage: Callable[[bytes], bytes]
):
    with pytest.raises(FormatError, match=r"^model\.pth: torch cannot read it"):
        read(tmp_path, damage(saved({"a": torch.rand(200)}, how)))


@pytest.mark.parametrize("head", [b"", b"\x06\x00\x00\x00", b"GGUF", b"\x80\x01"])
def test_files_of_others_with_the_same_suffix_are_declined(head: bytes):
    assert fastload_format(filename="model.bin", head=head) is None


def test_other_suffixes_are_declined():
    assert fastload_format(filename="archive.zip", head=b"PK\x03\x04") is None


# -- in a load --------------------------------------------------------------------------------------------------------


def stream_of(arrival: Arrival, **options: Any) -> TensorStream:
    return TensorStream(arrival.transfer, plugins.manager(Settings(plugins=())), **options)


@pytest.fixture
def arrival(tmp_path: Path) -> Any:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(saved(WEIGHTS))
    made = Arrival(folder, tmp_path / "cache", weights=["pytorch_model.bin"])
    yield made
    made.close()


def test_file_is_not_touched_before_it_is_verified(arrival: Arrival):
    arrival.land("pytorch_model.bin")
    arrival.fail(DownloadError("cut"))
    with pytest.raises(DownloadError, match="cut"):
        stream_of(arrival).keys()


def test_stream_over_a_pickled_file_has_safe_opens_names(arrival: Arrival):
    arrival.finish()
    stream = stream_of(arrival)
    assert stream.keys() == ["a", "b", "n"]
    assert (stream.info("b").dtype, stream.info("b").shape) == ("BF16", (5,))
    part = stream.get_slice("a")
    assert (part.get_shape(), part.get_dtype()) == ([3, 4], "F32")
    assert torch.equal(part[1:], WEIGHTS["a"][1:]) and torch.equal(part[...], WEIGHTS["a"])
    assert stream_of(arrival, dtype="float16").get_tensor("a").dtype == torch.float16
    assert stream_of(arrival, dtype="float16").get_tensor("n").dtype == torch.int64


@BOTH
def test_load_tensors_reads_a_hubs_pickled_files(make_hub: Any, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]):
    hub = make_hub({"org/p": {"config.json": b"{}", "net.pth": saved(WEIGHTS, how)}})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for _ in range(2):  # from the hub, and from the cache, which nobody changed
        found = fastload.load_tensors("org/p", settings={"process": False})
        assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())
        found["a"].zero_()


def test_pickled_file_of_another_library_is_named(make_hub: Any, monkeypatch: pytest.MonkeyPatch):
    hub = make_hub({"org/ct2": {"model.bin": b"\x06\x00\x00\x00" + bytes(100)}})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    with pytest.raises(UnsupportedSourceError, match=r"model\.bin: no plugin reads"):
        fastload.load_tensors("org/ct2", settings={"process": False})
