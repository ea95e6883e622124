"""The command: results on stdout, everything else on stderr, exit codes, and an end without a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastload import cli
from fastload.lock import Lock
from fastload.settings import Settings
from fastload.testing import Fault, Hub, write_tiny_llama

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process, in an empty folder; returns exit code, stdout, stderr."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = cli.main(words)
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def start(words: Sequence[str], **options: object) -> subprocess.Popen[str]:
    """Run the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastload", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,  # type: ignore[call-overload]
    )  # fmt: skip


# -- prefetch ---------------------------------------------------------------------------------------------------------


def test_prefetch_prints_where_the_snapshot_is(run: Run, hub: Hub):
    code, out, err = run("prefetch", "org/tiny")
    assert (code, err) == (0, "")
    snapshot = Path(out.strip())
    assert snapshot.name == hub.commit("org/tiny")
    assert (snapshot / "config.json").is_file()


def test_prefetch_prints_one_json_document(run: Run, hub: Hub):
    code, out, _ = run("prefetch", "org/tiny", "--json", "--files", "*.json", "--files", "*00001*")
    [snapshot] = json.loads(out)["snapshots"]
    assert (code, snapshot["source"], snapshot["commit"]) == (0, "org/tiny", hub.commit("org/tiny"))
    assert "model-00001-of-00002.safetensors" in snapshot["files"]
    assert "model-00002-of-00002.safetensors" not in snapshot["files"]
    assert sorted(p.name for p in Path(snapshot["path"]).iterdir()) == snapshot["files"]


def test_prefetch_takes_several_sources(run: Run, make_hub: Callable[..., Hub], tiny_model: Path, monkeypatch):
    hub = make_hub({"org/one": tiny_model, "org/two": tiny_model})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    code, out, _ = run("prefetch", "org/one", "org/two")
    assert code == 0
    assert len(out.splitlines()) == 2


def test_cache_dir_mirrors_and_settings_reach_the_load(run: Run, hub: Hub, make_hub, tiny_model: Path, tmp_path: Path):
    mirror = make_hub({"org/tiny": tiny_model})
    hub.script(Fault("drop", path="*.safetensors"))
    words = ["--cache-dir", str(tmp_path / "elsewhere"), "--mirror", mirror.endpoint, "--set", "connections=1"]
    code, out, _ = run("prefetch", "org/tiny", *words)
    assert code == 0
    assert out.startswith(str(tmp_path / "elsewhere"))
    assert mirror.bytes_sent() > 0


def test_prefetch_never_imports_torch(hub: Hub):
    code = (
        "import sys; from fastload.cli import main; code = main(['prefetch', 'org/tiny', '--quiet'])\n"
        "print(code, sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy', 'rich'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


# -- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.transformers
def test_load_prints_where_the_time_went(run: Run, hub: Hub):
    code, out, _ = run("load", "org/tiny", "--quiet")
    assert code == 0
    assert out.splitlines()[0].endswith("LlamaForCausalLM")
    for phase in ("resolve", "download", "build"):
        assert phase in out


def test_load_may_take_the_tensors_alone(run: Run, hub: Hub):
    pytest.importorskip("torch")
    code, out, _ = run("load", "org/tiny", "--tensors", "--quiet")
    assert code == 0 and out.splitlines()[0] == "21 tensors"


@pytest.mark.transformers
def test_load_prints_its_profile_as_json_and_nothing_else(run: Run, hub: Hub):
    code, out, _ = run("load", "org/tiny", "--json", "--dtype", "float32", "--framework", "transformers")
    record = json.loads(out)
    assert code == 0
    assert record["type"].endswith("LlamaForCausalLM")
    [load] = record["loads"]
    assert (load["ok"], load["source"], load["commit"]) == (True, "org/tiny", hub.commit("org/tiny"))
    assert load["travelled_bytes"] == load["planned_bytes"] > 200_000


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_is_content_with_a_sound_snapshot(run: Run, hub: Hub):
    run("prefetch", "org/tiny")
    code, out, _ = run("verify", "org/tiny")
    assert code == 0
    assert "0 of 5 files are corrupt or missing" in out


@pytest.mark.parametrize("damage", ["corrupt", "missing"])
def test_verify_finds_damage(run: Run, hub: Hub, damage: str):
    _, out, _ = run("prefetch", "org/tiny")
    weights = Path(out.strip()) / "model-00002-of-00002.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        blob = weights.resolve()
        blob.chmod(0o644)
        data = bytearray(blob.read_bytes())
        data[1000] ^= 1
        blob.write_bytes(data)
    code, out, _ = run("verify", "org/tiny@main")
    assert code == 1
    assert f"{damage}: model-00002-of-00002.safetensors" in out
    code, out, _ = run("verify", "org/tiny", "--json")
    record = json.loads(out)
    assert (code, record["ok"]) == (1, False)
    assert [f["path"] for f in record["files"] if f["state"] == damage] == ["model-00002-of-00002.safetensors"]


def test_verify_of_what_was_never_fetched_is_an_error(run: Run, hub: Hub):
    code, out, err = run("verify", "org/tiny")
    assert (code, out) == (1, "")
    assert "hint: `fastload prefetch` fetches it" in err
    assert not hub.requests


# -- lock -------------------------------------------------------------------------------------------------------------


def test_lock_pins_what_the_hub_lists_and_locked_needs_no_listing(run: Run, hub: Hub):
    code, out, _ = run("lock", "org/tiny")
    assert code == 0
    assert hub.commit("org/tiny") in out
    manifest = Lock.read("fastload.lock").manifest("org/tiny")
    assert manifest is not None
    listed = hub.manifest("org/tiny")
    assert [(f.path, f.size, f.digest) for f in manifest.files] == [(f.path, f.size, f.digest) for f in listed.files]
    hub.clear()
    code, _, _ = run("prefetch", "--locked", "org/tiny")  # the word after it is the source
    assert code == 0
    assert not [r for r in hub.requests if r.path.startswith("/api/")]


def test_a_locked_prefetch_without_a_source_takes_all_of_the_lock(run: Run, hub: Hub):
    run("lock", "org/tiny", "-o", "pinned.lock")
    code, out, _ = run("prefetch", "--locked", "pinned.lock", "--json")
    assert code == 0
    assert [s["source"] for s in json.loads(out)["snapshots"]] == ["org/tiny"]


def test_a_moved_branch_does_not_move_what_is_locked(run: Run, hub: Hub, tmp_path: Path):
    run("lock", "org/tiny")
    before = hub.commit("org/tiny")
    hub.update("org/tiny", write_tiny_llama(tmp_path / "newer", seed=1))
    assert hub.commit("org/tiny") != before
    code, out, _ = run("prefetch", "org/tiny", "--locked", "fastload.lock")
    assert code == 0
    assert Path(out.strip()).name == before


def test_lock_adds_to_the_lock_that_is_there(run: Run, make_hub, tiny_model: Path, monkeypatch):
    hub = make_hub({"org/one": tiny_model, "org/two": tiny_model})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    run("lock", "org/two")
    code, out, _ = run("lock", "org/one", "--json")
    assert (code, json.loads(out)["path"]) == (0, "fastload.lock")
    assert [m.source for m in Lock.read("fastload.lock").manifests] == ["org/one", "org/two"]


def test_a_missing_lock_says_how_to_write_one(run: Run):
    code, _, err = run("prefetch", "--locked", "org/tiny")
    assert code == 1
    assert "fastload.lock: no such lock file" in err
    assert "hint: `fastload lock" in err


# -- plugins and settings ---------------------------------------------------------------------------------------------


def test_plugins_lists_built_in_ones(run: Run):
    code, out, _ = run("plugins")
    assert code == 0
    assert "fastload_source" in out
    code, out, _ = run("plugins", "--json", "--set", "plugins=")
    names = {record["name"]: record for record in json.loads(out)["plugins"]}
    assert names["safetensors"]["hooks"] == ["fastload_format"]
    assert names["safetensors"]["error"] is None


def test_a_plugin_that_is_not_there_is_a_line_and_not_a_failure(run: Run):
    code, out, _ = run("plugins", "--set", "plugins=nothing_like_it")
    assert code == 0
    assert "nothing_like_it" in out


def test_settings_shows_value_and_origin_and_hides_the_token(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, _ = run("settings", "--set", "connections=3")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["connections"].split()[1:3] == ["3", "argument"]
    assert rows["token"].split()[1:3] == ["***", "HF_TOKEN"]
    code, out, _ = run("settings", "--json")
    assert "hf_secret" not in out
    assert [r["name"] for r in json.loads(out)["settings"]] == [r["name"] for r in Settings().table()]


# -- errors and exit codes --------------------------------------------------------------------------------------------


def test_an_error_is_printed_as_message_and_hint_on_stderr(run: Run, hub: Hub):
    code, out, err = run("prefetch", "org/nothing")
    assert (code, out) == (1, "")
    assert err.startswith("org/nothing ")
    assert "\nhint: " in err
    assert "Traceback" not in err


def test_attempts_stand_between_message_and_hint(run: Run, hub: Hub):
    hub.script(Fault("status", path="*.safetensors", status=404))
    code, _, err = run("prefetch", "org/tiny", "--set", "attempts=1")
    assert code == 1
    assert "404" in err


def test_an_error_is_a_json_document_on_stdout(run: Run, hub: Hub):
    code, out, err = run("prefetch", "org/nothing", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "NotFoundError"
    assert err == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["prefetch"], "SOURCE"),
        (["load"], "SOURCE"),
        (["exec"], "SOURCE"),
        (["exec", "org/tiny"], "COMMAND"),
        (["profile"], "compare"),
        (["load", "one", "two"], "two"),
        (["lock"], "SOURCE"),
        (["prefetch", "org/tiny", "--set", "connections"], "NAME=VALUE"),
        (["prefetch", "org/tiny", "--conections", "3"], "--conections"),
        (["fetch"], "fetch"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, words: list[str], named: str):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert named in err


def test_a_typo_in_a_setting_names_it(run: Run):
    code, _, err = run("prefetch", "org/tiny", "--set", "conections=3")
    assert code == 1
    assert "'conections'" in err
    assert "'connections'" in err


def test_what_a_framework_prints_stays_out_of_the_result(run: Run, monkeypatch: pytest.MonkeyPatch):
    import fastload

    def load(source: str, **options: object) -> object:
        print("a framework's banner")
        return {}

    monkeypatch.setattr(fastload, "load", load, raising=False)
    code, out, err = run("load", "org/tiny", "--json")
    assert (code, json.loads(out)["type"]) == (0, "builtins.dict")
    assert err == "a framework's banner\n"


def test_version_and_help(run: Run):
    assert run("--version")[1].startswith("fastload ")
    for command in ([], *([name] for name in cli._COMMANDS)):
        code, out, _ = run(*command, "--help")
        assert (code, out.startswith("usage: fastload")) == (0, True)


# -- signals and pipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_download_says_so_and_goes_on_later(tmp_path: Path, make_hub, monkeypatch, sent: int, code: int):
    """Real processes: the first is stopped while the hub holds its bytes back, the second fetches what is missing."""
    model = write_tiny_llama(tmp_path / "model", shards=1, hidden=256, vocabulary=2048)
    hub = make_hub({"org/model": model})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    size = (model / "model.safetensors").stat().st_size
    words = ["prefetch", "org/model", "--quiet", "--set", "range_bytes=64KiB", "--set", "connections=2"]
    words += ["--set", "ring_bytes=256KiB"]
    hub.script(Fault("stall", path="*.safetensors", skip=size // 65536 // 2))
    process = start(words)
    hub.wait(lambda requests: any(r.held for r in requests))
    landed_first = hub.bytes_sent("model.safetensors")
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err == "interrupted; what has arrived is kept, and the same command goes on from there\n"

    hub.script()
    hub.clear()
    again = start(words)
    out, err = again.communicate(timeout=60)
    assert (again.returncode, err) == (0, "")
    assert (Path(out.strip()) / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert landed_first > 0
    assert hub.bytes_sent("model.safetensors") < size


def test_nobody_reads_stdout_any_more(tmp_path: Path):
    process = start(["settings"])
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (141, "")


def test_a_terminal_that_speaks_ascii_gets_no_unicode_error():
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start(["settings"], env=environ)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.isascii()
