"""A small model of many types for the tests of devices, and what differs from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

KIB, MIB = 1 << 10, 1 << 20
#: What the streams of the tests take: two pages a slot, so that tensors of some ten KiB go through many.
PINNED_BYTES = 64 * KIB


def model() -> dict[str, Any]:
    """Return tensors of many types: odd sizes first, so that most stand between elements; small, empty, larger than a slot."""
    source = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=source)

    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "large": noise(60, 500),
        "bfloat16": noise(33, 71).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "int64": torch.arange(77),
        "bool": torch.arange(9) % 2 == 0,
        "float16": noise(50, 50).half(),
        "float8": noise(41).to(torch.float8_e4m3fn),
        "float64": noise(13).double(),
        "complex": torch.complex(noise(5), noise(5)),
    }
    return {**tensors, **{f"small.{i}": noise(3) for i in range(40)}}


def save_misaligned(tensors: Mapping[str, Any], path: Path) -> None:
    """Write *tensors* in the order given, as no sorting by alignment does (``save_file`` puts large elements first)."""
    data, header, at = [], {}, 0
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.bool: "BOOL", torch.uint8: "U8", torch.complex64: "C64"}
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        kind = names.get(tensor.dtype) or ("BF16" if tensor.dtype == torch.bfloat16 else _code(tensor.dtype))
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def _code(dtype: Any) -> str:
    return ("F" if dtype.is_floating_point else "I") + str(8 * dtype.itemsize)


def expected() -> dict[str, Any]:
    """Return all tensors of :func:`folder`, on the CPU."""
    return {**model(), **{f"{name}-": tensor for name, tensor in model().items()}}


def bits(tensor: Any) -> bytes:
    """Return the bytes of *tensor*, wherever it is."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def wrong(got: Mapping[str, Any], want: Mapping[str, Any], dtype: Any = None) -> list[str]:
    """Return the names under which *got* is not *want*, floating tensors cast to *dtype* by the CPU."""
    bad = sorted(got.keys() ^ want.keys())
    for name in got.keys() & want.keys():
        target = want[name].to(dtype) if dtype is not None and want[name].is_floating_point() else want[name]
        a, b = got[name], target
        if (a.dtype, a.shape, a.is_contiguous()) != (b.dtype, b.shape, True) or bits(a) != bits(b):
            bad.append(name)
    return bad


def write(tensors: Mapping[str, Any], path: Path) -> None:
    """Write *tensors* as safetensors does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
