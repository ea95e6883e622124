"""FlashPack files come as the flashpack package reads them, and what breaks the format's rules is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fastload_flashpack  # noqa: E402

import fastload  # noqa: E402
from fastload import plugins  # noqa: E402
from fastload.settings import Settings  # noqa: E402
from fastload.testing import PROMISES, Sample, check_format, random_tensor, write_safetensors  # noqa: E402

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4), "b": torch.full((5,), 0.5, dtype=torch.bfloat16), "n": torch.tensor(7),
    "big": torch.arange(70_000, dtype=torch.float32).reshape(700, 100), "none": torch.empty(0, 3),
}  # fmt: skip
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int64: "int64"}


def dumps(tensors: dict[str, torch.Tensor], **changes: Any) -> bytes:
    """Return a file of format 4, as flashpack lays it out; *changes* of the index's first row break it."""
    blocks, rows, data = [], [], b""
    for number, dtype in enumerate(dict.fromkeys(t.dtype for t in tensors.values())):
        start, at = len(data), 0
        for name, tensor in tensors.items():
            if tensor.dtype == dtype:
                rows.append(
                    {
                        "name": name,
                        "shape": list(tensor.shape),
                        "offset": at,
                        "length": tensor.numel(),
                        "macroblock": number,
                    }
                )
                data += bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
                at += tensor.numel()
        blocks.append(
            {"dtype": NAMES[dtype], "offset_bytes": start, "length_bytes": len(data) - start, "length_elems": at}
        )
        data += bytes(-len(data) % 128)
    rows[0] |= changes
    index = json.dumps({"format": "flashpack_v4", "align_bytes": 128, "macroblocks": blocks, "index": rows}).encode()
    return data + index + len(index).to_bytes(8, "little") + b"FLASHPK\0"


SMALL = {name: tensor for name, tensor in TENSORS.items() if name != "big"}
BROKEN = {
    "tensors that overlap": dumps({"a": TENSORS["a"], "c": TENSORS["a"]}, offset=4),
    "a tensor outside of the data": dumps(SMALL, offset=10**6),
    "a shape of other size": dumps(SMALL, shape=[5]),
    "a block that is not there": dumps(SMALL, macroblock=9),
    "a negative offset": dumps(SMALL, offset=-1),
    "a name twice": dumps(SMALL, name="none", length=0, shape=[0]),
    "an unknown type": dumps(SMALL).replace(b'"int64"', b'"int99"'),
    "no index": dumps(SMALL).replace(b'"index"', b'"xndex"'),
    "format 9": dumps(SMALL).replace(b"flashpack_v4", b"flashpack_v9"),
    "nothing": b"",
    "another end": dumps(SMALL)[:-1] + b"X",
    "an index that is too long": dumps(SMALL)[:-16] + b"\xff" * 8 + b"FLASHPK\0",
}


@pytest.mark.parametrize("promise", PROMISES)
def test_format_keeps_its_promises(promise: str) -> None:
    samples = [Sample("small.flashpack", dumps(SMALL), SMALL), Sample("large.flashpack", dumps(TENSORS), TENSORS)]
    check_format(fastload_flashpack, samples, broken=BROKEN, only=[promise])


@pytest.mark.parametrize("mixed", [False, True])
def test_files_of_the_package_are_read(tmp_path: Path, mixed: bool) -> None:
    flashpack = pytest.importorskip("flashpack")
    tensors = TENSORS if mixed else {"a": TENSORS["a"], "big": TENSORS["big"]}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    flashpack.serialization.pack_to_file(tensors, str(tmp_path / "m.flashpack"), None)
    assert (b"flashpack_v4" in (tmp_path / "m.flashpack").read_bytes()) is mixed
    found = fastload_flashpack.FlashPack("m.flashpack").load(tmp_path / "m.flashpack")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


def test_tensors_are_views_of_the_file_that_nobody_else_sees(tmp_path: Path) -> None:
    path = tmp_path / "m.flashpack"
    path.write_bytes(dumps(TENSORS))
    first, second = (fastload_flashpack.FlashPack("m.flashpack").load(path) for _ in range(2))
    first["a"].zero_()
    assert torch.equal(second["a"], TENSORS["a"]) and path.read_bytes() == dumps(TENSORS)
    assert first["a"].untyped_storage().nbytes() == TENSORS["a"].nbytes


def test_flashpack_travels_where_there_is_nothing_better(
    make_hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = write_safetensors(tmp_path / "m.safetensors", {"a": random_tensor("F32", (2,))}).read_bytes()
    repository = {"config.json": b"{}", "model.flashpack": dumps(SMALL)}
    hub = make_hub({"org/p": repository, "org/both": {**repository, "model.safetensors": other}})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    pm = plugins.manager(Settings())
    if not pm.is_registered(fastload_flashpack):  # a checkout that was installed before it had this plugin
        pm.register(fastload_flashpack)
    found = fastload.load_tensors("org/p", settings={"process": False})
    assert all(torch.equal(found[name], tensor) for name, tensor in SMALL.items())
    hub.clear()
    assert list(fastload.load_tensors("org/both", settings={"process": False})) == ["a"]
    assert "model.flashpack" not in {r.file for r in hub.requests}


@pytest.mark.diffusers
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers' own
def test_diffusers_gets_the_pack_that_it_is_told_to_use(
    make_hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("flashpack")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    channels = {"block_out_channels": (8, 16), "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 16}
    unet = diffusers.UNet2DModel(**channels, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    unet.save_pretrained(tmp_path / "unet")
    unet.save_pretrained(tmp_path / "unet", use_flashpack=True)
    hub = make_hub({"org/unet": tmp_path / "unet"})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    found = fastload.load("org/unet", use_flashpack=True, settings={"process": False})
    assert {r.file for r in hub.requests if r.file} >= {"model.flashpack"}
    assert "diffusion_pytorch_model.safetensors" not in {r.file for r in hub.requests}
    plain = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet", use_flashpack=True)
    assert found.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
