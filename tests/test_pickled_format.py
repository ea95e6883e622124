"""PyTorch's own files: tensors and nothing else come out of them, and what wants to run code is refused."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import zipfile
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
    """Runs a program where it is unpickled carelessly: calls *function* with *arguments*, on one of pickle's ways."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.called = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.called


#: What is named when it is refused → how it would make the folder "owned".
EVIL = {
    r"posix\.mkdir": Evil(os.mkdir, "owned"),
    r"GLOBAL (builtins\.)?eval": Evil(eval, "__import__('os').mkdir('owned')"),
    r"GLOBAL \w+\.Popen": Evil(subprocess.Popen, ["mkdir", "owned"]),
    r"torch\.serialization\.load": Evil(torch.load, "owned", None, None),
    r"functools\.partial": functools.partial(os.mkdir, "owned"),
    r"torch\.jit": Evil(torch.jit.load, "owned"),
}


@BOTH
@pytest.mark.parametrize("named", EVIL)
@pytest.mark.parametrize("place", ["value", "key", "deep"])
def test_code_is_refused_by_name_and_never_run(
    tmp_path: Path, how: dict[str, Any], named: str, place: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    if place == "key" and "partial" in named:
        pytest.skip("cannot be pickled so")
    evil = EVIL[named]
    content = {"value": {"a": torch.ones(2), "b": evil}, "key": {evil: torch.ones(2)},
               "deep": {"state_dict": OrderedDict(a=torch.ones(2)), "hooks": [(1, {"x": evil})]}}  # fmt: skip
    with pytest.raises(FormatError, match=rf"^model\.pth: it holds more than tensors and plain values: .*{named}") as e:
        read(tmp_path, saved(content[place], how))
    assert "safetensors" in str(e.value.hint)
    assert not (tmp_path / "owned").exists()


def test_code_in_a_pickle_within_a_zip_archive_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By hand: opcodes that torch.save would not write, in a record that torch reads."""
    monkeypatch.chdir(tmp_path)
    sound = saved({"a": torch.ones(2)})
    for program in (
        b"cos\nmkdir\n(S'owned'\ntR.",
        b"\x80\x02(S'owned'\nios\nmkdir\n.",
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93.",
    ):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(buffer, "w") as new:
            for entry in old.infolist():
                new.writestr(entry, program if entry.filename.endswith("data.pkl") else old.read(entry))
        with pytest.raises(FormatError, match=r"^model\.pth: "):
            read(tmp_path, buffer.getvalue())
        with pytest.raises(FormatError, match=r"^model\.pth: "):
            read(tmp_path, b"\x80\x02" + program)
    assert not (tmp_path / "owned").exists()


@BOTH
def test_whole_modules_are_refused_without_advice_to_trust_them(tmp_path: Path, how: dict[str, Any]):
    with pytest.raises(FormatError, match="more than tensors") as caught:
        read(tmp_path, saved(torch.nn.Linear(2, 2), how))
    assert "weights_only" not in str(caught.value) and "safe_globals" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_lines_that_run_it(
    make_hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "s.pt"))
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/p": {"s.pt": (tmp_path / "s.pt").read_bytes()}}).endpoint)
    with pytest.raises(UnsupportedSourceError, match=r"^s\.pt: it is a TorchScript program") as caught:
        fastload.load_tensors("org/p", settings={"process": False})
    place: dict[str, Any] = {"fastload": fastload, "torch": torch}
    exec(str(caught.value.hint).removeprefix("for its runtime: "), place)
    assert place["path"].name == "s.pt"


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


OTHERS = {
    "model.bin": (b"\x06\0\0\0\x10\0TransformerSpec\0" + bytes(100), "a CTranslate2 model"),
    "w.pt": (bytes(257) + b"ustar" + bytes(250), "a tar archive"),
    "w.ckpt": (b"(dp0\nS'a'\np1\nI1\ns.", "a pickle of protocol 0 or 1"),
    "w.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a pointer of Git LFS"),
    "v.pt": (b"\x1f\x8b" + bytes(40), "compressed by gzip"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_file_of_somebody_else_is_refused_with_what_it_is(make_hub: Any, monkeypatch: pytest.MonkeyPatch, name: str):
    data, what = OTHERS[name]
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/p": {name: data}}).endpoint)
    with pytest.raises(
        UnsupportedSourceError, match=rf"^{name}: no plugin reads this kind of weight file; it is {what}"
    ) as e:
        fastload.load_tensors("org/p", settings={"process": False})
    assert "fastload.prefetch('org/p'" in str(e.value.hint)


# -- shards -----------------------------------------------------------------------------------------------------------


def sharded(**changes: Any) -> dict[str, bytes]:
    """Return the files of a repository with two shards and their index."""
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    table = {"a": first, "b": second, "n": second, **changes}
    return {
        "pytorch_model.bin.index.json": json.dumps({"metadata": {}, "weight_map": table}).encode(),
        first: saved({"a": WEIGHTS["a"]}), second: saved({"b": WEIGHTS["b"], "n": WEIGHTS["n"]}),
    }  # fmt: skip


def test_shards_of_an_index_come_as_one(make_hub: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/p": sharded()}).endpoint)
    found = fastload.load_tensors("org/p", settings={"process": False})
    assert list(found) == ["a", "b", "n"] and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"c": "pytorch_model-00002-of-00002.bin"},
            r"tensor 'c' should be in .*2-of-00002\.bin, but no weight file has it",
        ),
        ({"c": "pytorch_model-00003-of-00003.bin"}, r"tensor 'c' should be in .*3\.bin, which is not among the files"),
        ({"c": 3}, "not an index of weight files"),
    ],
)
def test_index_that_promises_too_much_is_a_format_error(
    make_hub: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
):
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/p": sharded(**change)}).endpoint)
    with pytest.raises(FormatError, match=rf"^pytorch_model\.bin\.index\.json: {reason}"):
        fastload.load_tensors("org/p", settings={"process": False})
