"""The load hook runs once per process, whoever asks first: threads, tasks, loops, methods, forks, failures."""

from __future__ import annotations

import asyncio
import functools
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.errors import FastloadError, NotFoundError, SettingsError
from fastload.lifecycle import AsyncOnStart, OnStart, on_start
from fastload.testing import Fault, Hub, write_tiny_llama


class Loads:
    """What a hook loads with: counts, and holds the load back until it is let go."""

    def __init__(self, *outcomes: object) -> None:
        self.count = 0
        self.begun = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self._outcomes = outcomes

    def __call__(self) -> object:
        self.count += 1
        self.begun.set()
        self.go.wait()
        outcome = self._outcomes[self.count - 1] if self._outcomes else f"model {self.count}"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def in_threads(count: int, call: Callable[[], object]) -> tuple[list[threading.Thread], list[object]]:
    outcomes: list[object] = []

    def body() -> None:
        try:
            outcomes.append(call())
        except BaseException as e:
            outcomes.append(e)

    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, outcomes


# -- threads ----------------------------------------------------------------------------------------------------------


def test_any_number_of_threads_wait_for_one_run_and_get_its_result():
    load = Loads()
    load.go.clear()
    hook = OnStart(lambda model: [model], load)
    assert hook.state == "pending"
    threads, results = in_threads(8, hook)
    load.begun.wait()
    assert (hook.state, hook.result, hook.error) == ("running", None, None)
    load.go.set()
    for thread in threads:
        thread.join()
    assert (load.count, len(results)) == (1, 8)
    assert all(result is results[0] for result in results)
    assert (hook.state, hook.result) == ("ready", ["model 1"])
    assert hook() is results[0]


def test_whoever_waits_gets_the_exception_and_the_next_call_tries_again():
    load = Loads(NotFoundError("no such model"), "model")
    load.go.clear()
    hook = OnStart(lambda model: model, load)
    threads, outcomes = in_threads(4, hook)
    load.begun.wait()
    load.go.set()
    for thread in threads:
        thread.join()
    # Who called only after the failure has tried again; the first one never did.
    assert any(isinstance(outcome, NotFoundError) for outcome in outcomes)
    assert set(map(str, outcomes)) <= {"no such model", "model"}
    assert hook() == "model"
    assert (hook.state, hook.error, load.count) == ("ready", None, 2)


def test_a_waiting_thread_gets_the_very_exception_of_the_run():
    entered = threading.Event()

    class Watched(OnStart):
        def _join(self, caller: object) -> Any:
            joined = super()._join(caller)
            if not joined[1]:
                entered.set()
            return joined

    load = Loads(NotFoundError("gone"))
    load.go.clear()
    hook = Watched(lambda model: model, load)
    threads, outcomes = in_threads(1, hook)
    load.begun.wait()
    more, later = in_threads(1, hook)
    entered.wait()
    load.go.set()
    for thread in threads + more:
        thread.join()
    assert outcomes[0] is later[0] is hook.error
    assert (hook.state, load.count) == ("failed", 1)


def test_never_retried_the_same_exception_comes_again_and_does_not_grow():
    load = Loads(NotFoundError("gone"))
    hook = OnStart(lambda model: model, load, retry="never")
    depths = []
    for _ in range(3):
        with pytest.raises(NotFoundError) as caught:
            hook()
        assert caught.value is hook.error
        depths.append(len(caught.traceback))
    assert load.count == 1
    assert len(set(depths)) == 1


def test_an_interrupted_caller_leaves_the_run_to_those_who_wait():
    load = Loads(KeyboardInterrupt(), "model")
    hook = OnStart(lambda model: model, load, retry="never")
    with pytest.raises(KeyboardInterrupt):
        hook()
    assert (hook.state, hook.error) == ("pending", None)
    assert hook() == "model"


def test_a_hook_that_calls_itself_is_an_error_and_no_deadlock():
    hook = OnStart(lambda model: hook(), Loads())
    with pytest.raises(FastloadError, match="calls itself"):
        hook()


def test_reset_makes_the_next_call_run_again():
    load = Loads()
    hook = OnStart(lambda model: model, load)
    hook()
    hook.reset()
    assert (hook.state, hook.result) == ("pending", None)
    assert hook() == "model 2"


def test_reset_of_a_running_hook_is_refused():
    hook = OnStart(lambda model: hook.reset(), Loads())
    with pytest.raises(FastloadError, match="is running"):
        hook()


def test_retry_is_call_or_never():
    with pytest.raises(SettingsError, match="retry='twice'"):
        on_start("org/model", retry="twice")  # type: ignore[arg-type]


# -- functions and methods --------------------------------------------------------------------------------------------


def test_the_model_comes_behind_what_the_platform_passes():
    def setup(device: str, model: object, *, context: object = None) -> tuple[object, ...]:
        """Docs."""
        return device, model, context

    hook = OnStart(setup, Loads())
    assert hook("cuda:0", context=1) == ("cuda:0", "model 1", 1)
    assert list(inspect.signature(hook).parameters) == ["device", "context"]
    assert (hook.__name__, hook.__doc__) == ("setup", "Docs.")
    assert not inspect.iscoroutinefunction(hook)


class Server:
    loads = Loads()

    def load(self, model: object) -> object:
        self.model = model
        return model

    load = OnStart(load, loads)  # type: ignore[assignment,arg-type]


def test_a_method_runs_once_per_process_for_the_first_instance_that_calls_it():
    first, second = Server(), Server()
    assert first.load() == second.load() == "model 1"  # type: ignore[call-arg]
    assert (first.model, hasattr(second, "model")) == ("model 1", False)
    assert (Server.loads.count, first.load.state, Server.load.state) == (1, "ready", "ready")  # type: ignore[attr-defined]
    assert not inspect.signature(first.load).parameters


# -- asyncio ----------------------------------------------------------------------------------------------------------


class AsyncLoads:
    """The same for asynchronous hooks."""

    def __init__(self, *outcomes: object) -> None:
        self.count = 0
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.ended = 0
        self._outcomes = outcomes

    async def __call__(self) -> object:
        self.count += 1
        self.begun.set()
        try:
            await self.go.wait()
        finally:
            self.ended += 1
        outcome = self._outcomes[self.count - 1] if self._outcomes else f"model {self.count}"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


async def give(model: object) -> list[object]:
    return [model]


async def test_any_number_of_tasks_wait_for_one_run():
    load = AsyncLoads()
    load.go.clear()
    hook = AsyncOnStart(give, load)
    tasks = [asyncio.create_task(hook()) for _ in range(8)]
    await load.begun.wait()
    assert hook.state == "running"
    load.go.set()
    results = await asyncio.gather(*tasks)
    assert load.count == 1
    assert all(result is results[0] for result in results)
    assert (hook.state, hook.result) == ("ready", ["model 1"])


async def test_tasks_that_wait_get_the_exception_and_the_next_call_tries_again():
    load = AsyncLoads(NotFoundError("gone"), "model")
    load.go.clear()
    hook = AsyncOnStart(give, load)
    tasks = [asyncio.create_task(hook()) for _ in range(3)]
    await load.begun.wait()
    load.go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(outcome is hook.error for outcome in outcomes)
    assert (load.count, hook.state) == (1, "failed")
    assert await hook() == ["model"]


async def test_a_cancelled_request_does_not_end_the_load_that_others_wait_for():
    load = AsyncLoads()
    load.go.clear()
    hook = AsyncOnStart(give, load)
    first, second = asyncio.create_task(hook()), asyncio.create_task(hook())
    await load.begun.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    load.go.set()
    assert await second == ["model 1"]
    assert load.count == 1


async def test_the_last_one_who_waits_takes_the_load_with_it():
    load = AsyncLoads()
    load.go.clear()
    hook = AsyncOnStart(give, load)
    task = asyncio.create_task(hook())
    await load.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (hook.state, load.ended) == ("pending", 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    load.go.set()
    assert await hook() == ["model 2"]


async def test_an_async_hook_that_awaits_itself_is_an_error_and_no_deadlock():
    async def setup(model: object) -> object:
        return await hook()

    hook = AsyncOnStart(setup, AsyncLoads())
    with pytest.raises(FastloadError, match="calls itself"):
        await hook()


async def test_a_hook_that_is_cancelled_from_within_is_not_run_again():
    load = AsyncLoads(asyncio.CancelledError(), "model")
    hook = AsyncOnStart(give, load)
    with pytest.raises(asyncio.CancelledError):
        await hook()
    assert (load.count, hook.state) == (1, "pending")


async def test_a_hook_that_is_cancelled_before_its_first_step_is_pending():
    hook = AsyncOnStart(give, AsyncLoads())
    task = asyncio.create_task(hook())
    await asyncio.sleep(0)
    assert hook._run is not None
    assert isinstance(hook._run.owner, asyncio.Task)
    hook._run.owner.cancel()  # made, and not run yet
    with pytest.raises(asyncio.CancelledError):
        await task
    assert hook.state == "pending"
    assert await hook() == ["model 1"]


def test_several_event_loops_share_one_run():
    """Also where the loop that runs it ends first: a waiter in another loop takes over."""
    begun, joined, counts = threading.Event(), threading.Event(), []

    async def load() -> str:
        counts.append(threading.current_thread().name)
        if len(counts) == 1:
            begun.set()
            await asyncio.Event().wait()  # for ever: this loop is stopped
        return "model"

    class Watched(AsyncOnStart):
        def _join(self, caller: object) -> Any:
            run, mine = super()._join(caller)
            if not mine:
                joined.set()
            return run, mine

    hook = Watched(give, load)

    async def stopped() -> None:
        task = asyncio.create_task(hook())
        await asyncio.to_thread(joined.wait)
        task.cancel()  # the last waiter of this loop, not the last one

    first = threading.Thread(target=lambda: asyncio.run(stopped()), name="first")
    first.start()
    begun.wait()
    results: list[object] = []
    second = threading.Thread(target=lambda: results.append(asyncio.run(hook())), name="second")
    second.start()
    first.join()
    second.join()
    assert counts == ["first", "second"]
    assert results == [["model"]]
    assert asyncio.run(hook()) is results[0]


@pytest.mark.parametrize("function", [give, functools.partial(give)])
def test_a_platform_sees_that_an_async_hook_is_async(function: Any):
    hook = AsyncOnStart(function, AsyncLoads())

    class Service:
        setup = hook

    for seen in (hook, Service().setup):
        assert inspect.iscoroutinefunction(seen)
        assert asyncio.iscoroutinefunction(seen) if sys.version_info < (3, 14) else True
    coroutine = hook()
    assert inspect.iscoroutine(coroutine)
    coroutine.close()
    assert hook.state == "pending"


# -- dropped coroutines -----------------------------------------------------------------------------------------------


def dropped(call: Callable[[], object]) -> list[str]:
    """What our warnings say when a platform drops what *call* returns (Python warns too)."""
    texts: list[str] = []

    def show(message: Warning | str, *rest: object) -> None:
        texts.append(str(message))

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", show)  # what records warnings keeps the coroutine alive
        call()
    assert any("was never awaited" in text for text in texts)
    return [text for text in texts if "was never awaited" not in text]


def test_an_async_hook_that_nobody_awaits_warns():
    hook = AsyncOnStart(give, AsyncLoads())
    [text] = dropped(hook)
    assert text.startswith("give() was called and what it returned was dropped without `await`: nothing was loaded.")
    assert "plain function" in text
    assert hook.state == "pending"


@pytest.mark.parametrize(
    ("module", "named"),
    [
        ("litserve", "LitServe calls setup() without awaiting it"),
        ("_truss_shared", "Truss calls load() without awaiting it"),
        ("pipeline.objects.graph", "Mystic calls startup functions without awaiting it"),
        ("beta9", "Beam's task queue calls on_start without awaiting it"),
    ],
)
def test_the_warning_names_the_platform(monkeypatch: pytest.MonkeyPatch, module: str, named: str):
    monkeypatch.setitem(sys.modules, module, object())
    [text] = dropped(AsyncOnStart(give, AsyncLoads()))
    assert named in text


@pytest.mark.parametrize("name", ["aload", "aload_tensors", "aprefetch"])
def test_a_twin_that_nobody_awaits_warns(name: str):
    [text] = dropped(lambda: getattr(fastload, name)("org/model"))
    assert text.startswith(f"fastload.{name}() was called")


@pytest.mark.filterwarnings("error")
async def test_no_warning_when_it_was_awaited_closed_or_cancelled():
    hook = AsyncOnStart(give, AsyncLoads())
    assert await hook() == ["model 1"]
    hook().close()
    task = asyncio.create_task(hook())  # cancelled before its first step
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_twin_can_be_a_task(hub: Hub):
    snapshot = await asyncio.create_task(fastload.aprefetch("org/tiny"))
    assert (snapshot.path / "config.json").is_file()


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_forked_child_runs_it_again():
    load = Loads()
    hook = OnStart(lambda model: (os.getpid(), model), load)
    assert hook() == (os.getpid(), "model 1")
    answers = multiprocessing.get_context("fork").SimpleQueue()
    pid = os.fork()
    if pid == 0:
        try:
            answers.put((hook.state, hook() == (os.getpid(), "model 2"), hook.state))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert answers.get() == ("pending", True, "ready")
    assert hook() == (os.getpid(), "model 1")


def test_a_child_forked_while_the_hook_runs_is_not_stuck():
    """The lock may be held, and nobody in the child will ever finish the parent's run."""
    load = Loads()
    load.go.clear()
    hook = OnStart(lambda model: model, load)
    [thread], _ = in_threads(1, hook)
    load.begun.wait()
    with hook._lock:
        pid = os.fork()
        if pid == 0:
            load.go.set()
            os._exit(0 if (hook.state, hook()) == ("pending", "model 2") else 1)
    assert os.waitpid(pid, 0)[1] == 0
    load.go.set()
    thread.join()


PROGRAM = """
import sys, fastload

@fastload.on_start("org/model", framework="names")
def setup(model):
    return model

class Names:
    @fastload.hookimpl
    def fastload_build_model(self, framework, stream):
        return sorted(stream.keys()) if framework == "names" else None

from fastload.plugins import manager
from fastload.settings import Settings
manager(Settings()).register(Names())
print(setup.state, flush=True)
assert setup() is setup()
print(setup.state, len(setup.result))
"""


def test_worker_processes_share_one_download(tmp_path: Path, make_hub: Any, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    model = write_tiny_llama(tmp_path / "model", shards=1, hidden=256, vocabulary=4096)
    hub = make_hub({"org/model": model}, faults=[Fault("hold", path="*.safetensors", times=1)])
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    start = [sys.executable, "-c", PROGRAM]
    workers = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    # Both have asked for the list of files while the first bytes of the weights were held back.
    hub.wait(lambda requests: sum(r.path.startswith("/api/") for r in requests) >= 2 and any(r.held for r in requests))
    hub.release()
    for worker in workers:
        out, _ = worker.communicate(timeout=60)
        assert (worker.returncode, out.split()[:2]) == (0, ["pending", "ready"])
    size = (model / "model.safetensors").stat().st_size
    assert hub.bytes_sent("model.safetensors") == size


@pytest.mark.transformers
def test_the_public_decorator_loads_what_load_would(hub: Hub):
    @fastload.on_start("org/tiny", dtype="float32")
    def setup(model: Any) -> str:
        return type(model).__name__

    @fastload.on_start("org/tiny", dtype="float32")
    async def asetup(model: Any) -> str:
        return type(model).__name__

    assert setup() == asyncio.run(asetup()) == "LlamaForCausalLM"  # type: ignore[arg-type]


def test_the_public_decorator_raises_what_load_raises(hub: Hub):
    @fastload.on_start("org/nothing")
    def setup(model: object) -> None: ...

    with pytest.raises(NotFoundError):
        setup()
    assert setup.state == "failed"


def test_a_hook_can_be_pickled_by_name():
    assert pickle.loads(pickle.dumps(Server)) is Server
