"""What ``fastload serve`` makes of a user's hook, in which thread and loop it calls it, and what its channel believes."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastload
from fastload.builtin.supervised import tell
from fastload.errors import SettingsError, UnsupportedSourceError
from fastload.serving.channel import Channel
from fastload.serving.command import Weights, environment, hook_command, program_base, program_command, ready_url
from fastload.serving.hook import Hook, Predictor, encode, find
from fastload.serving.options import Options
from fastload.testing import Hub

Prepare = Callable[..., Callable[[Any], Any]]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("someapp")
    monkeypatch.setitem(sys.modules, "someapp", made)
    return made


@pytest.fixture
def prepare(module: ModuleType) -> Iterator[Prepare]:
    """Prepare a hook as the app's process does."""
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await awaitable

            return runner.run(wait())

        def call(target: Any, load: Callable[[], Any] | None = None) -> Callable[[Any], Any]:
            return Hook("someapp:hook", target, load).prepare(run)

        yield call


# -- forms ------------------------------------------------------------------------------------------------------------


def double(request: int) -> int:
    return request * 2


def test_what_a_hook_returns_is_the_predictor(prepare: Prepare):
    assert prepare(lambda: double)(3) == 6


def test_a_hook_that_takes_a_model_gets_it(prepare: Prepare):
    def setup(model: int, scale: int = 10) -> Callable[[int], int]:
        return lambda request: model * scale + request

    assert prepare(setup, lambda: 7)(1) == 71


def test_a_predict_function_is_bound_to_the_model(prepare: Prepare):
    loads = []

    def load() -> str:
        loads.append(1)
        return "model"

    predict = prepare(lambda model, request: (model, request), load)
    assert [predict(1), predict(2)] == [("model", 1), ("model", 2)]
    assert len(loads) == 1


async def asetup() -> Callable[[int], int]:
    await asyncio.sleep(0)
    return double


def test_an_async_hook_is_awaited(prepare: Prepare):
    assert prepare(asetup)(4) == 8


def test_a_plain_hook_runs_in_the_calling_thread_without_a_running_loop(prepare: Prepare):
    seen = []

    def setup() -> Callable[[int], int]:
        seen.append(threading.current_thread())
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return double

    prepare(setup)
    assert seen == [threading.current_thread()]


class Model:
    """As Truss and Cog want it."""

    def __init__(self) -> None:
        self.loaded = False

    def load(self) -> None:
        self.loaded = True

    def predict(self, request: Any) -> Any:
        return {"loaded": self.loaded, "request": request}


class AsyncModel(Model):
    async def setup(self) -> None:
        self.loaded = True


@pytest.mark.parametrize("target", [Model, AsyncModel, Model()], ids=["class", "async", "object"])
def test_an_object_is_set_up_and_asked_to_predict(prepare: Prepare, target: Any):
    assert prepare(target)(1) == {"loaded": True, "request": 1}


def test_on_start_hooks_load_for_themselves(prepare: Prepare, monkeypatch: pytest.MonkeyPatch):
    from fastload import lifecycle

    monkeypatch.setattr(lifecycle, "load", lambda source: source.upper())

    @fastload.on_start("org/model")
    def setup(model: str) -> Callable[[str], str]:
        return lambda request: model + request

    assert prepare(setup)("!") == "ORG/MODEL!"


def test_where_a_hook_returns_nothing_its_module_predicts(prepare: Prepare, module: ModuleType):
    module.predict = double  # type: ignore[attr-defined]
    assert prepare(lambda: None)(2) == 4


@pytest.mark.parametrize("made", [None, 3, {}, Model])
def test_a_hook_that_made_nothing_that_predicts_is_an_error(prepare: Prepare, made: Any):
    with pytest.raises(UnsupportedSourceError, match=type(made).__name__):
        prepare(lambda: made)


def test_a_hook_that_needs_a_model_says_so(prepare: Prepare):
    with pytest.raises(SettingsError, match="takes a model") as caught:
        prepare(lambda model: double)
    assert caught.value.hint == "--model org/name"
    with pytest.raises(SettingsError, match="3 arguments"):
        prepare(lambda a, b, c: None, lambda: 1)


def test_a_hook_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "foundapp.py").write_text("import json\nclass A:\n    class B: pass\ndef setup(): pass\n")
    (tmp_path / "brokenapp.py").write_text("import nosuchmodule\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find("foundapp:A.B").__name__ == "B"
    with pytest.raises(SettingsError, match="has no setpu") as caught:
        find("foundapp:setpu")
    assert "setup" in (caught.value.hint or "")
    with pytest.raises(SettingsError, match="no module 'nosuchapp'"):
        find("nosuchapp:setup")
    with pytest.raises(ModuleNotFoundError, match="nosuchmodule"):  # its own fault, with its own traceback
        find("brokenapp:setup")


# -- predictions ------------------------------------------------------------------------------------------------------


async def test_plain_predictors_run_one_at_a_time_in_a_thread_of_their_own():
    threads = []

    def predict(request: int) -> int:
        threads.append(threading.current_thread())
        return request

    predictor = Predictor(predict)
    assert await asyncio.gather(*(predictor(n) for n in range(5))) == list(range(5))
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()
    predictor.close()


async def test_async_predictors_run_in_the_loop():
    async def predict(request: int) -> threading.Thread:
        await asyncio.sleep(0)
        return threading.current_thread()

    class Callable_:
        async def __call__(self, request: int) -> threading.Thread:
            return threading.current_thread()

    for call in (predict, Callable_()):
        predictor = Predictor(call)
        assert await predictor(1) is threading.current_thread()
        predictor.close()


class Tensor:
    def tolist(self) -> list[float]:
        return [1.5, 2.0]


@pytest.mark.parametrize(
    ("answer", "body", "kind"),
    [
        ({"a": Tensor(), "b": {3}}, b'{"a": [1.5, 2.0], "b": [3]}', "application/json"),
        ("text", b'"text"', "application/json"),
        (b"\x00\x01", b"\x00\x01", "application/octet-stream"),
    ],
)
def test_answers_are_bytes_or_json(answer: Any, body: bytes, kind: str):
    assert encode(answer) == (body, kind)


@pytest.mark.parametrize("answer", [{"logits": [1.0, float("nan")]}, float("inf"), object(), {1, object()}])
def test_an_output_that_json_has_no_word_for_is_an_error(answer: Any):
    with pytest.raises(UnsupportedSourceError, match="cannot be sent as JSON"):
        encode(answer)


# -- how the app is started ---------------------------------------------------------------------------------------------


def test_settings_of_the_command_line_are_those_of_the_app_under_every_name(tmp_path: Path):
    given = {"cache_dir": str(tmp_path), "offline": "1", "mirrors": "http://a,http://b"}
    environ = environment({"PATH": "/bin", "HF_HUB_CACHE": "/other"}, Weights((), {"settings": given}), "@socket")
    assert {name: environ[name] for name in ("FASTLOAD_CACHE_DIR", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")} == dict.fromkeys(
        ("FASTLOAD_CACHE_DIR", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"), str(tmp_path)
    )  # fmt: skip
    assert (environ["HF_HUB_OFFLINE"], environ["FASTLOAD_MIRRORS"], environ["PATH"]) == (
        "1",
        "http://a,http://b",
        "/bin",
    )
    assert environ["FASTLOAD_EVENT_SOCKET"] == "@socket"
    assert not {"HF_TOKEN", "FASTLOAD_ACCELERATE"} & environ.keys()


def test_an_unchanged_from_pretrained_of_the_app_reads_along():
    weights = Weights([("org/one", None), ("org/two", "v1")])
    assert environment({}, weights, "@x")["FASTLOAD_ACCELERATE"] == "org/one,org/two"
    assert environment({"FASTLOAD_ACCELERATE": "0"}, weights, "@x")["FASTLOAD_ACCELERATE"] == "0"


def test_what_a_program_is_called_holds_none_of_its_options():
    assert Options(command=("/usr/bin/python", "server.py", "--api-key", "secret")).name == "python server.py"
    assert Options(command=("vllm", "serve", "org/model", "more", "words")).name == "vllm serve org/model"
    assert Options(command=("-strange",)).name == "-strange"
    assert Options(app="app:setup").name == "app:setup"


def test_a_hooks_model_is_loaded_as_it_was_asked_for():
    options = Options(app="app:setup", dtype="float16", predict_path="/p")
    weights = Weights(
        [("org/model", "v1"), ("org/other", None)], {"files": ["*.bin"], "mirrors": None, "lock": "f.lock"}
    )
    orders = json.loads(hook_command(options, weights, "@x")[-1])
    assert (orders["model"], orders["path"]) == ("org/model", "/p")
    assert orders["load"] == {"dtype": "float16", "files": ["*.bin"], "lock": "f.lock", "revision": "v1"}


@pytest.mark.parametrize(
    ("options", "base", "url"),
    [
        (Options(app_port=81), "http://127.0.0.1:81", "http://127.0.0.1:81/"),
        (Options(app_port=81, ready_url="/health?x=1"), "http://127.0.0.1:81", "http://127.0.0.1:81/health?x=1"),
        (Options(ready_url="http://localhost:82/health"), "http://localhost:82", "http://localhost:82/health"),
        (Options(app_port=83, ready_url="http://[::1]:{port}/h"), "http://127.0.0.1:83", "http://[::1]:83/h"),
    ],
)
def test_where_a_program_answers(options: Options, base: str, url: str):
    assert program_base(options) == base
    assert ready_url(options, base) == url


def test_a_program_without_a_port_gets_a_free_one():
    options = Options(command=("serve", "--port={port}", "{other}"))
    port = int(program_base(options).rpartition(":")[2])
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))
    assert program_command(options, port) == ["serve", f"--port={port}", "{other}"]


# -- what a load tells -------------------------------------------------------------------------------------------------


async def test_messages_arrive_in_their_order_and_what_means_nothing_is_passed_over():
    taken: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    done = asyncio.Event()

    def take(message: dict[str, Any]) -> None:
        taken.append(message)
        if message["kind"] == "last":
            done.set()

    with Channel(take) as channel:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            for data in (b"", b"{", b"[]", b'"text"', b'{"no": "kind"}', b"\xff" * 50):
                stranger.sendto(data, "\0" + channel.address[1:])
        for n in range(3):
            await asyncio.to_thread(tell, channel.address, {"kind": "event", "n": n})
        await asyncio.to_thread(tell, channel.address, {"kind": "last", "text": {"deep": "x" * 100_000}})
        await done.wait()
    kinds = [m for m in taken if "n" in m]
    assert [m["n"] for m in kinds] == [0, 1, 2]
    assert problems == []
    assert len(taken[-1]["text"]["deep"]) < 5000
    with pytest.raises(ConnectionRefusedError):
        await asyncio.to_thread(tell, channel.address, {"kind": "event"})


async def test_every_load_tells_its_events_where_the_setting_names_a_socket(hub: Hub):
    told: list[dict[str, Any]] = []
    with Channel(told.append) as channel:
        await fastload.aprefetch("org/tiny", settings={"event_socket": channel.address})
        await asyncio.sleep(0)  # the loop reads what lies there
    names = [m["event"]["name"] for m in told]
    assert {m["source"] for m in told} == {"org/tiny"}
    assert {"load.started", "file.verified", "range.landed", "load.finished"} <= set(names)


def test_a_load_is_not_the_supervisors_business(hub: Hub):
    """Nobody listens: nothing is said, nothing fails."""
    snapshot = fastload.prefetch("org/tiny", settings={"event_socket": "@nobody-is-there"})
    assert (snapshot.path / "config.json").exists()
