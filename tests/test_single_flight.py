"""One node, one transfer: whoever wants the same file waits for its owner, reads along, and takes over when that dies."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import ENVIRON, children, held, journal_of, landed_bytes, program, run, until
from transfers import LARGE, RANGE, expected_bytes, tensor_bytes, write_weights

import fastload
from fastload.errors import FastloadError, IntegrityError
from fastload.journal import Journal
from fastload.testing import Fault, Hub

PREFETCH = "import fastload; fastload.prefetch('org/m'); print('done')"
LOAD = "import fastload; print(len(fastload.load_tensors('org/m')))"
HF = "import huggingface_hub as hf; print(hf.hf_hub_download('org/m', 'model.safetensors'))"
HF_ALL = "import huggingface_hub as hf; print(hf.snapshot_download('org/m'))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("single-flight")
    write_weights(made / LARGE)
    (made / "config.json").write_text("{}")
    return made


@pytest.fixture
def size(folder: Path) -> int:
    return (folder / LARGE).stat().st_size


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = make_hub({"org/m": folder})
    for name, value in {**ENVIRON, "HF_ENDPOINT": made.endpoint}.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


def hold_at(hub: Hub, offset: int, size: int, times: int | None = None) -> None:
    hub.script(*(Fault("hold", path=LARGE, offset=o, times=times) for o in range(offset, size, RANGE)))


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run *function* in a thread; return a function that waits for its result, or raises what it raised."""
    results: list[Any] = []

    def main() -> None:
        try:
            results.append((function(), None))
        except BaseException as e:
            results.append((None, e))

    thread = threading.Thread(target=main, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(30)
        assert results, "still running"
        value, error = results[0]
        if error is not None:
            raise error
        return value

    return result


# -- one transfer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [PREFETCH, LOAD], ids=["prefetch", "load"])
def test_two_processes_make_one_transfer(second: str, hub: Hub, cache: Path, size: int):
    hold_at(hub, 3 * RANGE, size, times=1)
    with program(PREFETCH) as first:
        held(hub)
        with program(second) as other:
            hub.wait(lambda requests: sum(r.path.startswith("/api/") for r in requests) == 2)
            hub.script()
            hub.release()
            assert first.communicate(timeout=30)[0] == "done\n"
            assert other.communicate(timeout=30)[0] in ("done\n", "12\n")
    assert hub.bytes_sent(LARGE) == size
    assert journal_of(cache) is None


def test_two_loads_of_one_process_make_one_transfer(hub: Hub, folder: Path, size: int):
    results = [in_thread(lambda: tensor_bytes(fastload.load_tensors("org/m"))) for _ in range(3)]
    for result in results:
        assert result() == expected_bytes(folder / LARGE)
    assert hub.bytes_sent(LARGE) == size


def test_a_second_process_reads_what_the_first_has_landed(hub: Hub, folder: Path, size: int):
    expected = expected_bytes(folder / LARGE)
    hold_at(hub, 4 * RANGE, size)
    with program(PREFETCH) as first:
        held(hub)
        with fastload.stream("org/m") as weights:
            read = {"t00": weights.get_tensor("t00"), "t01": weights.get_tensor("t01")}
            assert tensor_bytes(read) == {n: expected[n] for n in ("t00", "t01")}
            assert hub.bytes_sent(LARGE) < size  # it read along
            hub.script()
            hub.release()
            read["t11"] = weights.get_tensor("t11")
        assert tensor_bytes(read) == {n: expected[n] for n in read}
        assert first.communicate(timeout=30)[0] == "done\n"
    assert hub.bytes_sent(LARGE) == size


def test_a_range_that_another_process_waits_for_comes_next(hub: Hub, folder: Path, size: int):
    hold_at(hub, 2 * RANGE, size, times=1)
    with program(PREFETCH, environ={"FASTLOAD_CONNECTIONS": "1"}):
        held(hub)
        with fastload.stream("org/m") as weights:
            weights.keys()
            result = in_thread(lambda: weights.get_tensor("t11"))
            journal_path = until(lambda: journal_of(Path(fastload.Settings.resolve().cache_dir)))
            journal = Journal.open(journal_path)
            until(lambda: any(journal._map[256:512]), "nobody demanded")
            journal.close()
            hub.clear()
            hub.script(*(Fault("hold", path=LARGE, offset=o) for o in range(3 * RANGE, 15 * RANGE, RANGE)))
            hub.release()
            tensor = result()  # while everything in the middle is held
            hub.script()
            hub.release()
        assert tensor_bytes({"t11": tensor})["t11"] == expected_bytes(folder / LARGE)["t11"]


# -- the owner dies --------------------------------------------------------------------------------------------------


def test_a_waiter_takes_over_and_its_open_tensors_stay_valid(hub: Hub, folder: Path, cache: Path, size: int):
    expected = expected_bytes(folder / LARGE)
    hold_at(hub, 4 * RANGE, size)
    with program(PREFETCH) as owner:
        held(hub)
        until(lambda: landed_bytes(cache) == 4 * RANGE)
        with fastload.stream("org/m") as weights:
            read = {"t00": weights.get_tensor("t00")}
            hub.clear()
            hub.script()
            owner.kill()
            owner.wait()
            read |= dict(weights)
        assert tensor_bytes(read) == expected
    assert hub.bytes_sent(LARGE) == size - 4 * RANGE
    assert journal_of(cache) is None


FORKS = """
import os, sys
import fastload
def fork(event):
    if event.name == "write.finished" and not os.fork():
        sys.stdin.read()  # a worker that lives on
        os._exit(0)
fastload.prefetch("org/m", observers=[fork])
"""


def test_a_process_that_was_forked_during_a_transfer_does_not_keep_the_lock(hub: Hub, cache: Path, size: int):
    hold_at(hub, 4 * RANGE, size)
    with program(FORKS, stdin=subprocess.PIPE) as owner:
        held(hub)
        until(lambda: landed_bytes(cache) == 4 * RANGE)
        assert children(owner.pid)
        hub.clear()
        hub.script()
        owner.kill()
        with program(LOAD) as second:
            assert second.communicate(timeout=30)[0] == "12\n"
    assert hub.bytes_sent(LARGE) == size - 4 * RANGE


def test_of_many_waiters_one_takes_over(hub: Hub, cache: Path, size: int):
    hold_at(hub, 4 * RANGE, size)
    with program(PREFETCH) as owner:
        held(hub)
        until(lambda: landed_bytes(cache) == 4 * RANGE)
        with program(LOAD) as second, program(PREFETCH) as third:
            hub.wait(lambda requests: sum(r.path.startswith("/api/") for r in requests) == 3)
            hub.clear()
            hub.script()
            owner.kill()
            owner.wait()
            assert second.communicate(timeout=30)[0] == "12\n"
            assert third.communicate(timeout=30)[0] == "done\n"
    assert hub.bytes_sent(LARGE) == size - 4 * RANGE


def test_a_waiter_goes_on_where_the_owner_gave_up(hub: Hub, folder: Path, size: int):
    # The owner gets wrong bytes to the end; what it gave up with does not end the others.
    hub.script(Fault("flip", path=LARGE, offset=9 * RANGE), Fault("hold", path=LARGE, offset=15 * RANGE, times=1))
    with program(PREFETCH) as owner:
        held(hub)
        result = in_thread(lambda: tensor_bytes(fastload.load_tensors("org/m")))
        hub.wait(lambda requests: sum(r.path.startswith("/api/") for r in requests) == 2)
        hub.release()
        assert "IntegrityError" in owner.communicate(timeout=30)[1]
        hub.script()
        try:
            assert result() == expected_bytes(folder / LARGE)
        except IntegrityError:  # it took over while the hub still lied
            pass


# -- beside huggingface_hub ------------------------------------------------------------------------------------------


def test_we_wait_for_huggingface_hub(hub: Hub, folder: Path, size: int):
    hub.script(Fault("hold", path=LARGE, offset=5 * RANGE, times=1))
    with program(HF) as theirs:
        held(hub)
        hub.clear()
        result = in_thread(lambda: tensor_bytes(fastload.load_tensors("org/m")))
        hub.wait(lambda requests: any(r.path.startswith("/api/") for r in requests))
        hub.release()
        assert theirs.communicate(timeout=60)[0]
        assert result() == expected_bytes(folder / LARGE)
    assert not [r for r in hub.requests if r.file == LARGE and r.method == "GET"]


def test_huggingface_hub_waits_for_us(hub: Hub, folder: Path, size: int):
    hub.script(Fault("hold", path=LARGE, offset=5 * RANGE, times=1))
    with program(PREFETCH) as ours:
        held(hub)
        with program(HF) as theirs:
            hub.wait(lambda requests: any(r.file == LARGE and r.method == "HEAD" for r in requests))
            hub.release()
            assert ours.communicate(timeout=60)[0] == "done\n"
            found = theirs.communicate(timeout=60)[0].strip()
    assert Path(found).read_bytes() == (folder / LARGE).read_bytes()
    assert hub.bytes_sent(LARGE) == size


@pytest.mark.parametrize("use", ["stream", "load_tensors"])
def test_a_file_that_huggingface_hub_finished_never_shows_as_zeros(
    use: str, hub: Hub, folder: Path, cache: Path, size: int
):
    """Our owner died; huggingface_hub, which knows no partial files of ours, got the lock; a reader had opened ours."""
    expected = expected_bytes(folder / LARGE)
    hold_at(hub, 4 * RANGE, size)
    with program(PREFETCH):
        held(hub)
        until(lambda: landed_bytes(cache) == 4 * RANGE)
    hub.script(Fault("hold", path=LARGE, offset=5 * RANGE, times=1))
    hub.clear()
    with program(HF) as theirs:
        held(hub)
        if use == "load_tensors":
            result = in_thread(lambda: tensor_bytes(fastload.load_tensors("org/m")))
            hub.wait(lambda requests: any(r.path.startswith("/api/") for r in requests))
            hub.release()
            assert result() == expected
        else:
            with pytest.raises(IntegrityError, match="replaced"), fastload.stream("org/m") as weights:
                assert tensor_bytes({"t00": weights.get_tensor("t00")}) == {"t00": expected["t00"]}
                hub.release()
                assert theirs.communicate(timeout=60)[0]
                assert tensor_bytes({"t11": weights.get_tensor("t11")}) == {"t11": expected["t11"]}
        assert theirs.wait(60) == 0
    until(lambda: journal_of(cache) is None, "ours is of no use any more")
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected


def test_two_that_find_the_same_damage_mend_it_once(hub: Hub, folder: Path, size: int):
    snapshot = fastload.prefetch("org/m").path
    with open(snapshot / LARGE, "r+b") as f:
        f.seek(RANGE)
        f.write(b"damage")
    hub.clear()
    results = [in_thread(lambda: tensor_bytes(fastload.load_tensors("org/m"))) for _ in range(4)]
    for result in results:
        assert result() == expected_bytes(folder / LARGE)
    assert hub.bytes_sent(LARGE) == size


def test_what_one_of_us_downloads_huggingface_hub_finds_complete_and_without_network(hub: Hub, folder: Path):
    fastload.prefetch("org/m")
    hub.clear()
    found = run(HF_ALL, environ={"HF_HUB_OFFLINE": "1"}).strip()
    assert (Path(found) / LARGE).read_bytes() == (folder / LARGE).read_bytes()
    assert not hub.requests


def test_a_stopped_owner_of_the_same_process_hands_over(hub: Hub, folder: Path, cache: Path, size: int):
    hold_at(hub, 4 * RANGE, size)
    running = fastload.start("org/m", settings={"shards": 3})  # another key than the load's
    held(hub)
    until(lambda: landed_bytes(cache) == 4 * RANGE)
    result = in_thread(lambda: tensor_bytes(fastload.load_tensors("org/m", files="*")))
    hub.wait(lambda requests: sum(r.path.startswith("/api/") for r in requests) == 2)
    hub.clear()
    hub.script()
    running.cancel()
    with pytest.raises(FastloadError, match="stopped"):
        running.wait()
    assert result() == expected_bytes(folder / LARGE)
    assert hub.bytes_sent(LARGE) == size - 4 * RANGE
