"""A pipeline that is built while its weights arrive is the one that ``from_pretrained`` gives, bit for bit."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import transformers  # noqa: E402
from arrival import Arrival, finish_on_demand  # noqa: E402
from compare import diff_models, diff_pipelines  # noqa: E402
from fastload_diffusers import fastload_build_model  # noqa: E402
from tiny_pipelines import PIPELINES, image  # noqa: E402

import fastload  # noqa: E402
from fastload import plugins  # noqa: E402
from fastload.errors import (  # noqa: E402
    DeviceError,
    DownloadError,
    FormatError,
    PluginError,
    SettingsError,
    UnsupportedSourceError,
)
from fastload.settings import Settings  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402
from fastload.testing import Fault, Hub  # noqa: E402

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # diffusers' own
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own
]

HALF = torch.float16


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a saved pipeline, made once; not to be changed."""
    root = tmp_path_factory.mktemp("pipelines")
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()

    def saved(name: str, **options: Any) -> Path:
        folder = root / f"{name}-{options}".replace("/", "-")
        if not folder.exists():
            torch.manual_seed(0)
            pipeline = PIPELINES[name](folder / "work")
            pipeline.save_pretrained(folder / "out", **options)
            if options.get("variant"):  # the full precision stands beside it, with other numbers
                for part in [c for c in pipeline.components.values() if hasattr(c, "parameters")]:
                    for parameter in part.parameters():
                        parameter.data.mul_(2)
                pipeline.save_pretrained(folder / "out")
        return Path(folder / "out")

    return saved


class Builder:
    """Builds pipelines of folders that arrive while they are built, and plainly from the cache that results."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arrivals: list[Arrival] = []

    def arrive(self, folder: Path, **options: Any) -> Arrival:
        self.arrivals.append(Arrival(folder, self.root / f"cache{len(self.arrivals)}", **options))
        return self.arrivals[-1]

    def build(self, arrival: Arrival, framework: str | None = None, **options: Any) -> Any:
        """Call the hook as the loader does."""
        stream = TensorStream(arrival.transfer, plugins.manager(Settings(plugins=())))
        return fastload_build_model(
            framework=framework,
            snapshot=arrival.transfer.wait_manifest(),
            stream=stream,
            options={"device": "cpu", "dtype": None, **options},
        )

    def streamed(self, folder: Path, **options: Any) -> tuple[Any, Arrival]:
        """Build while the bytes arrive: one block of each file at first, the rest once the build waits for it."""
        arrival = self.arrive(folder)
        for name in arrival.weights:
            arrival.land(name, 0, 1)
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            waited = pool.submit(finish_on_demand, arrival, ended)
            try:
                built = self.build(arrival, **options)
            finally:
                ended.set()
            assert waited.result(), "the build did not wait for a byte: nothing was streamed"
        return built, arrival

    def plain(self, arrival: Arrival, chosen: Any = None, **options: Any) -> Any:
        """Load the usual way, by name."""
        chosen = chosen or diffusers.DiffusionPipeline
        return chosen.from_pretrained("org/model", cache_dir=arrival.repo.parent, local_files_only=True, **options)

    def close(self) -> None:
        for arrival in self.arrivals:
            arrival.close()


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[Builder]:
    """Builds pipelines; everything is given back after the test."""
    made = Builder(tmp_path)
    yield made
    made.close()


# -- pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_streamed_pipeline_is_the_plain_one(zoo: Any, builder: Builder, name: str) -> None:
    pipeline, arrival = builder.streamed(zoo(name, max_shard_size="30KB"))
    assert len([w for w in arrival.weights if "-of-" in w]) > 4
    plain = builder.plain(arrival)
    assert type(pipeline) is type(plain) and pipeline.name_or_path == "org/model"
    assert diff_pipelines(pipeline, plain) == []
    assert torch.equal(image(pipeline), image(plain))


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": HALF},
        {"torch_dtype": {"unet": HALF, "vae": torch.bfloat16, "default": torch.float32}},
        {"dtype": HALF},
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"use_safetensors": True},
        {"safety_checker": None},
        {"unet": None},
        {"requires_safety_checker": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_options_of_from_pretrained_do_what_they_do(zoo: Any, builder: Builder, options: dict[str, Any]) -> None:
    pipeline, arrival = builder.streamed(zoo("sd"), **options)
    assert diff_pipelines(pipeline, builder.plain(arrival, **options)) == []


@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")  # diffusers' own, of its own call
def test_a_type_for_each_component_paints_the_plain_image(zoo: Any, builder: Builder, option: str) -> None:
    types = {"text_encoder": torch.float32, "default": HALF}
    pipeline, arrival = builder.streamed(zoo("sdxl"), **{option: types})
    plain = builder.plain(arrival, torch_dtype=types)
    assert (plain.text_encoder.dtype, plain.text_encoder_2.dtype) == (torch.float32, HALF)
    assert diff_pipelines(pipeline, plain) == []
    assert torch.equal(image(pipeline), image(plain))


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", {"unet": "float16"}], ids=str)
def test_dtype_may_be_named(zoo: Any, builder: Builder, dtype: Any) -> None:
    pipeline, _ = builder.streamed(zoo("sd"), dtype=dtype)
    assert pipeline.unet.dtype == HALF
    assert pipeline.vae.dtype == (torch.float32 if isinstance(dtype, dict) else HALF)


def test_weights_keep_to_their_type_where_the_class_says_so(zoo: Any, builder: Builder) -> None:
    pipeline, arrival = builder.streamed(zoo("sd3"), dtype=HALF)
    plain = builder.plain(arrival, dtype=HALF)
    assert {p.dtype for p in plain.text_encoder_3.parameters()} == {HALF, torch.float32}  # T5's wo
    assert diff_pipelines(pipeline, plain) == []


def test_components_that_are_brought_are_used(zoo: Any, builder: Builder) -> None:
    folder = zoo("sd")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.bfloat16)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    options = {"unet": unet, "scheduler": scheduler, "safety_checker": None}
    pipeline, arrival = builder.streamed(folder, **options)
    assert pipeline.unet is unet and pipeline.scheduler is scheduler and pipeline.safety_checker is None
    assert diff_pipelines(pipeline, builder.plain(arrival, **options)) == []


def test_class_may_be_chosen(zoo: Any, builder: Builder) -> None:
    pipeline, arrival = builder.streamed(zoo("sd"), auto_class="AutoPipelineForImage2Image")
    assert type(pipeline) is diffusers.StableDiffusionImg2ImgPipeline
    assert diff_pipelines(pipeline, builder.plain(arrival, diffusers.AutoPipelineForImage2Image)) == []


def test_shards_may_be_read_in_threads(zoo: Any, builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.models.modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    pipeline, arrival = builder.streamed(zoo("flux", max_shard_size="30KB"))
    assert diff_pipelines(pipeline, builder.plain(arrival)) == []


class Moved:
    """Stands in for a class; what it builds tells where it was moved to."""

    to_device: Any = None

    @classmethod
    def from_pretrained(cls, *args: Any, **arguments: Any) -> Any:
        return cls() if not arguments.get("output_loading_info") else (cls(), {})

    def to(self, device: Any) -> Any:
        self.to_device = device
        return self


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "cpu"}, None),
        ({"device": torch.device("cpu")}, None),
        ({"device": "meta"}, "meta"),
        ({"device": "cuda", "device_map": "balanced"}, None),
    ],
)
def test_device_moves_what_was_built(zoo: Any, builder: Builder, options: dict[str, Any], expected: Any) -> None:
    arrival = builder.arrive(zoo("sd"))
    arrival.finish()
    options = {"auto_class": Moved, "subfolder": "unet", **options}
    assert builder.build(arrival, **options).to_device == expected
    assert builder.build(arrival, **options, output_loading_info=True)[0].to_device == expected


def test_device_that_is_missing_is_an_error_before_anything_is_built(zoo: Any, builder: Builder) -> None:
    arrival = builder.arrive(zoo("sd"))
    with pytest.raises(DeviceError, match="cuda:77"):
        builder.build(arrival, device="cuda:77")


def test_tokenizers_and_configs_name_folders_that_stay(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    pipeline, arrival = builder.streamed(zoo("sd3"))
    assert pipeline.transformer.config._name_or_path == str(arrival.snapshot / "transformer")
    assert pipeline.text_encoder.name_or_path == str(arrival.snapshot / "text_encoder")
    assert pipeline.tokenizer.name_or_path == str(arrival.snapshot / "tokenizer")
    pipeline.save_pretrained(tmp_path / "again")


def test_offloaded_weights_can_be_read_after_the_load(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    options: dict[str, Any] = {"subfolder": "unet", "device_map": "auto", "max_memory": {"cpu": 30_000}}
    arrival = builder.arrive(zoo("sd"))
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build, arrival, **options, offload_folder=str(tmp_path / "off"))
        arrival.finish()
        unet = building.result()
    assert "disk" in unet.hf_device_map.values()
    options |= {"max_memory": {"cpu": 30_000}, "offload_folder": str(tmp_path / "plain")}  # from_pretrained changes it
    plain = builder.plain(arrival, diffusers.UNet2DConditionModel, **options)
    inputs = torch.ones(1, 4, 16, 16), 1, torch.ones(1, 3, 32)
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, plain(*inputs).sample)


@pytest.mark.parametrize("options", [{"disable_mmap": True}, {"use_safetensors": False}], ids=str)
def test_reader_that_bypasses_safe_open_never_starts_on_partial_files(
    zoo: Any, builder: Builder, options: dict[str, Any]
) -> None:
    arrival = builder.arrive(zoo("sd"))
    arrival.fail(DownloadError("the cable is cut"))
    started: list[Any] = []

    class Bypassing:
        @classmethod
        def from_pretrained(cls, *args: Any, **arguments: Any) -> None:
            started.append(arguments)

    with pytest.raises(DownloadError):
        builder.build(arrival, auto_class=Bypassing, **options)
    assert not started


def test_pickled_weights_are_loaded_once_they_are_verified(zoo: Any, builder: Builder) -> None:
    folder = zoo("sd", safe_serialization=False)
    weights = [str(p.relative_to(folder)) for p in folder.rglob("*.bin")]
    arrival = builder.arrive(folder, weights=weights)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build, arrival)
        arrival.finish()
        pipeline = building.result()
    assert diff_pipelines(pipeline, builder.plain(arrival)) == []


# -- single models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "chosen"),
    [("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)],
)
@pytest.mark.parametrize("options", [{}, {"dtype": HALF}], ids=str)
def test_one_model_of_a_pipeline_comes_by_its_subfolder(
    zoo: Any, builder: Builder, part: str, chosen: Any, options: dict[str, Any]
) -> None:
    model, arrival = builder.streamed(zoo("sd", max_shard_size="30KB"), subfolder=part, **options)
    plain = builder.plain(arrival, chosen, subfolder=part, **options)
    assert diff_models(model, plain) == []
    assert model.config._name_or_path == "org/model"


def test_a_repository_that_is_one_model_needs_no_framework(zoo: Any, builder: Builder) -> None:
    model, arrival = builder.streamed(zoo("flux") / "vae")
    assert diff_models(model, builder.plain(arrival, diffusers.AutoencoderKL)) == []


def test_controlnet_comes_alone_and_goes_into_a_pipeline(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    folder = zoo("sd")
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3).save_pretrained(tmp_path / "control")
    controlnet, arrival = builder.streamed(tmp_path / "control")
    assert diff_models(controlnet, builder.plain(arrival, diffusers.ControlNetModel)) == []
    options = {"auto_class": "StableDiffusionControlNetPipeline", "controlnet": controlnet}
    pipeline, arrival = builder.streamed(folder, **options)
    plain = builder.plain(arrival, diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet)
    assert pipeline.controlnet is controlnet and diff_pipelines(pipeline, plain) == []


def test_text_encoder_of_a_pipeline_is_built_by_transformers(zoo: Any, builder: Builder) -> None:
    import fastload_transformers

    arrival = builder.arrive(zoo("sd"))
    arrival.finish()
    options = {"device": "cpu", "dtype": None, "subfolder": "text_encoder"}
    stream = TensorStream(arrival.transfer, plugins.manager(Settings(plugins=())))
    snapshot = arrival.transfer.wait_manifest()
    model = fastload_transformers.fastload_build_model(None, snapshot, stream, options)
    assert diff_models(model, builder.plain(arrival, transformers.CLIPTextModel, subfolder="text_encoder")) == []


def test_loading_info_is_returned_as_from_pretrained_does(zoo: Any, builder: Builder) -> None:
    options = {"subfolder": "vae", "output_loading_info": True}
    (model, info), arrival = builder.streamed(zoo("sd"), **options)
    plain, plain_info = builder.plain(arrival, diffusers.AutoencoderKL, **options)
    assert diff_models(model, plain) == [] and info == plain_info


# -- from a hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(make_hub: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Hub]:
    """Start a hub that has one folder as ``org/pipe``."""

    def start(folder: Path, **options: Any) -> Hub:
        hub: Hub = make_hub({"org/pipe": folder}, **options)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        return hub

    return start


def plain_offline(tmp_path: Path, **options: Any) -> Any:
    """What diffusers itself makes of the cache that fastload left."""
    return diffusers.DiffusionPipeline.from_pretrained(
        "org/pipe", cache_dir=tmp_path / "hf" / "hub", local_files_only=True, **options
    )


def fetched(hub: Hub) -> set[str]:
    return {
        r.file
        for r in hub.requests
        if r.file is not None and r.bytes_sent and r.file.endswith((".safetensors", ".bin"))
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_from_a_hub_leaves_a_cache_that_diffusers_finds_complete(
    zoo: Any, serve: Any, tmp_path: Path, name: str
) -> None:
    serve(zoo(name))
    pipeline = fastload.load("org/pipe")
    plain = plain_offline(tmp_path)
    assert diff_pipelines(pipeline, plain) == []
    assert torch.equal(image(pipeline), image(plain))


def test_variant_travels_alone_and_what_has_none_comes_without(zoo: Any, serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(zoo("sd", variant="fp16"), folder)
    (folder / "safety_checker" / "model.fp16.safetensors").unlink()
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "v1-5-pruned.safetensors")
    hub = serve(folder)
    pipeline = fastload.load("org/pipe", variant="fp16", dtype="float16")
    assert fetched(hub) == {
        "safety_checker/model.safetensors", "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
    }  # fmt: skip
    plain = plain_offline(tmp_path, variant="fp16", dtype=HALF)
    assert diff_pipelines(pipeline, plain) == []


def test_weights_of_components_that_are_brought_do_not_travel(zoo: Any, serve: Any, tmp_path: Path) -> None:
    folder = zoo("sd")
    hub = serve(folder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    pipeline = fastload.load("org/pipe", unet=unet, safety_checker=None)
    assert fetched(hub) == {"text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert diff_pipelines(pipeline, plain_offline(tmp_path, unet=unet, safety_checker=None)) == []


def test_load_joins_a_start_that_knew_nothing_of_the_components(zoo: Any, serve: Any) -> None:
    hub = serve(zoo("sd"))
    fastload.start("org/pipe")
    fastload.load("org/pipe", safety_checker=None)
    assert len([r for r in hub.requests if r.path.startswith("/api/models/")]) == 1


def test_all_components_travel_at_once(zoo: Any, serve: Any) -> None:
    folder = zoo("sd")
    hub = serve(folder)
    first = "text_encoder/model.safetensors"
    others = {str(p.relative_to(folder)) for p in folder.rglob("*.safetensors")} - {first}
    hub.script(Fault("hold", path=first, origin="cdn"))
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(fastload.load, "org/pipe")
        hub.wait(lambda requests: others <= {r.file for r in requests if r.ended_s is not None and r.origin == "cdn"})
        assert not loading.done()
        hub.script()
        hub.release()
        assert loading.result().unet is not None


def test_one_model_of_a_pipeline_fetches_its_own_weights_alone(zoo: Any, serve: Any) -> None:
    hub = serve(zoo("sd"))
    unet = fastload.load("org/pipe", subfolder="unet")
    encoder = fastload.load("org/pipe", subfolder="text_encoder")
    assert fetched(hub) == {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert (type(unet), type(encoder)) == (diffusers.UNet2DConditionModel, transformers.CLIPTextModel)


# -- declining, and failing -----------------------------------------------------------------------------------------


def repository(folder: Path, **files: Any) -> Path:
    """Make a folder of JSON files."""
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_what_is_not_for_diffusers_is_declined(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    llm = {"architectures": ["LlamaForCausalLM"]}
    assert builder.build(builder.arrive(repository(tmp_path / "a", tokenizer={}))) is None
    assert builder.build(builder.arrive(repository(tmp_path / "b", config=llm))) is None
    assert builder.build(builder.arrive(zoo("sd")), framework="transformers") is None
    assert builder.build(builder.arrive(zoo("sd")), subfolder="text_encoder") is None


def test_unknown_class_says_what_to_do(builder: Builder, tmp_path: Path) -> None:
    arrival = builder.arrive(repository(tmp_path / "a", config={"_class_name": "UNet99"}))
    with pytest.raises(UnsupportedSourceError, match=r"org/model: diffusers .* has no class 'UNet99'"):
        builder.build(arrival)
    with pytest.raises(UnsupportedSourceError, match="names no class"):
        builder.build(builder.arrive(repository(tmp_path / "b", config={})), framework="diffusers")


@pytest.mark.parametrize("name", ["force_download", "proxies"])
def test_options_that_fastload_decides_are_refused(zoo: Any, builder: Builder, name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}=") as caught:
        builder.build(builder.arrive(zoo("sd")), **{name: "x"})
    assert caught.value.hint


def test_missing_diffusers_says_what_to_install(zoo: Any, builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(PluginError, match="needs torch and diffusers") as caught:
        builder.build(builder.arrive(zoo("sd")))
    assert caught.value.hint == 'pip install "fastload-weights[diffusers]"'


def test_variant_that_nothing_has_is_diffusers_own_error(zoo: Any, builder: Builder) -> None:
    arrival = builder.arrive(zoo("sd"))
    arrival.finish()
    with pytest.raises(ValueError, match="variant=fp99"):
        builder.build(arrival, variant="fp99")


def test_failed_transfer_ends_the_build_with_its_own_error(zoo: Any, builder: Builder) -> None:
    arrival = builder.arrive(zoo("sd"))
    for name in arrival.weights:
        arrival.land(name, 0, 1)
    ended = threading.Event()

    def fail() -> None:
        while not any(journal.take_demands() for journal in arrival.journals.values()) and not ended.is_set():
            pass
        arrival.fail(DownloadError("the cable is cut"))

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(fail)
        try:
            with pytest.raises(DownloadError, match="the cable is cut"):
                builder.build(arrival)
        finally:
            ended.set()
        failing.result()


@pytest.mark.parametrize("complete", [True, False])
def test_corrupt_header_is_a_format_error_though_diffusers_wraps_it(
    zoo: Any, builder: Builder, tmp_path: Path, complete: bool
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(zoo("sd"), folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"x" + path.read_bytes()[9:])
    arrival = builder.arrive(folder)
    name = "unet/diffusion_pytorch_model.safetensors"
    arrival.finish(*(weight for weight in arrival.weights if weight != name or complete))
    if not complete:
        arrival.land(name)
    with pytest.raises(FormatError, match=r"^unet/diffusion_pytorch_model\.safetensors: not a sound safetensors file"):
        builder.build(arrival)


def test_missing_shard_is_a_format_error_that_names_it(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(zoo("sd", max_shard_size="30KB"), folder)
    lost = sorted((folder / "unet").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FormatError, match=f"should be in {lost.name}, which is not among the files"):
        builder.build(builder.arrive(folder))


def test_importing_the_plugin_imports_no_framework() -> None:
    import subprocess

    program = (
        "import sys, fastload_diffusers; print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
