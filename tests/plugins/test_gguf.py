"""GGUF files come as the gguf package reads them, while they arrive, and what breaks the format's rules is refused."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

from arrival import Arrival  # noqa: E402
from fastload_gguf import _BLOCKS, _PLAIN, fastload_build_model, fastload_format  # noqa: E402
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: E402

import fastload  # noqa: E402
from fastload import plugins  # noqa: E402
from fastload.errors import FormatError, IntegrityError, PluginError, SettingsError, UnsupportedSourceError  # noqa: E402
from fastload.settings import Settings  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402
from fastload.testing import Fault  # noqa: E402
from fastload.types import NeedBytes  # noqa: E402

QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]  # those that the package can also write
NUMBERS = np.random.default_rng(0).standard_normal((24, 512)).astype(np.float32)


def write(path: Path, *, vocabulary: int = 40, alignment: int | None = None) -> Path:
    """Write a file with a tensor of every type that the gguf package can write."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("llama.flag", True)
    writer.add_token_list([f"word{n}" for n in range(vocabulary)])
    writer.add_token_scores([float(n) for n in range(vocabulary)])
    writer.add_array("llama.shape", [1, 2, 3])
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_tensor("f32", NUMBERS)
    writer.add_tensor("f16", NUMBERS.astype(np.float16))
    writer.add_tensor("f64", NUMBERS.astype(np.float64))
    writer.add_tensor("cube", NUMBERS.reshape(2, 12, 512))
    for kind in (np.int8, np.int16, np.int32, np.int64):
        writer.add_tensor(np.dtype(kind).name, np.arange(-8, 8, dtype=kind))
    for name in ("BF16", *QUANTISED):
        kind = GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(NUMBERS, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def arrival(tmp_path: Path) -> Iterator[Arrival]:
    """A repository with one GGUF file of which nothing has landed."""
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo" / "m.gguf", vocabulary=5_000)  # its header is longer than the head
    made = Arrival(tmp_path / "repo", tmp_path / "cache", weights=["m.gguf"])
    yield made
    made.close()


def stream_of(arrival: Arrival, **options: Any) -> TensorStream:
    import fastload_gguf

    pm = plugins.manager(Settings(plugins=()))
    if not pm.is_registered(fastload_gguf):
        pm.register(fastload_gguf)
    return TensorStream(arrival.transfer, pm, **options)


def build(arrival: Arrival, framework: str | None = "gguf", **options: Any) -> Any:
    stream = stream_of(arrival, device=options.get("device", "cpu"), dtype=options.get("dtype"))
    snapshot = arrival.transfer.wait_manifest()
    options = {"device": "cpu", "dtype": None, **options}
    return fastload_build_model(framework=framework, snapshot=snapshot, stream=stream, options=options)


def reference(arrival: Arrival) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(arrival.folder / "m.gguf").tensors}


def test_types_are_those_of_the_package():
    sizes = {
        int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES
    }
    assert {n: s for n, s in sizes.items() if n not in _PLAIN} == _BLOCKS
    assert {n: s[0] for n, s in sizes.items() if n in _PLAIN} == _PLAIN


def test_tensors_are_those_that_the_package_reads(arrival: Arrival):
    arrival.finish()
    stream = stream_of(arrival)
    expected = reference(arrival)
    assert stream.keys() == list(expected)
    for name, tensor in stream:
        data = expected[name].data
        if name == "BF16":
            assert tensor.dtype == torch.bfloat16
            data, tensor = data.reshape(24, 1024), tensor.view(torch.uint8)
        assert tuple(tensor.shape) == data.shape
        assert np.array_equal(tensor.numpy(), data), name


def test_tensor_is_there_before_the_rest_of_the_file(arrival: Arrival):
    end = reference(arrival)["f32"].data_offset + NUMBERS.nbytes
    assert end < arrival.transfer.files["m.gguf"].size / 2
    arrival.land("m.gguf", 0, max(end, 128 * 1024))
    assert np.array_equal(stream_of(arrival).get_tensor("f32").numpy(), NUMBERS)


def test_fields_are_metadata(arrival: Arrival):
    arrival.finish()
    found = stream_of(arrival).metadata()
    assert found["general.architecture"] == "llama" and found["llama.context_length"] == "128"
    assert found["llama.flag"] == "True" and json.loads(found["llama.shape"]) == [1, 2, 3]
    assert found["tensor.Q4_0.type"] == "Q4_0" and "tensor.f32.type" not in found
    assert "tokenizer.ggml.tokens" not in found  # a whole vocabulary


def test_short_lists_of_texts_are_metadata(tmp_path: Path):
    data = write(tmp_path / "m.gguf", vocabulary=3).read_bytes()
    found: Any = fastload_format(filename="m.gguf", head=data)
    found.parse(data)
    assert json.loads(found.metadata(data)["tokenizer.ggml.tokens"]) == ["word0", "word1", "word2"]


@pytest.mark.parametrize("dtype", [None, torch.float16, "bfloat16"])
def test_dequantised_tensors_are_those_of_the_package(arrival: Arrival, dtype: Any):
    arrival.finish()
    found = build(arrival, dtype=dtype)
    wanted = {None: torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    for name in QUANTISED:
        kind = GGMLQuantizationType[name]
        numbers = torch.from_numpy(gguf.quants.dequantize(reference(arrival)[name].data, kind))
        assert found[name].dtype == wanted and torch.equal(found[name], numbers.to(wanted)), name
    assert torch.equal(found["f32"], torch.from_numpy(NUMBERS).to(wanted))
    assert found["int8"].dtype == torch.int8


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_head_of_any_length_is_enough_or_asks_for_more(tmp_path: Path, alignment: int | None):
    data = write(tmp_path / "m.gguf", alignment=alignment).read_bytes()
    found: Any = fastload_format(filename="m.gguf", head=data)
    whole = found.parse(data)
    header = min(t.span.start for t in whole)
    for count in range(4, header + 1, 7):
        answer = found.parse(data[:count])
        assert answer == whole or (isinstance(answer, NeedBytes) and count < answer.count <= header)


def test_load_reads_a_hubs_file(make_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write(tmp_path / "m.gguf").read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/g": {"m.gguf": data}}).endpoint)
    raw = fastload.load_tensors("org/g", settings={"process": False})
    assert raw["Q8_0"].dtype == torch.uint8
    numbers = fastload.load("org/g", framework="gguf", settings={"process": False})
    assert numbers["Q8_0"].dtype == torch.float32
    with pytest.raises(UnsupportedSourceError, match="no plugin builds org/g"):
        fastload.load("org/g", settings={"process": False})


def write_llama(path: Path) -> bytes:
    """Write a Llama of one layer with random weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    layer = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    layer |= {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "output": (64, 32)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in layer.items()}}.items():
        numbers = np.random.default_rng(len(name)).standard_normal(shape)
        writer.add_tensor(f"{name}.weight", numbers.astype(np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_transformers_reads_the_gguf_file_that_it_is_told(
    make_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers")
    from compare import diff_models

    config = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    files = {"config.json": config, "m.gguf": write_llama(tmp_path / "m.gguf"), "other.gguf": b"GGUF"}
    hub = make_hub({"org/g": files})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    model = fastload.load("org/g", gguf_file="m.gguf", settings={"process": False})
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        "org/g", gguf_file="m.gguf", cache_dir=tmp_path / "hf" / "hub", local_files_only=True
    )
    assert diff_models(model, plain) == []
    assert not hub.bytes_sent("other.gguf")


def test_unchanged_transformers_code_gets_the_whole_gguf_file(
    make_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers")
    from accelerating import point_to
    from compare import diff_models

    config = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    files = {"config.json": config, "m.gguf": write_llama(tmp_path / "m.gguf"), "other.gguf": b"GGUF"}
    hub = make_hub({"org/g": files})
    point_to(hub, monkeypatch)
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load("org/g", gguf_file="m.gguf", cache_dir=tmp_path / "plain")
    hub.clear()
    with fastload.accelerate():
        ours = load("org/g", gguf_file="m.gguf", cache_dir=tmp_path / "ours")
    assert diff_models(plain, ours) == []
    assert [r.status for r in hub.requests if r.file == "m.gguf" and r.method == "GET"] == [
        302,
        206,
    ]  # a range: it was us
    assert not hub.bytes_sent("other.gguf")


def test_a_gguf_file_that_is_always_wrong_is_refused_by_unchanged_code(
    make_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers")
    from accelerating import point_to

    config = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    hub = make_hub({"org/g": {"config.json": config, "m.gguf": write_llama(tmp_path / "m.gguf")}})
    point_to(hub, monkeypatch)
    hub.script(Fault("flip", path="m.gguf", times=None, offset=20_000))
    with pytest.raises(IntegrityError, match=r"m\.gguf"), fastload.accelerate():
        transformers.AutoModelForCausalLM.from_pretrained("org/g", gguf_file="m.gguf", cache_dir=tmp_path / "ours")
    assert not list(tmp_path.rglob("snapshots/*/m.gguf"))


# -- what is wrong ----------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*parts: bytes, version: int = 3, tensors: int = 0, fields: int = 0, size: int = 4096) -> bytes:
    data = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return data + bytes(max(0, size - len(data)))


ALIGNMENT = "general.alignment"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (file(version=1), "version 1 is unknown"),
        (file(version=4), "version 4 is unknown"),
        (file(version=3 << 24), "big-endian"),
        (file(tensors=2**60), "its head claims"),
        (file(fields=2**60), "its head claims"),
        (file(field("x", 8, struct.pack("<Q", 2**62)), fields=1), "its head claims"),
        (file(field("x", 9, struct.pack("<IQ", 8, 2**60)), fields=1), "its head claims"),
        (file(field("x", 99, b""), fields=1), "unknown type 99"),
        (file(field("x", 9, struct.pack("<IQ", 9, 1) * 9), fields=1), "nested too deeply"),
        (file(field("x", 4, b"1234"), field("x", 4, b"1234"), fields=2), "'x' occurs twice"),
        (file(struct.pack("<Q", 2) + b"\xff\xfe", fields=1), "not UTF-8"),
        (file(field(ALIGNMENT, 4, struct.pack("<I", 0)), fields=1), "no power of two"),
        (file(field(ALIGNMENT, 4, struct.pack("<I", 48)), fields=1), "no power of two"),
        (file(field(ALIGNMENT, 8, text("x")), fields=1), "no power of two"),
        (file(tensor("a", (1,) * 5), tensors=1), "5 dimensions"),
        (file(tensor("a", kind=4), tensors=1), "unknown type 4"),
        (file(tensor("a", (33,), kind=2), tensors=1), "no rows of whole blocks"),
        (file(tensor("a", (), kind=2), tensors=1), "no rows of whole blocks"),
        (file(tensor("a", offset=8), tensors=1), "no multiple of 32"),
        (file(tensor("a"), tensor("a", offset=128), tensors=2), "'a' occurs twice"),
        (file(tensor("a"), tensor("b", offset=64), tensors=2), "overlaps"),
        (file(tensor("a", offset=4096), tensors=1), "outside of the file"),
        (file(tensor("a", (2**40, 2**40)), tensors=1), "outside of the file"),
    ],
)
def test_unsound_file_is_a_format_error_that_names_it(tmp_path: Path, data: bytes, reason: str):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "bad.gguf").write_bytes(data)
    arrival = Arrival(tmp_path / "repo", tmp_path / "cache", weights=["bad.gguf"])
    arrival.finish()
    try:
        with pytest.raises(FormatError, match=rf"^bad\.gguf: .*{reason}"):
            stream_of(arrival).keys()
    finally:
        arrival.close()


def test_other_files_are_declined():
    assert fastload_format(filename="m.gguf", head=b"GGML") is None
    assert fastload_format(filename="m.gguf", head=b"") is None


def test_other_frameworks_are_declined_and_meaningless_options_refused(arrival: Arrival):
    arrival.finish()
    assert build(arrival, framework=None) is None
    with pytest.raises(SettingsError, match="variant= means nothing"):
        build(arrival, variant="fp16")


def test_missing_package_says_what_to_install(arrival: Arrival, monkeypatch: pytest.MonkeyPatch):
    arrival.finish()
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(PluginError, match="needs the gguf package") as caught:
        build(arrival)
    assert caught.value.hint == 'pip install "fastload-weights[gguf]"'
