"""Pipelines end on the device as ``from_pretrained`` puts them there, and their weights go by way of the slots."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import transformers  # noqa: E402
from compare import diff_models, diff_pipelines  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402

import fastload  # noqa: E402
from fastload.errors import DeviceError  # noqa: E402
from fastload.testing import Hub  # noqa: E402

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # diffusers' own
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own
]

QUICK = {"range_bytes": 64 << 10, "ring_bytes": 512 << 10, "pinned_bytes": 256 << 10, "attempts": 2, "stall_s": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline like Stable Diffusion 1.5 in half precision, several shards each; not to be changed."""
    root = tmp_path_factory.mktemp("pipelines")
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    PIPELINES["sd"](root / "work").to(dtype=torch.float16).save_pretrained(root / "out", max_shard_size="30KB")
    return root / "out"


@pytest.fixture
def hub(saved: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the pipeline as ``org/pipe``."""
    started = make_hub({"org/pipe": saved})
    monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
    return started


def plain(device: str = "cuda", chosen: Any = None, **options: Any) -> Any:
    """Load the usual way, from the cache that fastload filled."""
    cache = Path(os.environ["HF_HOME"]) / "hub"
    chosen = chosen or diffusers.DiffusionPipeline
    with torch.cuda.device(device):
        return chosen.from_pretrained(
            "org/pipe", cache_dir=cache, local_files_only=True, device_map="cuda", **options
        ).to(device)


def weights(pipeline: Any) -> list[Any]:
    """Return all parameters."""
    parts = [part for part in pipeline.components.values() if hasattr(part, "parameters")]
    return [parameter for part in parts for parameter in part.parameters()]


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}], ids=str)
def test_pipeline_is_that_of_from_pretrained(hub: Hub, options: dict[str, Any]) -> None:
    for _ in range(2):  # cold, warm
        ours = fastload.load("org/pipe", device="cuda", settings=QUICK, **options)
        theirs = plain(**options)
        assert diff_pipelines(ours, theirs) == []
        assert {str(parameter.device) for parameter in weights(ours)} == {"cuda:0"}
        assert ours.hf_device_map == theirs.hf_device_map


def test_weights_of_a_pipeline_come_from_page_locked_memory(hub: Hub, fake: ModuleType) -> None:
    fastload.prefetch("org/pipe")
    fake.reset()
    ours = fastload.load("org/pipe", device="cuda", settings=QUICK)
    stored = sum(parameter.nbytes for parameter in weights(ours)) // 2  # in half precision; cast on the device
    assert fake.stat("h2d_bytes") >= stored
    # What the framework makes itself (buffers) may come from elsewhere.
    buffers = [b for part in ours.components.values() if hasattr(part, "buffers") for b in part.buffers()]
    assert fake.stat("pageable_copies") <= len(buffers)


def test_pipeline_goes_to_another_device_than_the_current_one(hub: Hub, cuda: Any) -> None:
    if cuda.device_count() < 2:
        pytest.skip("needs two devices")
    before = cuda.max_memory_allocated(0)
    ours = fastload.load("org/pipe", device="cuda:1", dtype=torch.float16, settings=QUICK)
    assert {str(parameter.device) for parameter in weights(ours)} == {"cuda:1"}
    assert cuda.max_memory_allocated(0) == before, "it went by way of the first device"
    assert diff_pipelines(ours, plain("cuda:1", dtype=torch.float16)) == []


def test_single_model_of_a_pipeline_goes_to_its_device(hub: Hub) -> None:
    ours = fastload.load("org/pipe", subfolder="unet", device="cuda", dtype=torch.float16, settings=QUICK)
    cache = Path(os.environ["HF_HOME"]) / "hub"
    theirs = diffusers.UNet2DConditionModel.from_pretrained(
        "org/pipe", subfolder="unet", cache_dir=cache, local_files_only=True, dtype=torch.float16,
        device_map={"": torch.device("cuda")},
    )  # fmt: skip
    assert diff_models(ours, theirs) == []


@pytest.mark.parametrize("device_map", ["balanced", "cuda", "cpu"])
def test_device_maps_give_what_they_give_plainly(hub: Hub, device_map: str) -> None:
    ours = fastload.load("org/pipe", device_map=device_map, dtype=torch.float16, settings=QUICK)
    cache = Path(os.environ["HF_HOME"]) / "hub"
    theirs = diffusers.DiffusionPipeline.from_pretrained(
        "org/pipe", cache_dir=cache, local_files_only=True, device_map=device_map, dtype=torch.float16
    )
    different = [d for d in diff_pipelines(ours, theirs) if "_hf_hook" not in d and "forward" not in d]
    assert not different
    assert [str(p.device) for p in weights(ours)] == [str(p.device) for p in weights(theirs)]


def test_component_that_the_caller_brings_goes_along(hub: Hub) -> None:
    fastload.prefetch("org/pipe")
    unet = fastload.load("org/pipe", subfolder="unet", settings=QUICK)
    ours = fastload.load("org/pipe", unet=unet, device="cuda", settings=QUICK)
    assert ours.unet is unet
    assert {str(parameter.device) for parameter in weights(ours)} == {"cuda:0"}


def test_pipeline_that_may_not_be_mapped_is_moved(hub: Hub) -> None:
    ours = fastload.load("org/pipe", device="cuda", low_cpu_mem_usage=False, settings=QUICK)
    assert {str(parameter.device) for parameter in weights(ours)} == {"cuda:0"}


def test_copy_that_fails_while_a_pipeline_is_built_is_our_error(hub: Hub, fake: ModuleType) -> None:
    for n in (1, 9, 40):
        with fake.settings(fail_copy_at=n, fail_code=1, fail_kind="h2d"), pytest.raises(DeviceError):
            fastload.load("org/pipe", device="cuda", settings=QUICK)


def test_pipeline_that_brings_others_along_is_moved(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "_load_connected_pipes", True)  # refuses every device map
    ours = fastload.load("org/pipe", device="cuda", settings=QUICK)
    assert {str(parameter.device) for parameter in weights(ours)} == {"cuda:0"}


@pytest.mark.parametrize("device", ["cuda:77", "nonsense"])
def test_missing_device_is_an_error_of_ours(hub: Hub, device: str) -> None:
    with pytest.raises(DeviceError, match=device):
        fastload.load("org/pipe", device=device, settings=QUICK)
