"""The public calls: the same results whichever one, from wherever; and nothing is left of one that was ended."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import ENVIRON, alive, children, held, landed_bytes, program, run, until
from transfers import LARGE, RANGE, expected_bytes, tensor_bytes, write_weights

import fastload
from fastload import asking
from fastload import running as transfers
from fastload.errors import FastloadError, IntegrityError
from fastload.testing import Fault, Hub

SECOND = "other.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weight files of 19 ranges each, which no framework would take for one model."""
    made = tmp_path_factory.mktemp("loader")
    write_weights(made / LARGE)
    (made / "config.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    return expected_bytes(folder / LARGE)


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = make_hub({"org/m": folder})
    for name, value in {**ENVIRON, "HF_ENDPOINT": made.endpoint}.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


# -- the same results ------------------------------------------------------------------------------------------------


def from_stream(source: str) -> dict[str, bytes]:
    with fastload.stream(source) as weights:
        return tensor_bytes(weights)


async def from_astream(source: str) -> dict[str, bytes]:
    async with fastload.astream(source) as weights:
        return tensor_bytes([item async for item in weights])


async def from_aload_tensors(source: str) -> dict[str, bytes]:
    return tensor_bytes(await fastload.aload_tensors(source))


def from_prefetch(source: str) -> dict[str, bytes]:
    return expected_bytes(fastload.prefetch(source).path / LARGE)


async def from_aprefetch(source: str) -> dict[str, bytes]:
    return expected_bytes((await fastload.aprefetch(source)).path / LARGE)


def from_start(source: str) -> dict[str, bytes]:
    running = fastload.start(source)
    try:
        return expected_bytes(running.wait().path / LARGE)
    finally:
        running.join()


WAYS: dict[str, Callable[[str], Any]] = {
    "load_tensors": lambda source: tensor_bytes(fastload.load_tensors(source)),
    "stream": from_stream,
    "prefetch": from_prefetch,
    "start": from_start,
    "aload_tensors": lambda source: asyncio.run(from_aload_tensors(source)),
    "astream": lambda source: asyncio.run(from_astream(source)),
    "aprefetch": lambda source: asyncio.run(from_aprefetch(source)),
}
SYNC = [name for name in WAYS if not name.startswith("a")]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[[str], dict[str, bytes]]:
    return WAYS[request.param]


def test_every_way_gives_the_same_bytes(way: Callable[[str], Any], hub: Hub, expected: dict[str, bytes]):
    assert way("org/m") == expected
    hub.clear()
    assert way("org/m") == expected  # from the cache
    assert hub.bytes_sent(LARGE) == 0


def test_every_way_works_in_a_thread(way: Callable[[str], Any], hub: Hub, expected: dict[str, bytes]):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(way, "org/m").result(30) == expected


@pytest.mark.parametrize("name", SYNC)
def test_sync_calls_work_under_a_running_loop(name: str, hub: Hub, expected: dict[str, bytes]):
    async def notebook() -> Any:
        return WAYS[name]("org/m")

    assert asyncio.run(notebook()) == expected


@pytest.mark.parametrize("process", ["0", "1"])
def test_every_way_works_with_and_without_a_transfer_process(
    way: Callable[[str], Any], process: str, hub: Hub, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FASTLOAD_PROCESS", process)
    assert way("org/m") == expected


@pytest.mark.parametrize("executable", ["", "/nonexistent/python"])
def test_where_no_process_can_be_started_the_transfer_runs_here_and_says_so_once(
    executable: str, hub: Hub, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    from fastload import running

    monkeypatch.setattr(running, "_warned", False)
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "exec_prefix", "/nonexistent")
    monkeypatch.setenv("FASTLOAD_PROCESS", "1")
    assert WAYS["load_tensors"]("org/m") == expected
    assert WAYS["stream"]("org/m") == expected
    assert caplog.text.count("no transfer process can be started") == 1


def test_a_program_that_embeds_python_is_not_started_as_if_it_were_python(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    server = tmp_path / "uwsgi"
    server.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    server.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(server))
    monkeypatch.setenv("FASTLOAD_PROCESS", "1")
    assert WAYS["load_tensors"]("org/m") == expected
    assert not (tmp_path / "started").exists()
    assert "no transfer process" not in caplog.text  # the Python of its prefix does


FORKED = """
import os, sys, threading
import fastload
from fastload import running
first = fastload.start("org/m") if sys.argv[1] == "start" else None
if sys.argv[1] == "locked":  # another thread is in the middle of begin()
    running._lock.acquire()
pid = os.fork()
if not pid:
    tensors = fastload.load_tensors("org/m")
    print(len(tensors), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
if first is not None:
    first.wait()
    first.join()
"""


@pytest.mark.parametrize("before", ["nothing", "start", "locked"])
def test_a_forked_process_loads_for_itself(before: str, hub: Hub):
    assert run(FORKED, before) == "12\n"


@pytest.mark.parametrize("name", ["json.py", "asyncio.py"])
def test_the_folder_that_a_program_stands_in_lends_the_transfer_no_modules(name: str, hub: Hub, tmp_path: Path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / name).write_text("raise SystemExit('the wrong module')")
    code = "import fastload; print(len(fastload.load_tensors('org/m')))"
    assert run(code, cwd=tmp_path / "here") == "12\n"


# -- start, then load ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["load_tensors", "stream", "aload_tensors", "astream"])
def test_a_load_joins_what_start_began(name: str, hub: Hub, expected: dict[str, bytes], folder: Path):
    running = fastload.start("org/m")
    running.transfer.wait_manifest()
    with fastload.profile() as profile:
        assert WAYS[name]("org/m") == expected
    assert running.done
    assert sum(r.path.startswith("/api/") for r in hub.requests) == 1
    assert hub.bytes_sent(LARGE) == (folder / LARGE).stat().st_size
    (load,) = profile.loads
    phases = {p.name: p for p in load.phases}
    assert phases["resolve"].hidden_s == phases["resolve"].busy_s > 0  # it was over before the load began


def test_a_load_of_something_else_does_not_join(hub: Hub):
    running = fastload.start("org/m", files="config.json")
    assert len(fastload.load_tensors("org/m")) == 12
    assert running.wait().files == ("config.json",)
    running.join()


def test_a_failed_start_is_not_joined(hub: Hub, expected: dict[str, bytes]):
    hub.script(Fault("status", status=404, path="/api/*"))
    running = fastload.start("org/m")
    with pytest.raises(FastloadError):
        running.wait()
    hub.script()
    assert WAYS["load_tensors"]("org/m") == expected
    running.join()


def test_start_twice_is_one_transfer(hub: Hub):
    assert fastload.start("org/m") is fastload.start("org/m")
    fastload.load_tensors("org/m")
    assert sum(r.path.startswith("/api/") for r in hub.requests) == 1


def test_cancel_ends_what_waits_and_leaves_no_process(hub: Hub, cache: Path):
    hub.script(Fault("hold", path=LARGE, offset=5 * RANGE))
    running = fastload.start("org/m")
    held(hub)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            running.transfer.files[LARGE].read(fastload.types.ByteRange(5 * RANGE, 5 * RANGE + 1))
        except FastloadError as e:
            errors.append(e)

    readers = [threading.Thread(target=wait) for _ in range(5)]
    for reader in readers:
        reader.start()
    running.cancel()
    running.cancel()
    for reader in readers:
        reader.join(10)
    assert len(errors) == 5
    assert not children(os.getpid())
    hub.script()
    fastload.prefetch("org/m")


def test_many_readers_of_one_transfer_all_get_their_bytes(hub: Hub, expected: dict[str, bytes]):
    with fastload.stream("org/m") as weights, ThreadPoolExecutor(16) as pool:
        names = sorted(expected) * 4
        read = list(pool.map(lambda name: tensor_bytes({name: weights.get_tensor(name)})[name], names))
    assert read == [expected[name] for name in names]


def test_more_loads_at_once_than_the_loop_has_threads(hub: Hub, expected: dict[str, bytes], cache: Path):
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        results = await asyncio.gather(
            *(fastload.aload_tensors("org/m", settings={"cache_dir": cache / str(n)}) for n in range(6))
        )
        for tensors in results:
            assert tensor_bytes(tensors) == expected

    asyncio.run(asyncio.wait_for(main(), 30))


# -- wrong bytes that somebody holds ---------------------------------------------------------------------------------

#: In the header, where it makes no sense; in a name; in a tensor.
FLIPS = {"length": 3, "header": 9, "dtype": 25, "values": 5 * RANGE}


@pytest.mark.parametrize("name", ["load_tensors", "aload_tensors"])
@pytest.mark.parametrize("where", FLIPS)
def test_a_result_of_wrong_bytes_is_made_again(where: str, name: str, hub: Hub, expected: dict[str, bytes]):
    hub.script(Fault("flip", path=LARGE, offset=FLIPS[where], times=1))
    assert WAYS[name]("org/m") == expected


@pytest.mark.parametrize("name", ["load_tensors", "stream", "aload_tensors", "astream", "prefetch", "aprefetch"])
@pytest.mark.parametrize("where", FLIPS)
def test_bytes_that_stay_wrong_are_never_a_result(where: str, name: str, hub: Hub, cache: Path):
    hub.script(Fault("flip", path=LARGE, offset=FLIPS[where]))
    with pytest.raises(FastloadError) as caught:
        WAYS[name]("org/m")
    if where == "values" or "stream" not in name:
        assert type(caught.value) is IntegrityError
    assert not list(cache.glob(f"models--*/snapshots/*/{LARGE}"))


@pytest.mark.parametrize("name", ["stream", "astream"])
def test_a_stream_that_handed_out_wrong_bytes_raises_at_its_end(name: str, hub: Hub, expected: dict[str, bytes]):
    hub.script(Fault("flip", path=LARGE, offset=FLIPS["values"], times=1))
    with pytest.raises(IntegrityError, match="fetched anew"):
        WAYS[name]("org/m")
    assert WAYS[name]("org/m") == expected


# -- the block of a stream -------------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


@pytest.mark.parametrize(
    "error", [OwnError("mine"), KeyboardInterrupt(), SystemExit(3), ExceptionGroup("g", [OwnError()])]
)
def test_what_the_block_raises_comes_out_as_it_is(error: BaseException, hub: Hub):
    with pytest.raises(type(error)) as caught, fastload.stream("org/m") as weights:
        weights.get_tensor("t00")
        raise error
    assert caught.value is error

    async def twin() -> None:
        async with fastload.astream("org/m") as weights:
            await weights.get_tensor("t00")
            raise error

    with pytest.raises(type(error)) as caught:
        asyncio.run(twin())
    if not isinstance(error, KeyboardInterrupt):  # that one is asyncio.run's own
        assert caught.value is error


@pytest.mark.parametrize("twin", [False, True])
def test_leaving_early_gives_up_what_was_not_touched(twin: bool, folder: Path, make_hub: Any, hub: Hub, cache: Path):
    second = write_weights(cache.parent.parent / SECOND, seed=1)
    both = {LARGE: (folder / LARGE).read_bytes(), SECOND: second.read_bytes(), "config.json": b"{}"}
    hub = make_hub({"org/two": both}, faults=[Fault("hold", path=SECOND)])

    settings = {"endpoint": hub.endpoint, "shards": 1}

    async def aread() -> None:
        async with fastload.astream("org/two", files="*", settings=settings) as weights:
            await weights.get_slice("t00")

    if twin:
        asyncio.run(asyncio.wait_for(aread(), 30))
    else:
        with fastload.stream("org/two", files="*", settings=settings) as weights:
            weights.get_tensor("t00")
    snapshot = next(cache.glob("models--org--two/snapshots/*"))
    assert (snapshot / LARGE).exists() != twin  # a header is no tensor
    assert not (snapshot / SECOND).exists()


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------

BLOCKED = """
import sys, fastload
kind = sys.argv[1]
try:
    if kind == "load_tensors":
        fastload.load_tensors("org/m")
    elif kind == "prefetch":
        fastload.prefetch("org/m")
    elif kind == "wait":
        fastload.start("org/m").wait()
    elif kind == "stream":
        with fastload.stream("org/m") as weights:
            for name, tensor in weights:
                pass
    else:
        import asyncio
        asyncio.run(fastload.aload_tensors("org/m") if kind == "aload_tensors" else fastload.aprefetch("org/m"))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("kind", ["load_tensors", "prefetch", "wait", "stream", "aload_tensors", "aprefetch"])
@pytest.mark.parametrize("moment", ["metadata", "middle"])
def test_ctrl_c_ends_a_program_quietly_and_what_landed_is_kept(moment: str, kind: str, hub: Hub, cache: Path):
    hold = Fault("hang", path="/api/*") if moment == "metadata" else Fault("hold", path=LARGE, offset=7 * RANGE)
    hub.script(hold)
    # A process group of its own, all of which gets the signal, as from a terminal.
    with program(BLOCKED, kind, start_new_session=True) as process:
        held(hub)
        if moment == "middle":
            until(lambda: landed_bytes(cache) >= 7 * RANGE)
        transfer = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (130, "", "")
        until(lambda: not any(map(alive, transfer)))
    hub.script()
    hub.clear()
    kept = landed_bytes(cache)
    assert (kept >= 7 * RANGE) == (moment == "middle")
    snapshot = fastload.prefetch("org/m")
    assert hub.bytes_sent(LARGE) == (snapshot.path / LARGE).stat().st_size - kept


def test_ctrl_c_before_the_transfer_process_is_up_shows_no_traceback(hub: Hub):
    code = """
import os, signal, fastload
signal.signal(signal.SIGINT, lambda *_: None)  # ignored, it would be ignored by the child too
for _ in range(5):
    running = fastload.start("org/m")
    os.killpg(0, signal.SIGINT)
    running.wait()
    running.join()
    from fastload import running as r; r._started.clear()
"""
    with program(code, start_new_session=True) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_program_that_ends_without_waiting_leaves_no_process(hub: Hub):
    hub.script(Fault("hold", path=LARGE))
    with program("import fastload; print(fastload.start('org/m')._carrier.pid)") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    until(lambda: not alive(int(out)))


# -- cancellation ----------------------------------------------------------------------------------------------------


def left_over() -> dict[str, Any]:
    """Return what this process holds: threads, descriptors by what they lead to, children."""
    gc.collect()
    threads = {t.name for t in threading.enumerate() if not t.name.startswith(("asyncio_", "ThreadPool"))}
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        fds.append(target.partition(":")[0] if target.startswith(("socket:", "pipe:", "anon_inode:")) else target)
    return {"threads": threads, "fds": sorted(f for f in fds if "/fd" not in f), "children": children(os.getpid())}


async def astreamed(source: str) -> None:
    async with fastload.astream(source) as weights:
        async for _ in weights:
            pass


TWINS: dict[str, Callable[[str], Any]] = {
    "aload_tensors": fastload.aload_tensors,
    "aload": fastload.aload,
    "aprefetch": fastload.aprefetch,
    "astream": astreamed,
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("moment", ["metadata", "first byte", "middle", "retry"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_cancelled_load_leaves_nothing_but_what_landed(
    times: int, moment: str, name: str, hub: Hub, cache: Path, make_hub: Any
):
    hub.script(
        {
            "metadata": Fault("hang", path="/api/*"),
            "first byte": Fault("hang", path=LARGE, origin="cdn"),
            "middle": Fault("hold", path=LARGE, offset=7 * RANGE + 9),
            "retry": Fault("status", path=LARGE, status=503, headers={"Retry-After": "200"}),
        }[moment]
    )

    async def main() -> None:
        before, tasks = left_over(), asyncio.all_tasks()
        task = asyncio.create_task(TWINS[name]("org/m"))
        if moment == "retry":
            await asyncio.to_thread(hub.wait, lambda requests: any(r.status == 503 and r.ended_s for r in requests))
        else:
            await asyncio.to_thread(held, hub)
        if moment == "middle":
            await asyncio.to_thread(until, lambda: landed_bytes(cache) >= 7 * RANGE)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({task})
        assert task.cancelled()
        del task  # its traceback holds tensors, and these hold the file
        hub.script()
        hub.wait(lambda requests: all(r.ended_s for r in requests))
        until(lambda: left_over() == before, f"{left_over()} instead of {before}")
        assert asyncio.all_tasks() == tasks

    asyncio.run(asyncio.wait_for(main(), 30))
    hub.clear()
    kept = landed_bytes(cache)
    assert (kept >= 7 * RANGE) == (moment == "middle")
    snapshot = fastload.prefetch("org/m")
    assert hub.bytes_sent(LARGE) == (snapshot.path / LARGE).stat().st_size - kept


@pytest.mark.parametrize("name", [*WAYS])
def test_a_finished_load_leaves_nothing(name: str, hub: Hub):
    before = left_over()
    WAYS[name]("org/m")
    until(lambda: left_over() == before, f"{left_over()} instead of {before}")


@pytest.mark.parametrize("name", [*WAYS])
def test_a_failed_load_leaves_nothing(name: str, hub: Hub):
    hub.script(Fault("status", status=403, path=LARGE))
    before = left_over()
    with pytest.raises(FastloadError):
        WAYS[name]("org/m")
    until(lambda: left_over() == before, f"{left_over()} instead of {before}")


@pytest.fixture(autouse=True)
def nothing_started_is_left() -> Iterator[None]:
    """Tests that start a transfer and do not load leave it to the next one otherwise."""
    yield
    from fastload import running

    for begun in list(running._started.values()):
        begun.cancel()
        begun.join()
    running._started.clear()


async def test_who_is_cancelled_before_he_joins_a_transfer_leaves_it_to_the_next(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    real, begun, go = asking.ask, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        go.wait()
        return real(*args, **kwargs)

    running = await asyncio.to_thread(fastload.start, "org/m")
    monkeypatch.setattr(asking, "ask", slow)
    task = asyncio.create_task(fastload.aload_tensors("org/m"))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.wait({task})
    go.set()
    assert await asyncio.to_thread(lambda: transfers.join(real("org/m"))) is running
    await asyncio.to_thread(running.cancel)
