"""``fastload profile`` and the files that ``load`` and it write. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastload import cli, history, profiling
from fastload.errors import UnsupportedSourceError
from fastload.testing import Fault, Hub

OUTPUTS = ["--trace", "t.json", "--html", "w.html", "--svg", "t.svg", "--metrics", "m.prom", "--history", "h.jsonl"]

APP = """
import sys
import fastload
print(__name__, sys.argv[1:], sys.path[0])
fastload.prefetch("org/tiny")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


def profiled(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastload", "profile", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)  # type: ignore[call-overload,no-any-return]


def check_outputs(folder: Path, *, ok: bool) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["h.jsonl", "m.prom", "t.json", "t.svg", "w.html"]
    names = {e["name"] for e in json.loads((folder / "t.json").read_text())["traceEvents"]}
    assert "org/tiny" in names
    assert "org/tiny" in (folder / "w.html").read_text()
    assert f'outcome="{"ok" if ok else "failed"}"' in (folder / "m.prom").read_text()
    [record] = history.read(folder / "h.jsonl")
    assert record["ok"] is ok
    assert {"interpreter", "unaccounted"} <= record["shares"]["phases"].keys()


# -- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.transformers
def test_load_writes_what_was_asked_for(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["load", "org/tiny", "--quiet", *OUTPUTS]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("cold start ")
    check_outputs(folder, ok=True)


def test_a_load_that_fails_is_written_too(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]):
    hub.script(Fault("status", path="*.safetensors", status=404, times=None))
    assert cli.main(["load", "org/tiny", "--quiet", "--set", "attempts=1", *OUTPUTS]) == 1
    check_outputs(folder, ok=False)


def test_a_file_that_cannot_be_written_is_an_error(hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch):
    import fastload

    monkeypatch.setattr(fastload, "load", lambda source, **options: {}, raising=False)
    assert cli.main(["load", "org/tiny", "--trace", "no/such/folder/t.json"]) == 1
    assert "no/such/folder/t.json: cannot be written" in capsys.readouterr().err


# -- profile -- program -----------------------------------------------------------------------------------------------


def test_a_script_runs_as_it_would_and_is_profiled(hub: Hub, folder: Path, tmp_path: Path):
    script = tmp_path / "app.py"
    script.write_text(APP + "sys.exit(3)")
    done = profiled(*OUTPUTS, "--", sys.executable, "-X", "utf8", "-W", "error", str(script), "a", "--", "-b")
    assert (done.returncode, done.stdout) == (3, f"__main__ ['a', '--', '-b'] {tmp_path}\n")
    assert done.stderr.startswith("fastload profile: cold start ")
    assert "imports " in done.stderr
    check_outputs(folder, ok=True)


def test_a_module_and_a_command_are_profiled(hub: Hub, folder: Path):
    (folder / "app_module.py").write_text(APP)
    done = profiled("--", sys.executable, "-m", "app_module", "x")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["__main__", "['x']"]), done.stderr
    done = profiled("--", sys.executable, "-c", APP, "y")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["__main__", "['y']"]), done.stderr


def test_an_installed_script_is_profiled(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "serve-it"
    script.write_text(f"#!{sys.executable}\n{APP}")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = profiled("--", "serve-it", "z")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["__main__", "['z']"]), done.stderr


def test_a_program_that_fails_fails_as_it_would_and_is_profiled(hub: Hub, folder: Path):
    done = profiled(*OUTPUTS, "--", sys.executable, "-c", APP + "raise KeyError('its own')")
    assert done.returncode == 1
    assert "KeyError: 'its own'" in done.stderr
    check_outputs(folder, ok=True)


def test_a_server_that_is_terminated_is_profiled_and_dies_of_the_signal(hub: Hub, folder: Path):
    code = APP + "print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-m", "fastload", "profile", *OUTPUTS, "--", sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert "cold start" in err
    check_outputs(folder, ok=True)


def test_a_load_in_a_thread_that_outlives_the_program_is_profiled(hub: Hub, folder: Path):
    code = (
        "import threading, fastload\n"
        "begun = threading.Event()\n"
        "def serve():\n"
        "    with fastload.stream('org/tiny') as weights:\n"
        "        weights.keys()\n"
        "        begun.set()\n"
        "        threading.main_thread().join()\n"
        "threading.Thread(target=serve).start()\n"
        "begun.wait()\n"
    )
    assert profiled(*OUTPUTS, "--", sys.executable, "-c", code).returncode == 0
    check_outputs(folder, ok=True)


def test_a_forked_worker_writes_files_of_its_own(hub: Hub, folder: Path):
    code = (
        "import os, sys, fastload\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    fastload.prefetch('org/tiny'); print(os.getpid()); sys.exit()\n"
        "os.waitpid(pid, 0)\n"
    )
    done = profiled("--trace", "t.json", "--history", "h.jsonl", "--", sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    child = done.stdout.strip()
    assert sorted(p.name for p in folder.iterdir()) == ["h.jsonl", "t.json", f"t.json.{child}"]
    assert len(history.read(folder / "h.jsonl")) == 1


def test_a_program_without_a_load_is_profiled_to_its_end(folder: Path):
    done = profiled("--json", "--", sys.executable, "-c", "import json.tool")
    assert done.returncode == 0
    assert done.stderr.startswith("fastload profile: cold start ")
    assert "(failed)" not in done.stderr


@pytest.mark.parametrize("word", ["/bin/sh", "no-such-program-at-all"])
def test_what_is_no_python_program_is_an_error(word: str):
    done = profiled("--", word)
    assert done.returncode == 1
    assert f"{word} is no Python program" in done.stderr


@pytest.mark.parametrize(
    "words", [[], ["--"], ["compare"], ["compare", "a"], ["run", "a", "b"], ["compare", "a", "b", "--", "x"]]
)
def test_anything_else_is_wrong_usage(words: list[str]):
    done = profiled(*words)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["app.py", "-m", "x"], ["app.py", "-m", "x"]),
        (["-u", "-X", "dev", "-W", "error", "app.py"], ["-u", "-X", "dev", "-W", "error", "app.py"]),
        (["-um", "app", "-c"], ["-u", "-m", "app", "-c"]),
        (["-Xutf8", "-c", "pass"], ["-Xutf8", "-c", "pass"]),
    ],
)
def test_options_of_the_interpreter_stay_its_own(words: list[str], expected: list[str]):
    command = profiling.command_for(["python3.11", *words], profiling.Outputs())
    at = command.index("fastload.observed")
    assert command[0] == "python3.11"
    assert command[1 : at - 1] + command[at + 2 :] == expected


@pytest.mark.parametrize("words", [[], ["-u"], ["-"], ["-m"], ["-c"]])
def test_an_interpreter_without_a_program_is_an_error(words: list[str]):
    with pytest.raises(UnsupportedSourceError, match="names no program"):
        profiling.command_for(["python", *words], profiling.Outputs())


# -- compare ----------------------------------------------------------------------------------------------------------


def test_compare_prints_percentiles_and_what_moved(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]):
    import fastload

    def add(path: str, count: int) -> None:
        for _ in range(count):
            with fastload.profile() as p:
                fastload.prefetch("org/tiny")
            history.append(path, p.loads)

    add("a.jsonl", 1)
    add("b.jsonl", 2)
    assert cli.main(["profile", "compare", "a.jsonl", "b.jsonl"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("seconds")
    assert "total" in out
    assert out.endswith("loads that came to a good end: 1 before, 2 after\n")
    assert cli.main(["profile", "compare", "a.jsonl", "b.jsonl", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["before"], record["after"], record["changes"][0]["name"]) == (1, 2, "total")


def test_compare_of_what_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["profile", "compare", "a.jsonl", "b.jsonl"]) == 1
    assert "a.jsonl: the history cannot be read" in capsys.readouterr().err
