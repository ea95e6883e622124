"""``fastload exec``: the bytes start first, the program stays what it is. Real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import until

from fastload import launch
from fastload.testing import Fault, Hub, write_tiny_llama

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of weights, large enough for a journal."""
    return write_tiny_llama(tmp_path_factory.mktemp("exec") / "model", shards=1, hidden=256, vocabulary=4096)


@pytest.fixture
def hub(model: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    started = make_hub({"org/model": model})
    monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
    return started


@pytest.fixture
def start() -> Iterator[Start]:
    """Run ``fastload exec`` with all three pipes; what still runs at the end of the test is killed."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*words: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastload", "exec", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", code]


def weights_held(requests: list[Any]) -> bool:
    return any(r.held and r.file == "model.safetensors" for r in requests)


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


# -- the transfer -----------------------------------------------------------------------------------------------------

LOAD = """
import sys
print("ready to load", flush=True)
sys.stdin.readline()
import fastload
snapshot = fastload.prefetch("org/model", files=["*.safetensors", "*.json"], observers=[
    lambda event: print(event.name, event.data.get("state"), flush=True)])
print(open(snapshot.path / "model.safetensors", "rb").read() == open(sys.argv[1], "rb").read())
sys.exit(7)
"""


def test_the_bytes_start_before_the_program_asks_and_its_load_joins(hub: Hub, start: Start, model: Path):
    hub.script(Fault("hold", path="*.safetensors", times=None))
    process = start("org/model", *python(LOAD), str(model / "model.safetensors"))
    assert process.stdin is not None
    hub.wait(weights_held)  # the program has asked for nothing yet
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout is not None
    seen = [process.stdout.readline()]
    while not seen[-1].startswith("file.planned elsewhere"):
        seen.append(process.stdout.readline())
        assert seen[-1], process.communicate()[1]
    hub.release()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[-1], err) == (7, "True", "")
    assert hub.bytes_sent("model.safetensors") == (model / "model.safetensors").stat().st_size


JOIN = """
import sys
print("ready to load", flush=True)
sys.stdin.readline()
import fastload
seen = []
tensors = fastload.load_tensors("org/model", observers=[lambda event: seen.append(event.name)])
names = {"transfer.started", "resolve.finished", "range.landed", "transfer.finished"}
print(len(tensors) > 0, names <= set(seen), flush=True)
sys.stdin.readline()
"""


def gone(pid: int) -> bool:
    return not [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_transfer_of(path, pid)]


def is_transfer_of(path: Path, program: int) -> bool:
    """Tell whether the process of *path* has the name of ``fastload exec`` still, and is not the program."""
    words = readable(path).split("\0")
    return "exec" in words and "JOINED" in "".join(words) and path.parent.name != str(program)


@pytest.mark.parametrize("early", [True, False])
def test_a_load_joins_and_neither_asks_nor_starts_a_process(hub: Hub, start: Start, early: bool, tmp_path: Path):
    """Early: while the weights arrive; else when all is there. Then the transfer process ends."""
    if early:
        hub.script(Fault("hold", path="*.safetensors", times=None))
    process = start("org/model", "--", sys.executable, "-c", JOIN, "JOINED")
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready to load\n"
    if early:
        hub.wait(weights_held)
    else:
        until(lambda: published(tmp_path), "the model is in the cache")
    process.stdin.write("go\n")
    process.stdin.flush()
    if early:
        hub.script()
        hub.release()
    assert process.stdout.readline() == "True True\n"
    until(lambda: gone(process.pid), "the transfer process ends")
    assert children(process.pid) == ""
    assert sum(r.path.startswith("/api/") for r in hub.requests) == 1
    process.communicate("end\n", timeout=60)
    assert process.returncode == 0


def published(folder: Path) -> bool:
    return any(folder.rglob("refs/main"))


PLAIN = """
import sys
print("ready to load", flush=True)
import huggingface_hub
path = huggingface_hub.hf_hub_download("org/model", "model.safetensors")
print(open(path, "rb").read() == open(sys.argv[1], "rb").read())
"""


def test_a_library_that_knows_nothing_of_it_finds_the_file(
    hub: Hub, start: Start, model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FASTLOAD_ACCELERATE", "0")  # else it does know
    hub.script(Fault("hold", path="*.safetensors", times=None))
    process = start("org/model", *python(PLAIN), str(model / "model.safetensors"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready to load\n"
    # The library has asked for the file's head, and must wait for our lock now or find the file later.
    hub.wait(lambda requests: weights_held(requests) and any(r.method == "HEAD" for r in requests))
    hub.script()
    hub.release()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "True\n"), err
    assert hub.bytes_sent("model.safetensors") == (model / "model.safetensors").stat().st_size


def test_several_models_are_fetched_in_their_order(make_hub: Any, model: Path, start: Start, monkeypatch: Any):
    hub = make_hub({"org/one": model, "org/two": model}, faults=[Fault("hold", path="*.safetensors", times=None)])
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    process = start("org/one", "org/two", *python("import sys; sys.stdin.read()"))
    hub.wait(weights_held)
    assert not [r for r in hub.requests if "org/two" in r.path]
    hub.script()
    hub.release()
    hub.wait(lambda requests: any("org/two" in r.path for r in requests))
    process.communicate(timeout=60)


def test_a_transfer_that_fails_says_so_and_the_program_runs_all_the_same(hub: Hub, start: Start):
    process = start("org/nothing", *python("import sys; sys.stdin.readline(); print('ran')"))
    assert process.stderr is not None
    assert process.stderr.readline().startswith("fastload exec: org/nothing: org/nothing ")
    out, err = process.communicate("go\n", timeout=60)
    assert (process.returncode, out) == (0, "ran\n")
    assert "Traceback" not in err


def test_a_wrong_setting_does_not_keep_the_program_from_running(hub: Hub, start: Start):
    process = start("org/model", "--set", "conections=3", *python("import sys; sys.stdin.readline()"))
    assert process.stderr is not None
    assert "'conections'" in process.stderr.readline()
    process.communicate("go\n", timeout=60)
    assert process.returncode == 0


# -- the program ------------------------------------------------------------------------------------------------------


def test_the_program_keeps_pid_arguments_and_exit_code(hub: Hub, start: Start):
    process = start("org/model", *python("import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(42)"), "--", "-x")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (42, f"{process.pid} ['--', '-x']\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP, signal.SIGPIPE])
def test_a_signal_reaches_the_program_alone_and_ends_it_as_it_would(hub: Hub, start: Start, number: signal.Signals):
    hub.script(Fault("hold", path="*.safetensors", times=None))
    process = start("org/model", "--", "sh", "-c", "echo there; read line")
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    hub.wait(weights_held)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number


def test_ignored_signals_are_those_that_were_ignored_before(hub: Hub, start: Start):
    show = ["--", "grep", "SigIgn", "/proc/self/status"]
    plain = subprocess.run(show[1:], capture_output=True, text=True, check=True).stdout
    process = start("org/model", *show)
    assert process.communicate(timeout=60)[0] == plain

    def ignore() -> None:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)

    process = start("org/model", *show, preexec_fn=ignore)
    ignored = int(process.communicate(timeout=60)[0].split()[1], 16)
    assert ignored == int(plain.split()[1], 16) | 1 << signal.SIGTERM - 1 | 1 << signal.SIGCHLD - 1


def test_the_program_has_no_child_and_no_descriptor_of_ours(hub: Hub, start: Start):
    hub.script(Fault("hold", path="*.safetensors", times=None))
    process = start("org/model", "--", "sh", "-c", "echo there; read line; ls /proc/$$/fd")
    hub.wait(weights_held)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    assert children(process.pid) == ""
    out, _ = process.communicate("go\n", timeout=60)
    plain = subprocess.run(["sh", "-c", "ls /proc/$$/fd"], capture_output=True, text=True, stdin=subprocess.PIPE)
    assert out == plain.stdout


def test_what_the_program_closes_is_closed(hub: Hub, start: Start):
    """The transfer process keeps no pipe that the program was given."""
    hub.script(Fault("hold", path="*.safetensors", times=None))
    ours, its = os.pipe()
    process = start("org/model", *python(f"import os, sys; os.close({its}); sys.stdin.readline()"), pass_fds=[its])
    os.close(its)
    hub.wait(weights_held)
    assert os.read(ours, 1) == b""
    os.close(ours)
    process.communicate("go\n", timeout=60)


def test_the_terminal_and_the_group_of_the_program_do_not_reach_the_transfer(hub: Hub, start: Start, tmp_path: Path):
    hub.script(Fault("hold", path="*.safetensors", times=None))
    process = start("org/model", "--cache-dir", str(tmp_path / "cache"), "--", "cat")
    hub.wait(weights_held)
    named = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in readable(path)]
    [transfer] = [int(path.name) for path in named]  # the program itself has another command line now
    assert os.getsid(transfer) != os.getsid(process.pid)
    assert os.getpgid(transfer) != os.getpgid(process.pid)
    process.communicate(timeout=60)


def readable(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


@pytest.mark.parametrize("code", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_transfer_ends_with_the_program_and_keeps_what_landed(hub: Hub, start: Start, model: Path, code: str):
    size = (model / "model.safetensors").stat().st_size
    words = ["--set", "range_bytes=64KiB", "--set", "connections=2", "--set", "ring_bytes=256KiB"]
    hub.script(Fault("hold", path="*.safetensors", skip=size // 65536 // 2, times=None))
    process = start("org/model", *words, *python(f"import sys; sys.stdin.readline(); {code}"))
    hub.wait(weights_held)
    process.communicate("go\n", timeout=60)  # ends only when the transfer process has let go of stderr
    hub.script()
    hub.clear()
    again = start("org/model", *words, *python(LOAD), str(model / "model.safetensors"))
    out, err = again.communicate("go\n", timeout=60)
    assert (again.returncode, out.splitlines()[-1], err) == (7, "True", "")
    assert 0 < hub.bytes_sent("model.safetensors") < size


@pytest.mark.parametrize(("word", "code"), [("/no/such/program", 127), ("/etc/passwd", 126)])
def test_a_program_that_cannot_be_run_is_an_error_as_in_a_shell(hub: Hub, start: Start, word: str, code: int):
    process = start("org/model", "--", word)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith(f"fastload exec: {word}: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["org/model"], ["org/model", "--"], ["--", "true"]])
def test_exec_without_a_program_or_a_model_is_wrong_usage(start: Start, words: list[str]):
    process = start(*words)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "required" in err


def test_nothing_heavy_is_imported_before_the_program_begins():
    code = (
        "import sys, fastload.cli, fastload.launch\n"
        "fastload.launch._detach = lambda body: None\n"
        "fastload.launch.os.execvp = lambda *words: print(words, *sys.modules) or sys.exit(0)\n"
        "fastload.cli.main(['exec', 'org/model', '--', 'true'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "('true'," in done.stderr
    assert not loaded & {"aiohttp", "asyncio", "huggingface_hub", "pluggy", "torch", "rich"}


def test_where_no_process_can_be_started_the_program_runs_all_the_same(hub: Hub):
    code = (
        "import fastload.cli, fastload.launch\n"
        "def refuse(): raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "fastload.launch.os.fork = refuse\n"
        "fastload.cli.main(['exec', 'org/model', '--', 'echo', 'ran'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "no transfer process can be started: Resource temporarily unavailable" in done.stderr


# -- kernels that cannot tell -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(38, "not implemented"), PermissionError("seccomp")])
async def test_without_pidfd_the_program_is_looked_for(monkeypatch: pytest.MonkeyPatch, error: OSError):
    def refuse(pid: int) -> int:
        raise error

    monkeypatch.setattr(launch.os, "pidfd_open", refuse)
    monkeypatch.setattr(launch, "_POLL_S", 0.0)
    silenced = threading.Event()
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # noqa: ASYNC220
    transfers = launch._Transfers(process.pid, silenced.set)
    ended = asyncio.Event()
    transfers._cancel = ended.set
    transfers._watch(asyncio.get_running_loop())
    assert not silenced.is_set()
    await asyncio.to_thread(process.communicate)
    await ended.wait()
    assert silenced.is_set()


def test_garbage_is_collected_rarely_until_the_program_has_loaded(start: Start, hub: Hub):
    look = "print(gc.get_threshold()[0] > 100_000)"
    process = start("org/model", *python(
        f"import gc; from fastload import starting; starting.begin(); {look};"  # begin: as the wheel's .pth file does
        f"import fastload; fastload.load_tensors('org/model'); {look}"
    ))  # fmt: skip
    said, errors = process.communicate()
    assert (said.split(), errors) == (["True", "False"], "")
