"""Settings: argument > environment > platform > default, every value checked, every error naming setting and origin."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

import fastload
from fastload.errors import SettingsError
from fastload.settings import MIB, Settings


def resolve(environ: dict[str, str] | None = None, **arguments: object) -> Settings:
    return Settings.resolve(environ=environ or {}, **arguments)


def origin(settings: Settings, name: str) -> str:
    return next(row["origin"] for row in settings.table() if row["name"] == name)


def test_argument_beats_environment_beats_platform_beats_default():
    environ = {"FASTLOAD_CONNECTIONS": "5"}
    platform = {"connections": 3, "shards": 7}
    settings = Settings.resolve({"attempts": 2}, environ=environ, platform=platform)
    assert (settings.connections, origin(settings, "connections")) == (5, "FASTLOAD_CONNECTIONS")
    assert (settings.shards, origin(settings, "shards")) == (7, "platform")
    assert (settings.attempts, origin(settings, "attempts")) == (2, "argument")
    assert (settings.stall_s, origin(settings, "stall_s")) == (10.0, "default")
    assert Settings.resolve({"connections": 9}, environ=environ, platform=platform).connections == 9
    assert Settings.resolve({"connections": 9}, environ=environ, connections=1).connections == 1


def test_an_argument_that_is_none_says_nothing():
    assert resolve({"FASTLOAD_MIRRORS": "https://m.example"}, mirrors=None).mirrors == ("https://m.example",)


def test_settings_that_are_resolved_already_stay_as_they_are():
    settings = resolve(connections=3)
    assert Settings.resolve(settings, environ={"FASTLOAD_CONNECTIONS": "5"}) is settings
    assert Settings.resolve(settings, connections=4, shards=None).connections == 4


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        ({"HF_HOME": "/h"}, "cache_dir", Path("/h/hub")),
        ({"XDG_CACHE_HOME": "/x"}, "cache_dir", Path("/x/huggingface/hub")),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, "cache_dir", Path("/c")),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "cache_dir", Path("/old")),
        ({"HF_HUB_CACHE": "/c", "FASTLOAD_CACHE_DIR": "/f"}, "cache_dir", Path("/f")),
        ({"HF_HUB_CACHE": "~/c"}, "cache_dir", Path("~/c").expanduser()),
        ({"HF_HOME": "/h"}, "token_path", Path("/h/token")),
        ({"HF_TOKEN": " hf_x\n"}, "token", "hf_x"),  # as huggingface_hub cleans it; a newline would break the header
        ({"HF_TOKEN": "\n"}, "token", None),
        ({"HUGGING_FACE_HUB_TOKEN": "hf_y"}, "token", "hf_y"),
        ({"HF_ENDPOINT": "https://mirror.example/hf/"}, "endpoint", "https://mirror.example/hf"),
        ({"HF_HUB_OFFLINE": "1"}, "offline", True),
        ({"TRANSFORMERS_OFFLINE": "yes"}, "offline", True),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, "offline", False),  # as in huggingface_hub
        ({"HF_HUB_OFFLINE": ""}, "offline", False),
        ({"HF_HUB_DISABLE_SYMLINKS": "1"}, "symlinks", False),
        ({"HF_HUB_DISABLE_SYMLINKS": "0"}, "symlinks", True),
        ({"HF_HUB_DISABLE_SYMLINKS": "1", "FASTLOAD_SYMLINKS": "1"}, "symlinks", True),
        (
            {"FASTLOAD_MIRRORS": "https://a.example/, http://b.example:81"},
            "mirrors",
            ("https://a.example", "http://b.example:81"),
        ),
        ({"FASTLOAD_PLUGINS": ""}, "plugins", ()),  # empty says: built-in ones only
        ({"FASTLOAD_PLUGINS": "gguf, vllm"}, "plugins", ("gguf", "vllm")),
        ({}, "plugins", None),
        ({"FASTLOAD_RING_BYTES": "64MiB"}, "ring_bytes", 64 * MIB),
        ({"FASTLOAD_RING_BYTES": "1.5 gb"}, "ring_bytes", 1_500_000_000),
        ({"FASTLOAD_RING_BYTES": "67_108_864"}, "ring_bytes", 64 * MIB),
        ({"FASTLOAD_STALL_S": "2.5"}, "stall_s", 2.5),
        ({"SSL_CERT_FILE": "/ca.pem"}, "ca_file", Path("/ca.pem")),
    ],
)
def test_the_environment_is_read_as_hugging_face_reads_it(environ: dict[str, str], name: str, value: object):
    assert getattr(resolve(environ), name) == value


def test_an_empty_variable_says_nothing():
    empty = {name: "" for row in resolve().table() for name in row["env"] if name != "FASTLOAD_PLUGINS"}
    assert resolve({**empty, "HF_HUB_DISABLE_SYMLINKS": ""}) == resolve()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connections", 0),
        ("connections", "many"),
        ("connections", 1.5),
        ("connections", True),
        ("connections", "inf"),
        ("connections", float("nan")),
        ("connections", None),
        ("connections", []),
        ("range_bytes", "8 parsecs"),
        ("range_bytes", "1e999gb"),
        ("range_bytes", -1),
        ("stall_s", "soon"),
        ("stall_s", "nan"),
        ("stall_s", float("inf")),
        ("offline", "perhaps"),
        ("offline", 2),
        ("endpoint", "huggingface.co"),
        ("endpoint", "ftp://h"),
        ("endpoint", "https://"),
        ("endpoint", "http://[::1"),
        ("endpoint", "https://h:port"),
        ("endpoint", "https://h/?x=1"),
        ("endpoint", "https://h/#x"),
        ("endpoint", "https://h h"),
        ("mirrors", ["https://a.example", "b"]),
    ],
)
def test_a_wrong_value_is_refused_and_named_with_its_origin(name: str, value: object):
    with pytest.raises(SettingsError) as e:
        Settings.resolve({name: value}, environ={})
    assert name in str(e.value)
    assert "(argument)" in str(e.value)
    if isinstance(value, str):
        [*_, variable] = [v for v in _environment_names(name) if v.startswith("FASTLOAD_")]
        with pytest.raises(SettingsError, match=variable):
            resolve({variable: value})


def _environment_names(name: str) -> list[str]:
    return next(row["env"] for row in resolve().table() if row["name"] == name)


@pytest.mark.parametrize("url", ["https://user:s3cret@h", "ftp://user:s3cret@h", "https://s3cret@[::1"])
def test_credentials_in_an_address_are_refused_and_not_repeated(url: str):
    with pytest.raises(SettingsError, match="credentials") as e:
        resolve({"HF_ENDPOINT": url})
    assert "s3cret" not in str(e.value)


def test_a_typo_is_named_and_the_nearest_name_is_offered():
    with pytest.raises(SettingsError, match="unknown setting 'conections'") as e:
        Settings.resolve({"conections": 3}, environ={})
    assert "'connections'" in (e.value.hint or "")
    with pytest.raises(SettingsError, match="unknown setting 7"):
        Settings.resolve({7: 3}, environ={})  # type: ignore[dict-item]
    with pytest.raises(SettingsError, match="origins"):
        Settings.resolve({"origins": {}}, environ={})


def test_settings_of_another_kind_are_refused():
    with pytest.raises(SettingsError, match="not list"):
        Settings.resolve([("connections", 3)], environ={})  # type: ignore[arg-type]


def test_range_and_ring_are_judged_together():
    """Both variables set: the order in which they are read must not matter."""
    both = resolve({"FASTLOAD_RANGE_BYTES": "256MiB", "FASTLOAD_RING_BYTES": "512MiB"})
    assert (both.range_bytes, both.ring_bytes) == (256 * MIB, 512 * MIB)
    assert resolve({"FASTLOAD_RING_BYTES": "1MiB"}).range_bytes == MIB  # a small ring alone shrinks the ranges
    for environ in (
        {"FASTLOAD_RANGE_BYTES": "8MiB", "FASTLOAD_RING_BYTES": "1MiB"},
        {"FASTLOAD_RANGE_BYTES": "256MiB"},
    ):
        with pytest.raises(SettingsError, match=r"range_bytes=\d+ \(FASTLOAD_RANGE_BYTES\) must fit into ring_bytes"):
            resolve(environ)


def test_the_token_is_shown_nowhere():
    settings = resolve({"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in repr(settings)
    assert "hf_secret" not in json.dumps(settings.table())


def test_settings_cross_to_the_transfer_process_unchanged():
    environ = {
        "HF_TOKEN": "hf_x",
        "FASTLOAD_MIRRORS": "https://a.example",
        "FASTLOAD_PLUGINS": "",
        "SSL_CERT_FILE": "/ca",
    }
    settings = resolve(environ, stall_s=2.5, offline=True)
    assert Settings.from_record(json.loads(json.dumps(settings.to_record()))) == settings
    assert Settings.from_record(json.loads(json.dumps(resolve().to_record()))) == resolve()
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_settings_are_frozen_and_hashable():
    settings = resolve()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.connections = 1  # type: ignore[misc]
    assert hash(settings) == hash(resolve())


def test_only_settings_reads_the_environment():
    """Everybody else gets what it needs passed down.

    plugins: a copy for the platform hook; cli: NO_COLOR; launch and standby: what the processes that they start are to
    see; rendezvous: what launch has told them; starting: what is to be done before a program's first line.
    """
    readers = set()
    folder = Path(fastload.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("environ", "getenv")
                and ast.unparse(node.value) == "os"
            ):
                readers.add(path.relative_to(folder).as_posix())
    shipped = {reader for reader in readers if not reader.startswith("testing/")}
    processes = {"launch.py", "standby.py", "rendezvous.py", "starting.py"}
    assert shipped == {"settings.py", "plugins.py", "cli.py", "builtin/opentelemetry.py"} | processes  # TRACEPARENT
