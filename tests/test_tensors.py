"""A stream gives tensors as their bytes land: right ones, in order, uncopied, or an error that says what is wrong."""

from __future__ import annotations

import asyncio
import gc
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from arrival import Arrival, demanded  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from fastload import plugins  # noqa: E402
from fastload.device import DTYPES, torch_dtype  # noqa: E402
from fastload.errors import (  # noqa: E402
    DeviceError,
    DownloadError,
    FastloadError,
    FormatError,
    NotFoundError,
    PluginError,
    SettingsError,
    UnsupportedSourceError,
)
from fastload.settings import Settings  # noqa: E402
from fastload.tensors import AsyncTensorStream, TensorStream  # noqa: E402
from fastload.types import ByteRange, NeedBytes, TensorInfo  # noqa: E402
from fastload.weightfile import check_tensors  # noqa: E402

Write = Callable[..., Path]
Start = Callable[..., Arrival]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write files of a model: name → tensors, text or bytes; return the folder."""

    def write(**files: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, Mapping) and all(isinstance(v, torch.Tensor) for v in content.values()):
                save_file(dict(content), path, metadata={"format": "pt", "of": path.name})
            else:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return folder

    return write


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Let a folder arrive."""
    made: list[Arrival] = []

    def start(folder: Path, **options: Any) -> Arrival:
        made.append(Arrival(folder, tmp_path / f"cache{len(made)}", **options))
        return made[-1]

    yield start
    for arrival in made:
        arrival.close()


@pytest.fixture
def reader() -> Iterator[ThreadPoolExecutor]:
    """Threads in which a test blocks."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def stream_of(arrival: Arrival, **options: Any) -> TensorStream:
    """Return a stream over *arrival* with the built-in plugins."""
    return TensorStream(arrival.transfer, plugins.manager(Settings(plugins=())), **options)


def random_tensors(*names: str, rows: int = 64, columns: int = 100) -> dict[str, Any]:
    """Return tensors of 25.6 kB: more than six of the blocks that arrive."""
    return {name: torch.rand(rows, columns) for name in names}


def test_tensor_waits_for_its_own_bytes_only(write: Write, start: Start, reader: ThreadPoolExecutor) -> None:
    tensors = random_tensors(*"abcdefgh")
    arrival = start(write(m_safetensors=tensors))
    stream = stream_of(arrival)
    arrival.land_head("m.safetensors")  # 64 KiB: a, b, and part of c
    assert torch.equal(stream.get_tensor("a"), tensors["a"])
    waiting = reader.submit(stream.get_tensor, "g")
    span = stream.info("g").span
    assert demanded(arrival, "m.safetensors") == span.start
    assert not waiting.done()
    arrival.land("m.safetensors", span.start, span.stop)
    assert torch.equal(waiting.result(), tensors["g"])
    assert not arrival.journals["m.safetensors"].has(stream.info("e").span)


def test_all_tensors_are_those_of_the_file(write: Write, start: Start) -> None:
    folder = write(m_safetensors=random_tensors(*"abc"))
    arrival = start(folder)
    arrival.finish()
    assert {n: t.tolist() for n, t in stream_of(arrival)} == {
        n: t.tolist() for n, t in load_file(folder / "m.safetensors").items()
    }


def test_order_is_weight_files_then_offsets(write: Write, start: Start) -> None:
    one = {"small": torch.zeros(2, dtype=torch.int8), "big": torch.zeros(2, dtype=torch.float64)}
    arrival = start(
        write(x_safetensors=one, a_safetensors=random_tensors("z")), weights=["x.safetensors", "a.safetensors"]
    )
    arrival.finish()
    stream = stream_of(arrival)
    assert stream.files() == ("x.safetensors", "a.safetensors")
    assert stream.keys() == [name for name, _ in stream] == ["big", "small", "z"]
    assert stream.metadata() == {"format": "pt", "of": "x.safetensors"}


def test_iteration_does_not_wait_for_later_files(write: Write, start: Start) -> None:
    arrival = start(write(a_safetensors=random_tensors("a"), b_safetensors=random_tensors("b")), announce=False)
    arrival.announce("a.safetensors")
    arrival.finish("a.safetensors")
    assert next(iter(stream_of(arrival)))[0] == "a"


def test_slice_waits_for_the_rows_it_needs(write: Write, start: Start, reader: ThreadPoolExecutor) -> None:
    tensors = random_tensors("a", rows=1000)  # 400 kB
    arrival = start(write(m_safetensors=tensors))
    arrival.land_head("m.safetensors")
    part = stream_of(arrival).get_slice("a")
    assert (part.get_shape(), part.get_dtype()) == ([1000, 100], "F32")
    assert torch.equal(part[3:9], tensors["a"][3:9])
    assert torch.equal(part[5], tensors["a"][5])
    assert torch.equal(part[2:90:7, ::2], tensors["a"][2:90:7, ::2])
    assert part[7:7].shape == (0, 100)
    waiting = reader.submit(lambda: part[-10:])
    assert demanded(arrival, "m.safetensors") > 300_000
    assert not waiting.done()
    arrival.land("m.safetensors", 390_000)
    assert torch.equal(waiting.result(), tensors["a"][-10:])


@pytest.mark.parametrize(
    "index",
    [..., 0, -1, 3, slice(1, 3), slice(None, None, 2), slice(3, 1), slice(-2, None), (slice(None), 1), (0, 0), None,
     (..., 0), True, (1, ..., 0), (slice(1, 3), ..., 0), torch.tensor([0, 2]), (slice(0, 2), [0, 1])],
    ids=str,
)  # fmt: skip
def test_every_index_gives_what_the_real_slice_gives(write: Write, start: Start, index: Any) -> None:
    from safetensors import safe_open

    folder = write(m_safetensors={"a": torch.arange(24.0).reshape(4, 3, 2)})
    arrival = start(folder)
    arrival.finish()
    with safe_open(folder / "m.safetensors", "pt") as real:
        expected = real.get_slice("a")[index]
    found = stream_of(arrival).get_slice("a")[index]
    assert torch.equal(found, expected)
    for attribute in ("stride", "storage_offset", "is_contiguous"):
        assert getattr(found, attribute)() == getattr(expected, attribute)()
    assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


@pytest.mark.parametrize("index", [10, -5, (0, 0, 0, 0), slice(None, None, -1), "x", 1.5])
def test_wrong_index_raises_what_the_real_slice_raises(write: Write, start: Start, index: Any) -> None:
    from safetensors import safe_open

    folder = write(m_safetensors={"a": torch.arange(24.0).reshape(4, 3, 2)})
    arrival = start(folder)
    arrival.finish()
    with safe_open(folder / "m.safetensors", "pt") as real, pytest.raises(Exception) as expected:
        real.get_slice("a")[index]
    with pytest.raises(expected.type):
        stream_of(arrival).get_slice("a")[index]


def test_cpu_tensors_are_views_with_a_storage_of_their_own(write: Write, start: Start) -> None:
    tensors = random_tensors("a", "b")
    arrival = start(write(m_safetensors=tensors))
    arrival.finish()
    stream = stream_of(arrival)
    a, again = stream.get_tensor("a"), stream.get_tensor("a")
    assert a.untyped_storage().nbytes() == a.nbytes
    assert a.data_ptr() == again.data_ptr()
    a.fill_(7)
    assert torch.equal(stream.get_tensor("b"), tensors["b"])
    assert torch.equal(load_file(arrival.snapshot / "m.safetensors")["a"], tensors["a"])  # the cache is not touched


def test_tensors_live_on_after_the_stream_and_its_transfer(write: Write, start: Start) -> None:
    tensors = random_tensors("a")
    arrival = start(write(m_safetensors=tensors))
    arrival.finish()
    stream = stream_of(arrival)
    a = stream.get_tensor("a")
    stream.close()
    arrival.close()
    gc.collect()
    assert torch.equal(a, tensors["a"])
    with pytest.raises(FastloadError, match="the stream is closed"):
        stream.get_tensor("a")


def test_every_dtype_of_the_format_arrives_as_torch_saved_it(write: Write, start: Start) -> None:
    tensors = {}
    for code in DTYPES:
        if code.startswith("F6"):
            continue
        raw = torch.arange(32, dtype=torch.uint8)
        tensors[code] = (raw % 2 if code == "BOOL" else raw).view(torch_dtype(code)).reshape(2, -1)
    arrival = start(write(m_safetensors=tensors))
    arrival.finish()
    for name, tensor in stream_of(arrival):
        assert tensor.dtype == tensors[name].dtype, name
        assert tensor.shape == tensors[name].shape, name
        assert tensor.view(torch.uint8).tolist() == tensors[name].view(torch.uint8).tolist(), name


def test_dtype_without_a_torch_type_is_named(write: Write, start: Start) -> None:
    arrival = start(write(m_safetensors=raw_file({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, 3)))
    arrival.finish()
    with pytest.raises(FormatError, match="no type for elements of F6_E2M3"):
        stream_of(arrival).get_tensor("a")


def test_empty_tensors_and_scalars_arrive(write: Write, start: Start) -> None:
    tensors = {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "flag": torch.tensor(True)}
    arrival = start(write(m_safetensors=tensors))
    arrival.finish()
    found = dict(stream_of(arrival))
    assert {n: (t.shape, t.dtype, t.tolist()) for n, t in found.items()} == {
        n: (t.shape, t.dtype, t.tolist()) for n, t in tensors.items()
    }


def test_data_at_odd_addresses_is_read_right(write: Write, start: Start) -> None:
    fields = {"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
              "a": {"dtype": "F64", "shape": [2], "data_offsets": [3, 19]}}  # fmt: skip
    arrival = start(write(m_safetensors=raw_file(fields, b"abc" + struct.pack("<2d", 1.5, -2.0))))
    arrival.finish()
    assert stream_of(arrival).get_tensor("a").tolist() == [1.5, -2.0]


def test_dtype_casts_floating_tensors_only(write: Write, start: Start) -> None:
    arrival = start(write(m_safetensors={"a": torch.rand(3, dtype=torch.float16), "i": torch.arange(3)}))
    arrival.finish()
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        found = dict(stream_of(arrival, dtype=dtype))
        assert (found["a"].dtype, found["i"].dtype) == (torch.bfloat16, torch.int64)
    with pytest.raises(SettingsError, match="dtype='half_float'"):
        stream_of(arrival, dtype="half_float").get_tensor("a")


def test_device_is_where_tensors_go(write: Write, start: Start) -> None:
    arrival = start(write(m_safetensors=random_tensors("a")))
    arrival.finish()
    assert stream_of(arrival, device="meta").get_tensor("a").device.type == "meta"
    with pytest.raises(DeviceError, match="device='warp'"):
        stream_of(arrival, device="warp").get_tensor("a")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device_is_an_error_of_ours(write: Write, start: Start) -> None:
    arrival = start(write(m_safetensors=random_tensors("a")))
    arrival.finish()
    with pytest.raises(DeviceError, match="cannot copy 25600 bytes to cuda"):
        stream_of(arrival, device="cuda").get_tensor("a")


def test_missing_torch_says_what_to_install(write: Write, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    arrival = start(write(m_safetensors=random_tensors("a")))
    arrival.finish()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(PluginError, match="tensors need torch") as caught:
        stream_of(arrival).get_tensor("a")
    assert caught.value.hint == 'pip install "fastload-weights[torch]"'


def test_failed_transfer_wakes_every_waiter_with_its_error(
    write: Write, start: Start, reader: ThreadPoolExecutor
) -> None:
    arrival = start(write(a_safetensors=random_tensors(*"abcdefgh"), z_safetensors=random_tensors(*"z")))
    arrival.land_head("a.safetensors")
    stream = stream_of(arrival)
    waiting = [
        reader.submit(stream.get_tensor, "h"),
        reader.submit(stream.get_tensor, "z"),
        reader.submit(stream.keys),
        reader.submit(list, stream),
        reader.submit(stream.get_slice("g").__getitem__, 5),
    ]
    demanded(arrival, "a.safetensors")
    demanded(arrival, "z.safetensors")
    arrival.fail(DownloadError("the cable is cut", file="a.safetensors"))
    for future in waiting:
        with pytest.raises(DownloadError, match="the cable is cut"):
            future.result()


def test_unknown_tensor_names_those_that_resemble_it(write: Write, start: Start) -> None:
    arrival = start(write(m_safetensors=random_tensors("layer.0.weight", "layer.1.weight")))
    arrival.finish()
    for call in (stream_of(arrival).get_tensor, stream_of(arrival).get_slice, stream_of(arrival).info):
        with pytest.raises(NotFoundError, match=r"no weight file has a tensor 'layer\.0\.weigth'") as caught:
            call("layer.0.weigth")
        assert "'layer.0.weight'" in str(caught.value.hint)


def raw_file(fields: Any, data: bytes | int) -> bytes:
    """Return a safetensors file with any header."""
    header = json.dumps(fields).encode()
    return struct.pack("<Q", len(header)) + header + (bytes(data) if isinstance(data, int) else data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "claims 8 bytes, the file has 0"),
        (b"\0\0\0", "claims 8 bytes, the file has 3"),
        (struct.pack("<Q", 500) + b"{}", "claims 508 bytes, the file has 10"),
        (raw_file({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, 8), "outside of the file"),
        (raw_file({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, 10), "by its head it should have"),
        (raw_file({}, 3), "has 13 bytes, by its head it should have 10"),
        (b"<!DOCTYPE html><html>Not a model</html>", "not a sound safetensors file"),
    ],
)
def test_file_that_does_not_fit_its_header_is_named(write: Write, start: Start, content: bytes, message: str) -> None:
    arrival = start(write(m_safetensors=content))
    arrival.finish()
    with pytest.raises(FormatError, match=r"^m\.safetensors: .*" + message):
        stream_of(arrival).keys()


def test_tensor_name_in_two_files_is_an_error(write: Write, start: Start) -> None:
    arrival = start(write(a_safetensors=random_tensors("a", "x"), b_safetensors=random_tensors("x")))
    arrival.finish()
    for call in (stream_of(arrival).keys, lambda: list(stream_of(arrival)), lambda: stream_of(arrival).get_tensor("y")):
        with pytest.raises(FormatError, match=r"b\.safetensors: tensor 'x' is in a\.safetensors too"):
            call()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "a.safetensors", "ghost": "a.safetensors"}, r"tensor 'ghost' should be in a\.safetensors, but no"),
        ({"a": "a.safetensors", "b": "b.safetensors"}, r"tensor 'b' should be in b\.safetensors, which is not among"),
    ],
)
def test_index_that_names_what_is_not_there_is_an_error(
    write: Write, start: Start, table: dict[str, str], message: str
) -> None:
    folder = write(a_safetensors=random_tensors("a"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    arrival = start(folder)
    arrival.finish()
    with pytest.raises(FormatError, match=r"^model\.safetensors\.index\.json: " + message):
        stream_of(arrival).keys()
    with pytest.raises(FormatError, match=message):
        list(stream_of(arrival))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_damaged_index_is_named(write: Write, start: Start, content: str) -> None:
    folder = write(a_safetensors=random_tensors("a"))
    (folder / "model.safetensors.index.json").write_text(content)
    arrival = start(folder)
    arrival.finish()
    with pytest.raises(FormatError, match=r"^model\.safetensors\.index\.json: not an index"):
        stream_of(arrival).keys()


def test_index_of_a_variant_that_was_not_chosen_is_ignored(write: Write, start: Start) -> None:
    folder = write(a_safetensors=random_tensors("a"))
    (folder / "model.fp16.safetensors.index.json").write_text('{"weight_map": {"a": "model.fp16-1.safetensors"}}')
    arrival = start(folder)
    arrival.finish()
    assert stream_of(arrival).keys() == ["a"]


def test_file_that_no_plugin_reads_is_named(write: Write, start: Start) -> None:
    arrival = start(write(m_weights=b"whatever"), weights=["m.weights"])
    arrival.finish()
    with pytest.raises(UnsupportedSourceError, match=r"^m\.weights: no plugin"):
        stream_of(arrival).keys()


U8 = ("U8", (4,))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", *U8, 0, 4), ("a", *U8, 4, 8)], "'a' occurs twice"),
        ([("a", *U8, 0, 4), ("b", *U8, 2, 6)], "'b' .* overlaps 'a'"),
        ([("a", *U8, 98, 102)], "'a' has bytes 98-101, outside"),
        ([("a", "Q7", (4,), 0, 4)], "'a' has the unknown dtype 'Q7'"),
        ([("a", "F32", (4,), 0, 4)], r"'a' \(F32, shape \[4\]\) needs 16 bytes, the file has 4"),
    ],
)
def test_any_format_is_held_to_what_holds_for_all(tensors: list[Any], message: str) -> None:
    infos = [TensorInfo(name, dtype, shape, ByteRange(a, b)) for name, dtype, shape, a, b in tensors]
    with pytest.raises(FormatError, match=f"^w.bin: tensor {message}"):
        check_tensors("w.bin", 100, infos)


def test_format_that_never_has_enough_is_an_error_not_a_loop(write: Write, start: Start) -> None:
    class Greedy:
        name = "greedy"

        def parse(self, head: bytes) -> NeedBytes:
            return NeedBytes(len(head))

    from fastload.hookspecs import hookimpl

    class Plugin:
        @hookimpl
        def fastload_format(self) -> Greedy:
            return Greedy()

    import pluggy

    from fastload import hookspecs

    pm = pluggy.PluginManager("fastload")
    pm.add_hookspecs(hookspecs)
    pm.register(Plugin())
    arrival = start(write(m_weights=b"whatever"), weights=["m.weights"])
    arrival.finish()
    with pytest.raises(PluginError, match="greedy asks again"):
        TensorStream(arrival.transfer, pm).keys()


async def test_async_stream_gives_what_the_sync_one_gives(write: Write, start: Start) -> None:
    tensors = random_tensors("a", "b")
    arrival = start(write(m_safetensors=tensors))
    sync, stream = stream_of(arrival), AsyncTensorStream(stream_of(arrival))
    with ThreadPoolExecutor(1) as other:
        other.submit(arrival.finish)
        found = {name: tensor async for name, tensor in stream}
        assert list(found) == await stream.keys() == await asyncio.to_thread(sync.keys)
        for name in found:
            assert torch.equal(found[name], sync.get_tensor(name))
            assert torch.equal(await stream.get_tensor(name), sync.get_tensor(name))
        part = await stream.get_slice("b")
        assert (part.get_shape(), part.get_dtype()) == ([64, 100], "F32")
        assert torch.equal(await part[2:4], tensors["b"][2:4])
        assert await stream.info("a") == sync.info("a")
        assert await stream.metadata() == sync.metadata()
        assert await stream.files() == sync.files()
        with pytest.raises(NotFoundError):
            await stream.get_tensor("c")
    stream.close()


def test_async_stream_has_every_name_of_the_sync_one() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert names(TensorStream) - names(AsyncTensorStream) <= {
        "served", "check_index", "check_shards", "collect", "settle",
    }  # fmt: skip
