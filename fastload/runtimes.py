"""Weights that are for a runtime of their own: what such a file is, and the lines that bring it there. Pure functions.

fastload fetches and verifies files of any kind; those that no plugin makes tensors of are handed over as a path.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Suffix → what the file is, and what opens it at {path}, or in {folder}.
_BY_SUFFIX = {
    ".onnx": ("an ONNX model", "onnxruntime.InferenceSession({path})"),
    ".onnx_data": ("the data of an ONNX model", ""),
    ".jit": ("a TorchScript program", "torch.jit.load({path})"),
    ".tflite": ("a LiteRT model", "ai_edge_litert.interpreter.Interpreter(model_path=str({path}))"),
    ".h5": ("weights of Keras", "h5py.File({path})"),
    ".keras": ("a Keras model", "keras.saving.load_model({path})"),
    ".msgpack": ("weights of Flax", "flax.serialization.msgpack_restore({path}.read_bytes())"),
    ".npz": ("arrays of NumPy", "numpy.load({path})"),
    ".mlmodel": ("a Core ML model", "coremltools.models.MLModel(str({path}))"),
    ".ot": ("weights of tch-rs", ""),
    ".pb": ("a graph of TensorFlow", ""),
    ".flashpack": ("a FlashPack file", "flashpack.assign_from_file(model, str({path}))"),
}
_CTRANSLATE2 = ("a CTranslate2 model", "ctranslate2.models.Whisper(str({folder}))")
_TORCHSCRIPT = _BY_SUFFIX[".jit"]


@dataclass(frozen=True, slots=True)
class _Mark:
    at: int
    data: bytes
    what: str


#: Specified by each: what stands where in a file.
_MARKS = (
    _Mark(0, b"version https://git-lfs.github.com", "a pointer of Git LFS: the weights themselves were never uploaded"),
    _Mark(257, b"ustar", "a tar archive (of torch.save before 0.1.10, or of NeMo)"),
    _Mark(0, b"PK\x03\x04", "a zip archive"),
    _Mark(0, b"\x1f\x8b", "compressed by gzip"),
    _Mark(0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    _Mark(0, b"\x89HDF\r\n", "an HDF5 file"),
    _Mark(0, b"\x93NUMPY", "an array of NumPy"),
    _Mark(4, b"TFL3", "a LiteRT model"),
    _Mark(0, b"GGUF", "a GGUF file"),
    _Mark(0, b"lmgg", "a GGML file, older than GGUF"),
    _Mark(0, b"tjgg", "a GGML file, older than GGUF"),
    _Mark(0, b"<!DOCTYPE", "a web page"),
    _Mark(0, b"<html", "a web page"),
)
#: Specified (pickle): how texts of protocol 0 and 1 begin: a dict or a list, marked or empty; a global.
_OLD_PICKLES = (b"(dp", b"(lp", b"}q", b"]q", b"ccollections\n", b"c__builtin__\n", b"ctorch")


def what_is(head: bytes) -> str | None:
    """Return in a few words what a file is that starts with *head*; ``None`` where nothing is recognised."""
    for mark in _MARKS:
        if head[mark.at : mark.at + len(mark.data)] == mark.data:
            return mark.what
    if _is_ctranslate2(head):
        return _CTRANSLATE2[0]
    if head[:1] == b"\x80" and b"\0" < head[1:2] <= b"\x05":
        return f"a pickle of protocol {head[1]}"
    if head.startswith(_OLD_PICKLES):
        return "a pickle of protocol 0 or 1"
    return None if head else "empty"


def _is_ctranslate2(head: bytes) -> bool:
    """Specified (CTranslate2): a version, the length of a name, the name of a model's spec, a zero byte."""
    length = int.from_bytes(head[4:6], "little")
    return int.from_bytes(head[:4], "little") < 64 and length < 64 and head[6 : 6 + length].endswith(b"Spec\0")


def hint_for(source: str, path: str, what: str = "") -> str:
    """Return lines to copy that fetch *path* of *source*, verified, and open it with the runtime that it is for.

    Args:
        what: What the file is, where that is known better than by its name.
    """
    suffix = next((s for s in _BY_SUFFIX if path.lower().endswith(s)), "")
    known = (_CTRANSLATE2, _TORCHSCRIPT, *_BY_SUFFIX.values())
    runtime = next((k for k in known if k[0] in what), None) or _BY_SUFFIX.get(suffix, ("", ""))
    if runtime is _CTRANSLATE2:
        folder = path.rpartition("/")[0]
        place = f"fastload.prefetch({source!r}).path" + (f" / {folder!r}" if folder else "")
        return f"for its runtime: folder = {place}; {runtime[1].format(folder='folder')}"
    pattern = f"{path}*" if suffix == ".onnx" else path  # its data may stand beside it
    lines = f"path = fastload.prefetch({source!r}, files={pattern!r}).path / {path!r}"
    return f"for its runtime: {lines}" + (f"; {runtime[1].format(path='path')}" if runtime[1] else "")
