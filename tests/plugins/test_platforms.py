"""Platforms are recognised by their variables alone; what they say of the cache is a default."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fastload_platforms import fastload_platform
from fastload_platforms.known import PLATFORMS, recognise

from fastload import plugins
from fastload.settings import Settings

#: As the platform's own image or runner sets them.
ENVIRONS = [
    (
        "BentoML",
        {"BENTO_PATH": "/home/bentoml/bento", "BENTOML_HOME": "/home/bentoml", "BENTOML_CONTAINERIZED": "true"},
    ),
    ("BentoML", {"BENTOML_HF_CACHE_DIR": "/home/bentoml/bento/hf-models"}),
    ("KServe", {"INFERENCE_SERVICE_NAME": "llama", "K_SERVICE": "llama-predictor"}),
    ("MLServer", {"MLSERVER_MODELS_DIR": "/mnt/models", "MLSERVER_PATH": "/opt/mlserver"}),
    ("MLServer", {"MLSERVER_HTTP_PORT": "8080"}),
    ("Cog", {"COG_PREDICT_TYPE_STUB": "run.py:Runner"}),
    ("Cog", {"R8_COG_VERSION": "coglet", "R8_PYTHON_VERSION": "3.11"}),
    ("Mystic", {"PIPELINE_PATH": "pipe:graph", "PIPELINE_NAME": "me/tiny", "PIPELINE_IMAGE": "me/tiny:v1"}),
    ("Truss", {"APP_HOME": "/app", "SERVER_START_CMD": "python /app/main.py", "INFERENCE_SERVER_PORT": "8080"}),
    ("Truss", {"APP_HOME": "/app", "SERVER_START_CMD": "vllm serve"}),
    ("Beam", {"CONTAINER_ID": "endpoint-1", "STUB_ID": "1", "STUB_TYPE": "endpoint/deployment"}),
    ("RunPod", {"RUNPOD_ENDPOINT_ID": "abc", "RUNPOD_POD_ID": "xyz"}),
    ("RunPod", {"RUNPOD_POD_ID": "xyz"}),
    ("Modal", {"MODAL_TASK_ID": "ta-1", "MODAL_IMAGE_ID": "im-1", "MODAL_REGION": "us-east-1"}),
    ("LitServe", {"LITSERVE_WORKER_ID": "0"}),
    ("Ray Serve", {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": "42"}),
]
STRANGERS = [
    {},
    {"PATH": "/usr/bin", "HOME": "/root", "PORT": "8000", "WORKERS": "2"},
    {"CONTAINER_ID": "1"},  # any orchestrator's
    {"APP_HOME": "/app"},
    {"PIPELINE_NAME": "nightly"},  # a CI's
    {"MODAL_ENVIRONMENT": "dev"},  # Modal's command line, on a desk
    {"RAY_ADDRESS": "auto"},
    {"BENTOML_HOME": "/home/me/bentoml"},
    {"LITSERVE_WORKER_ID": ""},
]


@pytest.mark.parametrize(("name", "environ"), ENVIRONS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_platform_is_recognised(name: str, environ: dict[str, str], tmp_path: Path):
    found = recognise(environ, tmp_path)
    assert found is not None
    assert (found.name, found.settings) == (name, {})


def test_every_platform_of_the_table_is_tried():
    assert {known.name for known in PLATFORMS} == {name for name, _ in ENVIRONS}


@pytest.mark.parametrize("environ", STRANGERS, ids=lambda environ: next(iter(environ), "nothing"))
def test_what_is_no_platforms_is_none(environ: dict[str, str], tmp_path: Path):
    assert recognise(environ, tmp_path) is None
    assert fastload_platform(environ) is None


# -- where the cache lies ---------------------------------------------------------------------------------------------

BEAM = {"CONTAINER_ID": "c", "STUB_ID": "s", "STUB_TYPE": "endpoint/deployment"}
TRUSS = {"APP_HOME": "/app", "SERVER_START_CMD": "python /app/main.py"}
BENTO = {"BENTOML_HF_CACHE_DIR": "/home/bentoml/bento/hf-models"}
RUNPOD = {"RUNPOD_ENDPOINT_ID": "abc"}


@pytest.mark.parametrize(
    ("environ", "folders", "place"),
    [
        (BEAM, ["volumes/weights"], "volumes/weights/huggingface/hub"),
        (BEAM, ["volumes/weights", "volumes/checkpoint-model-cache-app"], "volumes/weights/huggingface/hub"),
        (BEAM, ["volumes/weights", "volumes/data"], None),  # which one is for the user to say
        (BEAM, ["volumes"], None),
        (TRUSS | {"BASETEN_FS_ENABLED": "True"}, ["cache/org"], "cache/org/huggingface/hub"),
        (TRUSS | {"BASETEN_FS_ENABLED": "True"}, [], None),
        (TRUSS | {"BASETEN_FS_ENABLED": "False"}, ["cache/org"], None),
        (RUNPOD, ["runpod-volume"], "runpod-volume/huggingface-cache/hub"),
        (BENTO, ["home/bentoml/bento/hf-models"], "home/bentoml/bento/hf-models"),
        (BENTO | RUNPOD, ["home/bentoml/bento/hf-models", "runpod-volume"], "home/bentoml/bento/hf-models"),
        (BENTO | RUNPOD, ["runpod-volume"], "runpod-volume/huggingface-cache/hub"),  # nothing was put into the image
        ({"INFERENCE_SERVICE_NAME": "llama"}, ["mnt/models/hub"], "mnt/models/hub"),
        ({"INFERENCE_SERVICE_NAME": "llama"}, ["mnt/models"], None),  # KServe's own initializer: a plain folder
        ({"MLSERVER_MODELS_DIR": "/mnt/models"}, ["mnt/models/hub"], "mnt/models/hub"),
        ({"LITSERVE_WORKER_ID": "0"} | BEAM, ["volumes/weights"], "volumes/weights/huggingface/hub"),
    ],
)
def test_the_cache_lies_on_the_platforms_volume(
    environ: dict[str, str], folders: list[str], place: str | None, tmp_path: Path
):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    found = recognise(environ, tmp_path)
    assert found is not None
    assert found.settings.get("cache_dir") == (tmp_path / place if place else None)


def test_a_bucket_is_no_place_for_a_cache(tmp_path: Path):
    (tmp_path / "volumes/bucket").mkdir(parents=True)
    (tmp_path / "volumes/weights").mkdir()
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mounts").write_text(
        "overlay / overlay rw 0 0\nmountpoint-s3 /volumes/bucket fuse rw 0 0\njuicefs /volumes/weights fuse rw 0 0\n"
    )
    found = recognise(BEAM, tmp_path)
    assert found is not None
    assert found.settings == {"cache_dir": tmp_path / "volumes/weights/huggingface/hub"}


# -- precedence -------------------------------------------------------------------------------------------------------


def resolved(environ: dict[str, str], **arguments: object) -> tuple[str, str]:
    platform = {"cache_dir": Path("/volumes/weights")}
    settings = Settings.resolve(environ=environ, platform=platform, platform_name="Beam", **arguments)
    return str(settings.cache_dir), settings.origins.get("cache_dir", "default")


@pytest.mark.parametrize(
    ("environ", "arguments", "expected"),
    [
        ({}, {}, ("/volumes/weights", "platform Beam")),
        ({"HF_HOME": "/h"}, {}, ("/h/hub", "HF_HOME")),
        ({"XDG_CACHE_HOME": "/x"}, {}, ("/x/huggingface/hub", "XDG_CACHE_HOME")),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, {}, ("/c", "HF_HUB_CACHE")),
        ({"HF_HUB_CACHE": "/c"}, {"cache_dir": "/a"}, ("/a", "argument")),
        ({}, {"cache_dir": "/a"}, ("/a", "argument")),
    ],
)
def test_argument_beats_environment_beats_platform(
    environ: dict[str, str], arguments: dict[str, str], expected: tuple[str, str]
):
    assert resolved(environ, **arguments) == expected


def test_the_installed_plugin_is_asked_and_settings_names_the_platform(tmp_path: Path):
    """RunPod's volume cannot be made here; a Bento's folder can, and ``fastload settings`` shows both value and origin."""
    if "platforms" not in {record.name for record in plugins.report(Settings())}:
        pytest.skip("the entry point is not installed: `pip install -e .` anew")
    (tmp_path / "hf-models").mkdir()
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "BENTOML_HF_CACHE_DIR": str(tmp_path / "hf-models")}
    done = subprocess.run(
        [sys.executable, "-m", "fastload", "settings", "--json"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["settings"]}
    assert rows["cache_dir"]["value"] == str(tmp_path / "hf-models")
    assert rows["cache_dir"]["origin"] == "platform BentoML"


def test_recognising_imports_no_sdk():
    program = (
        "import sys, fastload_platforms; fastload_platforms.fastload_platform({'LITSERVE_WORKER_ID': '0'});"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    sdks = {"truss", "beam", "beta9", "pipeline", "cog", "litserve", "bentoml", "ray", "kserve", "mlserver", "modal"}
    assert not set(done.stdout.split()) & {*sdks, "runpod", "torch", "aiohttp"}
