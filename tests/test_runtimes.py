"""Weights for runtimes that want a file: verified paths, and a refusal that can be copied into a program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.errors import IntegrityError, UnsupportedSourceError
from fastload.runtimes import hint_for, what_is
from fastload.testing import Fault, Hub

MakeHub = Callable[..., Hub]


def lines_of(error: UnsupportedSourceError) -> str:
    """Return the lines that the hint of *error* gives."""
    lead, _, lines = str(error.hint).partition(": ")
    assert lead == "for its runtime"
    return lines


@pytest.fixture
def serve(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """Start a hub with ``org/m``, which loads are sent to."""

    def start(content: Any) -> Hub:
        hub = make_hub({"org/m": content}, lfs=lambda path, size: not path.endswith(".json"))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        return hub

    return start


# -- what is said ------------------------------------------------------------------------------------------------------

FILES = {
    "model.onnx": "onnxruntime.InferenceSession(path)", "a/b/model.jit": "torch.jit.load(path)",
    "model.tflite": "Interpreter(model_path=str(path))", "weights.h5": "h5py.File(path)",
    "flax_model.msgpack": "msgpack_restore(path.read_bytes())", "arrays.npz": "numpy.load(path)",
    "model.mlmodel": "MLModel(str(path))", "saved_model.pb": 'files="saved_model.pb"', "rust_model.ot": 'files="rust_model.ot"',
    "model.onnx_data": 'files="model.onnx_data"', "model.keras": "load_model(path)", "model.flashpack": "str(path)",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_lines_of_the_hint_are_python(name: str) -> None:
    lines = hint_for("org/m", name).partition(": ")[2]
    compile(lines, "hint", "exec")
    assert FILES[name].replace('"', "'") in lines and f"path = fastload.prefetch('org/m', files='{name}" in lines


def test_ctranslate2_gets_its_folder() -> None:
    assert "folder = fastload.prefetch('org/m').path; " in hint_for("org/m", "model.bin", "a CTranslate2 model")
    assert "folder = fastload.prefetch('org/m').path / 'ct2'" in hint_for(
        "org/m", "ct2/model.bin", "a CTranslate2 model"
    )


@pytest.mark.parametrize(
    ("head", "what"),
    [(b"\x89HDF\r\n\x1a\n", "an HDF5 file"), (b"\x93NUMPY\1\0", "an array of NumPy"), (b"\x1c\0\0\0TFL3", "a LiteRT model"),
     (b"lmgg\1\0\0\0", "a GGML file, older than GGUF"), (b"<!DOCTYPE html>", "a web page"), (b"PK\3\4", "a zip archive"),
     (b"\x80\x04\x95", "a pickle of protocol 4"), (b"", "empty"), (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
     (b"\6\0\0\0\x0c\0WhisperSpec\0", "a CTranslate2 model"), (bytes(64), None), (b"\x80", None), (b"\6\0\0\0\3\0ab\0", None)],
)  # fmt: skip
def test_head_of_a_file_tells_what_it_is(head: bytes, what: str | None) -> None:
    assert what_is(head) == what


@pytest.mark.parametrize("call", ["load", "load_tensors"])
@pytest.mark.parametrize("name", FILES)
def test_refusal_gives_lines_that_fetch_the_verified_file(
    serve: Any, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    pytest.importorskip("torch")
    if name.endswith((".flashpack", ".keras")):
        pytest.skip("a file of a kind that is nobody's: it travels, and is refused by its head")
    serve({name: b"\xff" * 100, "config.json": b"{}"})
    with pytest.raises(UnsupportedSourceError, match=f"there is {name} for other runtimes") as caught:
        getattr(fastload, call)("org/m", settings={"process": False})
    fetch = lines_of(caught.value).partition("; ")[0]
    place: dict[str, Any] = {"fastload": fastload}
    exec(fetch, place)
    assert place["path"].read_bytes() == b"\xff" * 100 and str(place["path"]).endswith(name)


def test_file_that_was_chosen_is_refused_by_name(serve: Any) -> None:
    pytest.importorskip("torch")
    serve({"model.onnx": b"\x08\x08", "model.onnx_data": bytes(10), "config.json": b"{}"})
    with pytest.raises(UnsupportedSourceError, match=r"^model\.onnx: no plugin reads this kind of weight file"):
        fastload.load_tensors("org/m", files="*.onnx", settings={"process": False})


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("*.onnx*", {"onnx/model.onnx", "onnx/model.onnx_data", "small.onnx"}),
        ("onnx/", {"onnx/model.onnx", "onnx/model.onnx_data"}),
        (["*.tflite", "*.json"], {"m.tflite", "config.json"}),
        ("flax_model.msgpack", {"flax_model.msgpack"}),
        ("*.h5", {"tf.h5"}),
    ],
)
def test_patterns_choose_files_for_a_runtime(serve: Any, patterns: Any, expected: set[str]) -> None:
    names = [
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "small.onnx",
        "m.tflite",
        "flax_model.msgpack",
        "tf.h5",
        "m.jit",
    ]
    hub = serve({**{name: name.encode() for name in names}, "config.json": b"{}"})
    snapshot = fastload.prefetch("org/m", files=patterns)
    assert set(snapshot.files) == expected == {r.file for r in hub.requests if r.file is not None}
    assert all((snapshot.path / name).is_file() for name in expected)


def test_path_is_never_given_for_wrong_bytes(serve: Any, tmp_path: Path) -> None:
    hub = serve({"model.onnx": bytes(1000)})
    hub.script(Fault("flip", path="model.onnx", offset=500))
    with pytest.raises(IntegrityError):
        fastload.prefetch("org/m", files="*.onnx")
    assert not list((tmp_path / "hf").rglob("model.onnx"))


def test_prefetch_for_a_runtime_needs_no_torch(serve: Any) -> None:
    serve({"model.onnx": bytes(1000)})
    program = (
        "import fastload, sys; print(fastload.prefetch('org/m', files='*.onnx').path.is_dir(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


# -- the runtimes themselves -------------------------------------------------------------------------------------------


def test_onnxruntime_runs_the_verified_file(serve: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    np = pytest.importorskip("numpy")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype("f4")
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", 1, [1, 64])], [value("y", 1, [1, 64])], [onnx.numpy_helper.from_array(weight, "w")]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "out").mkdir()
    onnx.save(
        model, tmp_path / "out" / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    serve(tmp_path / "out")
    with pytest.raises(UnsupportedSourceError) as caught:
        fastload.load("org/m", settings={"process": False})
    place: dict[str, Any] = {"fastload": fastload, "onnxruntime": onnxruntime}
    *lines, last = lines_of(caught.value).split("; ")
    exec("; ".join(lines), place)
    x = np.ones((1, 64), "f4")
    [found] = eval(last, place).run(None, {"x": x})
    plain = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"x": x})[0]
    assert np.array_equal(found, plain)


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_runs_from_the_verified_file(serve: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 4)
    torch.jit.script(module).save(str(tmp_path / "model.jit"))
    serve({"model.jit": (tmp_path / "model.jit").read_bytes()})
    with pytest.raises(UnsupportedSourceError) as caught:
        fastload.load("org/m", settings={"process": False})
    place: dict[str, Any] = {"fastload": fastload, "torch": torch}
    *lines, last = lines_of(caught.value).split("; ")
    exec("; ".join(lines), place)
    assert torch.equal(eval(last, place)(torch.ones(1, 8)), module(torch.ones(1, 8)))


def test_ctranslate2_runs_from_the_verified_folder(serve: Any, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<|endoftext|>", *(f"w{n}" for n in range(60))]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, "w0")),
        bos_token=words[0], eos_token=words[0], unk_token=words[0],
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=len(words), bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "gpt2")).convert(str(tmp_path / "ct2"))
    serve(tmp_path / "ct2")
    with pytest.raises(UnsupportedSourceError, match=r"^model\.bin: .* a CTranslate2 model") as caught:
        fastload.load_tensors("org/m", settings={"process": False})
    place: dict[str, Any] = {"fastload": fastload, "ctranslate2": ctranslate2}
    exec(lines_of(caught.value).partition("; ")[0], place)
    ours, plain = (
        ctranslate2.Generator(str(folder)).generate_batch([["w1"]], max_length=8)
        for folder in (place["folder"], tmp_path / "ct2")
    )
    assert ours[0].sequences == plain[0].sequences


# -- real files, of packages of PyPI -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def silero() -> Path:
    """Folder of silero-vad's data: the same small network as TorchScript, ONNX and safetensors."""
    import importlib.util

    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        pytest.skip("needs silero-vad; tox -e formats has it")
    return Path(spec.origin).parent / "data"


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning", "ignore:`torch.jit:DeprecationWarning")
def test_real_network_runs_alike_in_three_formats(silero: Path, serve: Any) -> None:
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")
    safetensors = pytest.importorskip("safetensors.torch")
    serve(silero)
    found = fastload.load_tensors("org/m", files="silero_vad_16k.safetensors")
    plain = safetensors.load_file(silero / "silero_vad_16k.safetensors")
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    with pytest.raises(UnsupportedSourceError, match=r"silero_vad\.jit"):
        fastload.load_tensors("org/m", files="*.jit", settings={"process": False})
    snapshot = fastload.prefetch("org/m", files=["*.jit", "silero_vad.onnx"])
    sound = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    script = torch.jit.load(snapshot.path / "silero_vad.jit")
    session = onnxruntime.InferenceSession(snapshot.path / "silero_vad.onnx")
    with torch.no_grad():
        heard = script(sound, 16000)
    state = {"input": torch.cat([torch.zeros(1, 64), sound], 1).numpy(), "sr": torch.tensor(16000).numpy(),
             "state": torch.zeros(2, 1, 128).numpy()}  # fmt: skip
    assert torch.allclose(heard, torch.from_numpy(session.run(None, state)[0]), atol=1e-4)


def test_manifest_of_a_load_with_weights_names_nothing_left(serve: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from fastload.testing import write_tiny_llama

    folder = write_tiny_llama(tmp_path / "tiny", shards=1)
    (folder / "model.onnx").write_bytes(b"x")
    serve(folder)
    assert len(fastload.load_tensors("org/m", settings={"process": False})) == 21
