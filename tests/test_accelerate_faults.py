"""What goes wrong under ``fastload.accelerate()``: wrong bytes are an IntegrityError at whatever moment, all else goes on."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import huggingface_hub  # noqa: E402
import safetensors.torch  # noqa: E402
from accelerating import (  # noqa: E402
    WEIGHTS,
    everything_is_put_back,
    links_in_flight,
    opened,
    point_to,
    the_transfer,
    wait_failed,
    write_model,
)
from compare import diff_models  # noqa: E402
from programs import held, program, until  # noqa: E402

import fastload  # noqa: E402
from fastload import inflight, ondemand  # noqa: E402
from fastload.errors import FastloadWarning, IntegrityError, SourceChangedError  # noqa: E402
from fastload.testing import Fault, Hub  # noqa: E402
from fastload.transfer import Transfer  # noqa: E402

__all__ = ["opened"]

pytestmark = [pytest.mark.transformers]

SINGLE = "model.safetensors"
OTHER = "model-00002-of-00002.safetensors"


def flipped(path: str = "*.safetensors", times: int | None = None) -> Fault:
    return Fault("flip", path=path, times=times, offset=900_000)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("accelerate") / "model")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked-LM model in one file, of which BertModel reads a part."""
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, vocab_size=3000
    )
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(model: Path, bert: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    started = make_hub({"org/model": model, "org/bert": bert})
    point_to(started, monkeypatch)
    return started


@pytest.fixture(autouse=True)
def off_means_off() -> Iterator[None]:
    with everything_is_put_back():
        yield


def load_bert(cache: Path) -> Any:
    return transformers.BertModel.from_pretrained("org/bert", cache_dir=cache, add_pooling_layer=False)


def load_llama(cache: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained("org/model", cache_dir=cache)


# -- wrong for good ---------------------------------------------------------------------------------------------------


def before(target: Any, name: str) -> Callable[[pytest.MonkeyPatch, Callable[[], None]], None]:
    def patch(monkeypatch: pytest.MonkeyPatch, first: Callable[[], None]) -> None:
        real = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *a, **k: (first(), real(*a, **k))[1])

    return patch


def after(target: Any, name: str) -> Callable[[pytest.MonkeyPatch, Callable[[], None]], None]:
    def patch(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
        real = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *a, **k: (real(*a, **k), then())[0])

    return patch


MOMENTS = {
    "before the path is given": before(inflight.InFlight, "show"),
    "before transformers looks whether it is there": after(ondemand.OnDemand, "give"),
    "before it is opened": before(transformers.modeling_utils, "_get_dtype"),
    "when it is open": after(inflight.InFlight, "handle"),
    "when tensors have been taken": after(inflight.InFlight, "take"),
}
LOADS = {SINGLE: (load_bert, 1_200_000), WEIGHTS: (load_llama, 2_700_000)}


def hold(hub: Hub, name: str) -> None:
    """Let *name* stop before its end, behind a byte that is wrong."""
    hub.script(flipped(name), Fault("hold", path=name, times=None, offset=LOADS[name][1]))


def fail(hub: Hub, name: str) -> None:
    """Let the rest of *name* come, and wait until it has been found out."""
    hub.script(flipped(name))
    hub.release()
    wait_failed(the_transfer())


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_wrong_bytes_are_an_integrity_error_whenever_that_is_found_out(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, name: str
):
    hold(hub, name)
    passed = []

    def now() -> None:
        if not passed:
            passed.append(moment)
            fail(hub, name)

    MOMENTS[moment](monkeypatch, now)
    with fastload.accelerate():  # who catches it inside is not told again at the end
        with pytest.raises(IntegrityError, match=name):
            LOADS[name][0](tmp_path)
        assert passed == [moment]
        assert not links_in_flight(tmp_path)
    assert not list(tmp_path.rglob(f"snapshots/*/{name}"))


def test_what_was_wrong_is_asked_for_again_in_the_same_block(hub: Hub, tmp_path: Path):
    plain = load_llama(tmp_path / "plain")
    hub.script(flipped(OTHER))
    with fastload.accelerate():
        with pytest.raises(IntegrityError):
            load_llama(tmp_path / "ours")
        hub.script()
        ours = load_llama(tmp_path / "ours")
    assert diff_models(plain, ours) == []


def test_what_was_wrong_is_asked_for_again_before_the_first_transfer_is_cleared_away(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = load_llama(tmp_path / "plain")
    real, first, cleared = ondemand.OnDemand._end, [], threading.Event()

    def end(self: ondemand.OnDemand, *args: Any) -> None:
        if not first:
            first.append(self)
        if self is first[0]:
            cleared.wait()
        real(self, *args)

    monkeypatch.setattr(ondemand.OnDemand, "_end", end)
    hub.script(flipped(OTHER))
    with fastload.accelerate():
        try:
            with pytest.raises(IntegrityError):
                load_llama(tmp_path / "ours")
            until(lambda: first)  # it is over, and its links are still there
            hub.script()
            ours = load_llama(tmp_path / "ours")
        finally:
            cleared.set()
    assert diff_models(plain, ours) == []


def test_a_file_that_was_published_as_its_transfer_failed_is_read_as_any_other(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The program has not heard that it is there, and its route still leads to the transfer."""
    plain = load_llama(tmp_path / "plain")
    real, end = Transfer.apply, ondemand.OnDemand._end
    first, cleared = [], threading.Event()

    def apply(self: Transfer, message: dict[str, Any]) -> None:
        first[:] = first or [self]
        if message["kind"] != "ready" or self is not first[0] or message["file"] != WEIGHTS:
            real(self, message)

    monkeypatch.setattr(Transfer, "apply", apply)
    monkeypatch.setattr(
        ondemand.OnDemand, "_end", lambda self, *a: (self._transfer is not first[0] or cleared.wait(), end(self, *a))
    )
    hub.script(flipped(OTHER), Fault("hold", path=OTHER, times=None, offset=LOADS[WEIGHTS][1]))
    with fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        try:
            loading = pool.submit(load_llama, tmp_path / "ours")
            blobs = lambda: list((tmp_path / "ours").rglob(f"snapshots/*/{WEIGHTS}"))  # noqa: E731
            until(lambda: blobs() and os.readlink(blobs()[0]).startswith("../../blobs/"))
            hub.script(flipped(OTHER))
            hub.release()
            with pytest.raises(IntegrityError):
                loading.result(60)
            hub.script()
            ours = load_llama(tmp_path / "ours")
        finally:
            cleared.set()
    assert diff_models(plain, ours) == []


def test_wrong_bytes_that_nobody_has_read_are_raised_at_the_end(hub: Hub, tmp_path: Path):
    hold(hub, SINGLE)
    names: dict[str, Any] = {"__name__": "transformers.modeling_utils", "get": huggingface_hub.hf_hub_download}
    exec("def from_pretrained(**kwargs): return get('org/bert', 'model.safetensors', **kwargs)", names)
    with pytest.raises(IntegrityError, match=SINGLE), fastload.accelerate():
        path = names["from_pretrained"](cache_dir=tmp_path)
        assert os.path.isfile(path)
        fail(hub, SINGLE)
        assert os.path.isfile(path)  # nobody has heard of it
    assert not os.path.lexists(path)


DOORS: dict[str, Callable[[Path], Any]] = {
    "hf_hub_download": lambda cache: huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=cache),
    "snapshot_download": lambda cache: huggingface_hub.snapshot_download("org/model", cache_dir=cache),
    "from_pretrained": load_llama,
    "from_pretrained, not by safe_open": lambda cache: transformers.AutoModel.from_pretrained(
        "org/model", cache_dir=cache, disable_mmap=True
    ),
    "pipeline": lambda cache: transformers.pipeline(
        "fill-mask", model=transformers.BertForMaskedLM.from_pretrained("org/bert", cache_dir=cache)
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_no_door_lets_wrong_bytes_through(hub: Hub, tmp_path: Path, door: str):
    hub.script(flipped())
    with pytest.raises(IntegrityError, match=r"\.safetensors"), fastload.accelerate():
        DOORS[door](tmp_path)
    assert not list(tmp_path.rglob("snapshots/*/*.safetensors"))


READERS: dict[str, Callable[[str], Any]] = {
    "load_file": safetensors.torch.load_file,
    "safe_open": lambda path: safetensors.safe_open(path, "pt").keys(),
    "safe_open, numpy": lambda path: safetensors.safe_open(path, "np"),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_opens_the_path_hears_of_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str):
    hold(hub, SINGLE)
    seen: list[BaseException] = []

    def look() -> None:
        fail(hub, SINGLE)
        with pytest.raises(IntegrityError, match=SINGLE) as caught:
            READERS[reader](str(next(tmp_path.rglob(f"snapshots/*/{SINGLE}"))))
        seen.append(caught.value)

    MOMENTS["before it is opened"](monkeypatch, look)
    with pytest.raises(IntegrityError, match=SINGLE), fastload.accelerate():
        load_bert(tmp_path)
    assert seen


def test_a_file_that_is_wrong_does_not_keep_another_one_from_its_caller(hub: Hub, model: Path, tmp_path: Path):
    hub.script(flipped(WEIGHTS), Fault("hold", path=OTHER, times=None, offset=1_200_000))
    with fastload.accelerate(), ThreadPoolExecutor(2) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        good = pool.submit(huggingface_hub.hf_hub_download, "org/model", OTHER, cache_dir=tmp_path)
        held(hub)
        with pytest.raises(IntegrityError, match=WEIGHTS):
            huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
        hub.script()
        hub.release()
        assert Path(good.result(60)).read_bytes() == (model / OTHER).read_bytes()


def test_two_names_of_the_same_wrong_bytes_are_one_error(make_hub: Any, bert: Path, tmp_path: Path):
    content = (bert / SINGLE).read_bytes()
    hub = make_hub({"org/twins": {"a/model.safetensors": content, "b/model.safetensors": content}})
    hub.script(flipped())
    with pytest.raises(IntegrityError), fastload.accelerate():
        huggingface_hub.hf_hub_download("org/twins", "b/model.safetensors", cache_dir=tmp_path, endpoint=hub.endpoint)


def test_a_source_that_changes_meanwhile_is_left_to_the_library(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def changed(self: Any) -> Any:
        raise SourceChangedError("main moved on while it was listed")

    monkeypatch.setattr(ondemand.OnDemand, "snapshot", changed)
    with pytest.warns(FastloadWarning, match="moved on"), fastload.accelerate():
        path = huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
    assert Path(path).read_bytes() == (model / WEIGHTS).read_bytes()


# -- whoever cannot read what is in flight ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fetch",
    [
        lambda cache: huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=cache),
        lambda cache: huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=cache, force_download=True),
        lambda cache: huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=cache, local_files_only=True),
        lambda cache: huggingface_hub.snapshot_download("org/model", cache_dir=cache) + f"/{WEIGHTS}",
    ],
    ids=["hf_hub_download", "force_download", "local_files_only", "snapshot_download"],
)
def test_others_wait_for_a_file_that_somebody_reads_as_it_arrives(
    hub: Hub, model: Path, tmp_path: Path, opened: threading.Event, monkeypatch: pytest.MonkeyPatch, fetch: Any
):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    waiting = threading.Event()
    for kind, name in ((ondemand.OnDemand, "deliver"), (inflight.InFlight, "wait_verified")):
        before(kind, name)(monkeypatch, waiting.set)
    with fastload.accelerate(), ThreadPoolExecutor(2) as pool:
        loading = pool.submit(load_llama, tmp_path)
        assert opened.wait(60)
        other = pool.submit(lambda: Path(fetch(tmp_path)).read_bytes())  # as soon as he has the path
        assert waiting.wait(60)
        hub.script()
        hub.release()
        assert other.result(60) == (model / WEIGHTS).read_bytes()
        loading.result(60)


@pytest.mark.parametrize("way", ["relative", "through a link"])
def test_any_name_of_the_cache_will_do(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: threading.Event, way: str
):
    (tmp_path / "cache").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    cache = Path("cache") if way == "relative" else tmp_path / "alias"
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    with fastload.accelerate(), ThreadPoolExecutor(2) as pool:
        loading = pool.submit(load_llama, cache)
        assert opened.wait(60)
        second = pool.submit(load_llama, cache)  # finds the links, and reads along
        hub.script()
        hub.release()
        assert diff_models(loading.result(60), second.result(60)) == []
    assert hub.bytes_sent(WEIGHTS) == os.path.getsize(next((tmp_path / "cache").rglob(f"snapshots/*/{WEIGHTS}")))


# -- surprises --------------------------------------------------------------------------------------------------------


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the transfer in a process that can be killed."""
    monkeypatch.setenv("FASTLOAD_PROCESS", "1")


def kill(transfer: ondemand.OnDemand) -> None:
    transfer._running._carrier._process.kill()


@pytest.mark.usefixtures("apart")
def test_a_transfer_that_dies_before_its_files_are_opened_is_finished_the_plain_way(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = load_bert(tmp_path / "plain")
    hub.script(Fault("hold", path=SINGLE, times=None, offset=1_200_000))
    there = []

    def die() -> None:
        held(hub)
        before_bytes = len(hub.requests)
        kill(the_transfer())
        hub.wait(lambda requests: any(r.held for r in requests[before_bytes:]))  # the plain way is under way
        there.append(os.path.isfile(next((tmp_path / "ours").rglob(f"snapshots/*/{SINGLE}"))))
        hub.script()
        hub.release()

    MOMENTS["before transformers looks whether it is there"](monkeypatch, die)
    with pytest.warns(FastloadWarning, match="plain way") as warned, fastload.accelerate():
        ours = load_bert(tmp_path / "ours")
    assert there == [True]
    assert len(warned) == 1
    assert diff_models(plain, ours) == []
    assert os.readlink(next((tmp_path / "ours").rglob(f"snapshots/*/{SINGLE}"))).startswith("../../blobs/")


@pytest.mark.usefixtures("apart")
def test_wrong_bytes_from_the_plain_way_are_never_in_the_snapshot(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.script(Fault("hold", path=SINGLE, times=None, offset=1_200_000))

    def die() -> None:
        held(hub)
        hub.script(Fault("flip", path=SINGLE, times=None, offset=1_500_000))
        kill(the_transfer())
        hub.release()

    MOMENTS["before transformers looks whether it is there"](monkeypatch, die)
    with pytest.warns(FastloadWarning), fastload.accelerate():
        with pytest.raises(IntegrityError, match=SINGLE):
            load_bert(tmp_path)
        assert not links_in_flight(tmp_path)
    assert not list(tmp_path.rglob(f"snapshots/*/{SINGLE}"))


@pytest.mark.usefixtures("apart")
def test_wrong_bytes_that_landed_are_not_handed_out_once_the_file_came_the_plain_way(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = load_bert(tmp_path / "plain")
    wrong = Fault("flip", path=SINGLE, times=None, offset=100_000)  # lands before anybody can find out
    hub.script(wrong, Fault("hold", path=SINGLE, times=None, offset=1_200_000))
    died, one_by_one = [], threading.Lock()

    def die() -> None:
        with one_by_one:
            if not died:
                held(hub)
                hub.script()
                kill(the_transfer())
                hub.release()
                wait_failed(the_transfer())
                died.append(True)

    before(inflight.GuardedHandle, "take")(monkeypatch, die)
    with pytest.warns(FastloadWarning, match="plain way"), fastload.accelerate():
        ours = load_bert(tmp_path / "ours")
    assert diff_models(plain, ours) == []


@pytest.mark.usefixtures("apart")
def test_a_transfer_that_dies_under_many_readers_warns_once(hub: Hub, tmp_path: Path, opened: threading.Event):
    plain = load_llama(tmp_path / "plain")
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=1_200_000))
    with pytest.warns(FastloadWarning) as warned, fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_llama, tmp_path / "ours")
        assert opened.wait(60)
        hub.script()
        kill(the_transfer())
        hub.release()
        assert diff_models(plain, loading.result(60)) == []
    assert len(warned) == 1


def test_a_block_that_is_left_while_another_thread_loads_waits_for_what_is_in_flight(
    hub: Hub, tmp_path: Path, opened: threading.Event, monkeypatch: pytest.MonkeyPatch
):
    plain = load_llama(tmp_path / "plain")
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=1_200_000))
    with ThreadPoolExecutor(1) as pool:
        block = fastload.accelerate()
        block.__enter__()
        loading = pool.submit(load_llama, tmp_path / "ours")
        assert opened.wait(60)

        def go_on() -> None:
            hub.script()
            hub.release()

        before(ondemand, "end_all")(monkeypatch, go_on)
        monkeypatch.setattr("fastload.dropin.end_all", ondemand.end_all)
        block.__exit__(None, None, None)
        assert diff_models(plain, loading.result(60)) == []


# -- other processes --------------------------------------------------------------------------------------------------


def test_the_link_of_another_process_is_shared(hub: Hub, tmp_path: Path, opened: threading.Event):
    folder = tmp_path / "models--org--bert" / "snapshots" / hub.commit("org/bert")
    folder.mkdir(parents=True)
    (folder / SINGLE).symlink_to(
        "/proc/self/fd/987"
    )  # leads nowhere here; there to the same file, half of which landed
    hub.script(Fault("hold", path=SINGLE, times=None, offset=1_200_000))
    with fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_bert, tmp_path)
        assert opened.wait(60)
        assert os.readlink(folder / SINGLE) == "/proc/self/fd/987"
        assert os.path.isfile(folder / SINGLE)
        hub.script()
        hub.release()
        loading.result(60)
    assert os.readlink(folder / SINGLE).startswith("../../blobs/")


def test_a_link_of_another_process_is_never_taken_for_another_file(hub: Hub, tmp_path: Path, opened: threading.Event):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    with fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_llama, tmp_path)
        assert opened.wait(60)
        number = os.readlink(next(tmp_path.rglob(f"snapshots/*/{WEIGHTS}")))
        foreign = tmp_path / "another.safetensors"
        foreign.symlink_to(number)  # to somebody else's descriptor, that has this number by chance
        with pytest.raises(FileNotFoundError, match="Another process"):
            safetensors.safe_open(str(foreign), "pt")
        hub.script()
        hub.release()
        loading.result(60)


FORK = """
import os, sys, threading, warnings
import fastload, huggingface_hub, safetensors, transformers
from fastload import inflight, router

parent, real = os.getpid(), [safetensors.safe_open]  # not names of a module: those are rebound
opened, handle = threading.Event(), inflight.InFlight.handle

def opening(self, *args, **kwargs):
    opened.set()
    if os.getpid() != parent:
        print("the child reads", flush=True)
    return handle(self, *args, **kwargs)

inflight.InFlight.handle = opening

def load():
    model = transformers.AutoModel.from_pretrained("org/model")
    print(sum(float(p.sum()) for p in model.parameters()), flush=True)

with fastload.accelerate():
    thread = threading.Thread(target=load)
    thread.start()
    assert opened.wait(60)
    assert safetensors.safe_open is not real[0]
    child = os.fork()
    if not child:
        assert safetensors.safe_open is real[0] and not router._routes.files and not router._routes.names
        load()
        path = huggingface_hub.hf_hub_download("org/model", sys.argv[1])
        assert len(open(path, "rb").read()) == int(sys.argv[2])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    thread.join()
    assert status == 0
"""


def test_a_forked_process_reads_along_by_a_transfer_of_its_own(hub: Hub, model: Path):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    with program(FORK, WEIGHTS, str((model / WEIGHTS).stat().st_size)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "the child reads\n":
                break
        hub.script()
        hub.release()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    sums = [line for line in out.split("\n") if line and line != "the child reads"]
    assert len(sums) == 2
    assert sums[0] == sums[1]
