"""Single files, LoRA weights and parts without weights come as diffusers' own calls give them, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import fastload_diffusers  # noqa: E402
import transformers  # noqa: E402
from building import Builder  # noqa: E402
from compare import diff_models, diff_pipelines  # noqa: E402
from tiny_pipelines import PIPELINES, image, write_single_file  # noqa: E402

import fastload  # noqa: E402
from fastload.errors import IntegrityError, NotFoundError, SettingsError, UnsupportedSourceError  # noqa: E402
from fastload.testing import Fault, Hub  # noqa: E402

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # diffusers' own
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own
]

HALF = torch.float16


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Stable Diffusion, with a checkpoint of all of it as ``v1.safetensors``; not to be changed."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    PIPELINES["sd"](folder / "work").save_pretrained(folder / "out")
    write_single_file(folder / "out", folder / "out" / "v1.safetensors")
    return folder / "out"


@pytest.fixture
def serve(make_hub: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """Start a hub with repositories of ``org``."""

    def start(**folders: Path) -> Hub:
        hub: Hub = make_hub({f"org/{name}": folder for name, folder in folders.items()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        return hub

    return start


@pytest.fixture
def builder(tmp_path: Path) -> Any:
    """Builds from files that arrive meanwhile."""
    made = Builder(tmp_path, fastload_diffusers.fastload_build_model)
    yield made
    for arrival in made.arrivals:
        arrival.close()


def cached(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


def fetched(hub: Hub) -> set[str]:
    return {r.file for r in hub.requests if r.file is not None and r.bytes_sent and r.file.endswith(".safetensors")}


# -- single files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"torch_dtype": HALF}], ids=str)
def test_single_file_is_read_while_it_arrives_as_from_single_file_reads_it(
    sd: Path, builder: Any, options: dict[str, Any]
) -> None:
    pipeline, arrival = builder.streamed(sd, single_file="v1.safetensors", **options)
    path = arrival.snapshot
    plain = diffusers.StableDiffusionPipeline.from_single_file(
        str(path / "v1.safetensors"), config=str(path), **options
    )
    assert type(pipeline) is type(plain) and diff_pipelines(pipeline, plain) == []
    if not options:
        assert torch.equal(image(pipeline), image(plain))


def test_one_model_may_be_a_single_file(sd: Path, builder: Any) -> None:
    options = {"auto_class": "UNet2DConditionModel", "subfolder": "unet"}
    unet, arrival = builder.streamed(sd, single_file="v1.safetensors", config="org/model", dtype="float16", **options)
    path = arrival.snapshot
    plain = diffusers.UNet2DConditionModel.from_single_file(
        str(path / "v1.safetensors"), config=str(path), subfolder="unet", torch_dtype=HALF
    )
    assert diff_models(unet, plain) == []


def test_components_may_be_brought_beside_a_single_file(sd: Path, builder: Any) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(sd / "vae", torch_dtype=torch.bfloat16)
    pipeline, _ = builder.streamed(sd, single_file="v1.safetensors", vae=vae)
    assert pipeline.vae is vae


def test_single_file_travels_alone(sd: Path, serve: Any, tmp_path: Path) -> None:
    hub = serve(sd=sd)
    pipeline = fastload.load("org/sd", single_file="v1.safetensors")
    assert fetched(hub) == {"v1.safetensors"}
    [snapshot] = cached(tmp_path).glob("models--org--sd/snapshots/*")
    plain = diffusers.StableDiffusionPipeline.from_single_file(str(snapshot / "v1.safetensors"), config=str(snapshot))
    assert diff_pipelines(pipeline, plain) == []


def test_pickled_single_file_is_read_once_it_is_verified(sd: Path, serve: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shutil.copytree(sd, tmp_path / "ckpt")
    torch.save({"state_dict": load_file(sd / "v1.safetensors")}, tmp_path / "ckpt" / "v1.ckpt")
    serve(sd=tmp_path / "ckpt")
    pipeline = fastload.load("org/sd", single_file="v1.ckpt")
    plain = diffusers.StableDiffusionPipeline.from_single_file(str(sd / "v1.safetensors"), config=str(sd))
    assert torch.equal(image(pipeline), image(plain))


def test_single_file_that_is_not_there_is_named_before_anything_travels(sd: Path, serve: Any) -> None:
    hub = serve(sd=sd)
    with pytest.raises(NotFoundError, match=r"org/sd has no file v2\.safetensors") as caught:
        fastload.load("org/sd", single_file="v2.safetensors")
    assert "v1.safetensors" in str(caught.value.hint) and not fetched(hub)


def test_class_that_reads_no_single_files_is_refused(sd: Path, serve: Any) -> None:
    serve(sd=sd)
    with pytest.raises(UnsupportedSourceError, match="DDIMScheduler cannot be loaded from a single file"):
        fastload.load("org/sd", single_file="v1.safetensors", auto_class="DDIMScheduler")


def test_wrong_bytes_of_a_single_file_are_an_integrity_error(sd: Path, serve: Any) -> None:
    hub = serve(sd=sd)
    hub.script(Fault("flip", path="v1.safetensors", offset=100_000))
    with pytest.raises(IntegrityError):
        fastload.load("org/sd", single_file="v1.safetensors")


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(sd: Path, tmp_path: Path) -> Path:
    """Folder with LoRA weights for the UNet and the text encoder, with their configuration in the metadata."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    encoder = transformers.CLIPTextModel.from_pretrained(sd / "text_encoder")
    layers = {}
    for name, model, targets in (("unet", unet, ["to_q", "to_v"]), ("text_encoder", encoder, ["q_proj", "v_proj"])):
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=targets))
        weights = diffusers.utils.convert_state_dict_to_diffusers(peft.utils.get_peft_model_state_dict(model))
        layers |= {
            f"{name}_lora_layers": weights,
            f"{name}_lora_adapter_metadata": model.peft_config["default"].to_dict(),
        }
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **layers)
    return tmp_path / "lora"


def test_lora_weights_go_into_a_pipeline_as_load_lora_weights_puts_them(
    sd: Path, lora: Path, serve: Any, tmp_path: Path
) -> None:
    hub = serve(sd=sd, lora=lora)
    pipeline = fastload.load("org/sd")
    before = image(diffusers.DiffusionPipeline.from_pretrained(sd))
    hub.clear()
    assert fastload.load("org/lora", into=pipeline, adapter_name="style") is pipeline
    assert len(hub.requests) <= 2 + 1 + 1 and fetched(hub) == {"pytorch_lora_weights.safetensors"}
    plain = diffusers.DiffusionPipeline.from_pretrained("org/sd", cache_dir=cached(tmp_path), local_files_only=True)
    plain.load_lora_weights(lora, adapter_name="style")
    assert pipeline.get_active_adapters() == ["style"]
    assert diff_pipelines(pipeline, plain) == []
    assert torch.equal(image(pipeline), image(plain)) and not torch.equal(image(pipeline), before)


def test_one_of_several_lora_files_is_chosen_by_name(sd: Path, lora: Path, serve: Any, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        shutil.copy(lora / "pytorch_lora_weights.safetensors", lora / f"{name}.safetensors")
    (lora / "pytorch_lora_weights.safetensors").unlink()
    hub = serve(lora=lora)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd)
    with pytest.raises(
        SettingsError, match=r"holds 2 files of weights: cats\.safetensors, dogs\.safetensors"
    ) as caught:
        fastload.load("org/lora", into=pipeline)
    assert caught.value.hint == "choose one with weight_name='cats.safetensors'"
    shutil.rmtree(cached(tmp_path))
    hub.clear()
    fastload.load("org/lora", into=pipeline, weight_name="dogs.safetensors")
    assert fetched(hub) == {"dogs.safetensors"} and pipeline.get_active_adapters() == ["default_0"]


def test_wrong_lora_weights_leave_the_pipeline_as_it_was(sd: Path, lora: Path, serve: Any) -> None:
    hub = serve(lora=lora)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd)
    hub.script(Fault("flip", path="*.safetensors", offset=1500))
    with pytest.raises(IntegrityError):
        fastload.load("org/lora", into=pipeline)
    assert pipeline.get_list_adapters() == {}
    with pytest.raises(SettingsError, match="dtype= means nothing with into= a pipeline"):
        fastload.load("org/lora", into=pipeline, dtype="float16")


# -- parts without weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "feature_extractor"])
def test_part_without_weights_comes_by_its_subfolder(sd: Path, serve: Any, tmp_path: Path, part: str) -> None:
    hub = serve(sd=sd)
    found = fastload.load("org/sd", subfolder=part)
    assert fetched(hub) == set()
    plain = type(found).from_pretrained("org/sd", subfolder=part, cache_dir=cached(tmp_path), local_files_only=True)
    assert type(found).__name__.startswith(
        {"scheduler": "PNDM", "tokenizer": "CLIP", "feature_extractor": "CLIP"}[part]
    )
    assert vars(found).keys() == vars(plain).keys() and str(found) == str(plain)


def test_another_scheduler_may_be_made_of_the_same_configuration(sd: Path, serve: Any) -> None:
    serve(sd=sd)
    found = fastload.load("org/sd", subfolder="scheduler", auto_class="EulerDiscreteScheduler")
    assert type(found) is diffusers.EulerDiscreteScheduler and found.config.beta_end == 0.012


def test_class_that_a_library_lacks_is_named(sd: Path, serve: Any, tmp_path: Path) -> None:
    shutil.copytree(sd, tmp_path / "odd")
    index = (tmp_path / "odd" / "model_index.json").read_text()
    (tmp_path / "odd" / "model_index.json").write_text(index.replace("PNDMScheduler", "PNDM99"))
    serve(sd=tmp_path / "odd")
    with pytest.raises(UnsupportedSourceError, match="org/sd: scheduler is a PNDM99 of diffusers"):
        fastload.load("org/sd", subfolder="scheduler")


# -- all of it over HTTP -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_requests_are_few_and_none_when_warm_and_pinned(serve: Any, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    PIPELINES[name](tmp_path / "work").save_pretrained(tmp_path / "out")
    hub = serve(pipe=tmp_path / "out")
    commit = hub.commit("org/pipe")
    cold = fastload.load("org/pipe", revision=commit)
    files = hub.manifest("org/pipe").files
    ranges = [r for r in hub.requests if r.origin == "cdn"]
    assert len(hub.requests) <= 2 + len(files) + len(ranges) and len(ranges) <= len(files)
    hub.clear()
    warm = fastload.load("org/pipe", revision=commit)
    assert hub.requests == []
    assert diff_pipelines(cold, warm) == []


def test_controlnet_comes_alone_and_paints_in_a_pipeline(sd: Path, serve: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).save_pretrained(
        tmp_path / "control"
    )
    serve(sd=sd, control=tmp_path / "control")
    controlnet = fastload.load("org/control")
    pipeline = fastload.load("org/sd", auto_class="StableDiffusionControlNetPipeline", controlnet=controlnet)
    where = {"cache_dir": cached(tmp_path), "local_files_only": True}
    plain_control = diffusers.ControlNetModel.from_pretrained("org/control", **where)
    plain = diffusers.StableDiffusionControlNetPipeline.from_pretrained("org/sd", controlnet=plain_control, **where)
    assert diff_models(controlnet, plain_control) == [] and diff_pipelines(pipeline, plain) == []

    def paint(made: Any) -> Any:
        made.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(3)
        pose = torch.ones(1, 3, 16, 16)
        return made("a cat", pose, num_inference_steps=2, generator=generator, output_type="pt").images

    assert torch.equal(paint(pipeline), paint(plain))


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [{"variant": "fp16", "torch_dtype": HALF}, {"torch_dtype": {"unet": HALF, "default": torch.float32}},
     {"device_map": "balanced"}, {"safety_checker": None}],
    ids=str,
)  # fmt: skip
def test_options_paint_the_same_image(sd: Path, serve: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    shutil.copytree(sd, folder)
    if "variant" in options:
        diffusers.DiffusionPipeline.from_pretrained(sd, torch_dtype=HALF).save_pretrained(folder, variant="fp16")
    serve(sd=folder)
    pipeline = fastload.load("org/sd", **options)
    where = {"cache_dir": cached(tmp_path), "local_files_only": True}
    plain = diffusers.DiffusionPipeline.from_pretrained("org/sd", **where, **options)
    assert diff_pipelines(pipeline, plain) == []
    if not isinstance(options.get("torch_dtype"), dict):  # halves and floats do not go into one image
        assert torch.equal(image(pipeline), image(plain))
