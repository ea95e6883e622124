"""Unchanged diffusers code loads pipelines whose files still arrive."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import huggingface_hub  # noqa: E402
from compare import diff_models, diff_pipelines  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402

import fastload  # noqa: E402
from fastload import dropin, inflight  # noqa: E402
from fastload.testing import Fault, Hub  # noqa: E402

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # diffusers' own
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # disable_mmap leaves files open
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own
]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline; not to be changed."""
    diffusers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    next(iter(PIPELINES.values()))(folder / "work").save_pretrained(folder / "out")
    return folder / "out"


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    started = make_hub({"org/sd": folder}, lfs=lambda path, size: path.endswith(".safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", started.endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", started.endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        started.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    # So that weights of 100 kB arrive in ranges, as those of real models do.
    monkeypatch.setenv("FASTLOAD_RANGE_BYTES", "65536")
    monkeypatch.setattr(dropin, "_LEAST_IN_FLIGHT_BYTES", 65536)
    return started


def test_a_pipeline_is_built_while_its_files_arrive(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"  # one for both: pipelines remember the paths of their parts
    plain = diffusers.DiffusionPipeline.from_pretrained("org/sd", cache_dir=cache)
    cache.rename(tmp_path / "plain")
    hub.script(Fault("hold", path=UNET, times=None, offset=100_000))
    opened = threading.Event()
    handle = inflight.InFlight.handle

    def opening(self: Any, *args: Any, **kwargs: Any) -> Any:
        opened.set()
        return handle(self, *args, **kwargs)

    monkeypatch.setattr(inflight.InFlight, "handle", opening)
    with fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        load = diffusers.DiffusionPipeline.from_pretrained
        loading = pool.submit(load, "org/sd", cache_dir=cache)
        assert opened.wait(60)  # the snapshot has been downloaded, as far as diffusers knows
        assert os.readlink(next(cache.rglob(f"snapshots/*/{UNET}"))).startswith("/proc/")
        hub.script()
        hub.release()
        ours = loading.result(60)
    assert diff_pipelines(plain, ours) == []
    assert not [p for p in tmp_path.rglob("*") if p.is_symlink() and "/proc/" in os.readlink(p)]


@pytest.mark.parametrize("options", [{"torch_dtype": torch.float16}, {"low_cpu_mem_usage": False}, {"disable_mmap": True}],
                         ids=str)  # fmt: skip
def test_one_model_of_it_is_the_same(hub: Hub, tmp_path: Path, options: dict[str, Any]):
    load = diffusers.UNet2DConditionModel.from_pretrained
    plain = load("org/sd", subfolder="unet", cache_dir=tmp_path / "plain", **options)
    with fastload.accelerate():
        ours = load("org/sd", subfolder="unet", cache_dir=tmp_path / "ours", **options)
    assert diff_models(plain, ours) == []


def test_a_folder_that_is_downloaded_alone_is_whole(hub: Hub, folder: Path, tmp_path: Path):
    with fastload.accelerate():
        snapshot = diffusers.DiffusionPipeline.download("org/sd", cache_dir=tmp_path)
        assert (Path(snapshot) / UNET).read_bytes() == (folder / UNET).read_bytes()
