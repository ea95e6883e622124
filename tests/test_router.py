"""Unchanged programs call ``safe_open`` and get tensors of files that still arrive; all other files are left alone."""

from __future__ import annotations

import copy
import errno
import gc
import inspect
import os
import pickle
import sys
import tempfile
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
from arrival import COMMIT, Arrival, demanded  # noqa: E402

from fastload import plugins, router  # noqa: E402
from fastload import served as serving  # noqa: E402
from fastload.errors import CacheError, DownloadError, IntegrityError  # noqa: E402
from fastload.settings import Settings  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402

KEPT = {"real": safetensors.safe_open}  # not a global name of its own: those are rebound
NAMES = ["b", "a", "c"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one nested and one plain weight file, with a config."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    for path in ("m.safetensors", "unet/m.safetensors"):
        safetensors.torch.save_file({n: torch.rand(64, 100) for n in NAMES}, folder / path, metadata={"format": "pt"})
    (folder / "unet" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Arrival]]:
    """Let the model arrive."""
    made: list[Arrival] = []

    def start(**options: Any) -> Arrival:
        made.append(Arrival(folder, tmp_path / f"cache{len(made)}", **options))
        return made[-1]

    yield start
    for arrival in made:
        arrival.close()


def stream_of(arrival: Arrival) -> TensorStream:
    """Return a stream over *arrival* with the built-in plugins."""
    return TensorStream(arrival.transfer, plugins.manager(Settings(plugins=())))


def expected(folder: Path) -> dict[str, Any]:
    """Return the tensors of the plain file."""
    return dict(safetensors.torch.load_file(folder / "m.safetensors"))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Compare two dicts of tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_complete_snapshot_is_served_as_it_is(start: Callable[..., Arrival]) -> None:
    arrival = start()
    arrival.finish()
    with stream_of(arrival).served() as path:
        assert path == arrival.snapshot
        assert safetensors.safe_open is KEPT["real"]


def test_served_folder_looks_like_a_snapshot_of_the_cache(start: Callable[..., Arrival], folder: Path) -> None:
    arrival = start()
    arrival.finish("m.safetensors")
    with stream_of(arrival).served() as path:
        assert path.parts[-3:] == ("models--org--model", "snapshots", COMMIT)
        assert (path / "m.safetensors").resolve() == (arrival.snapshot / "m.safetensors").resolve()
        assert (path / "unet/config.json").read_text() == "{}"
        in_flight = path / "unet/m.safetensors"
        assert in_flight.is_file()
        assert in_flight.stat().st_size == (folder / "unet/m.safetensors").stat().st_size
        assert int(os.readlink(in_flight).rpartition("/")[2]) >= 900
    assert not path.parents[2].exists()
    assert not (arrival.snapshot / "unet/m.safetensors").exists()  # never a link to unverified bytes in the cache


def test_reader_that_goes_round_safe_open_fails_loudly(start: Callable[..., Arrival]) -> None:
    arrival = start()
    arrival.land("m.safetensors")
    with stream_of(arrival).served() as path, pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load((path / "m.safetensors").read_bytes())


def test_file_that_is_not_announced_yet_is_served_too(start: Callable[..., Arrival], folder: Path) -> None:
    arrival = start(announce=False)
    with stream_of(arrival).served() as path, ThreadPoolExecutor(1) as pool:
        link = path / "m.safetensors"
        assert link.stat().st_size == (folder / "m.safetensors").stat().st_size
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load(link.read_bytes())
        loading = pool.submit(lambda: dict(safetensors.torch.load_file(link)))
        arrival.announce("m.safetensors")
        arrival.land("m.safetensors")
        assert same(loading.result(), expected(folder))


def test_descriptors_and_folder_are_given_back_after_an_error(start: Callable[..., Arrival]) -> None:
    arrival = start()
    stream = stream_of(arrival)
    for view in arrival.transfer.files.values():
        view.open()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), stream.served() as path:
        raise ZeroDivisionError
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not path.parents[2].exists()
    assert safetensors.safe_open is KEPT["real"]


def test_temporary_folder_that_cannot_be_made_is_an_error_of_ours(
    start: Callable[..., Arrival], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(CacheError, match="temporary folder"), stream_of(start()).served():
        pass


# -- the handle -------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(start: Callable[..., Arrival]) -> Iterator[tuple[Arrival, Path]]:
    """An arrival and the path at which its plain weight file is served."""
    arrival = start()
    with stream_of(arrival).served() as path:
        yield arrival, path / "m.safetensors"


def test_handle_has_everything_that_the_real_one_has(served: tuple[Arrival, Path], folder: Path) -> None:
    arrival, path = served
    arrival.land_head("m.safetensors")
    ours, real = safetensors.safe_open(path, "pt"), KEPT["real"](folder / "m.safetensors", "pt")
    assert isinstance(ours, router.Handle)
    public = [name for name in dir(real) if not name.startswith("_")] + ["__enter__", "__exit__"]
    for name in public:
        assert hasattr(ours, name), name
        of_real = inspect.signature(getattr(real, name)).parameters
        of_ours = inspect.signature(getattr(ours, name)).parameters
        if name != "__exit__":
            assert list(of_ours) == list(of_real), name
    real_slice, our_slice = real.get_slice("a"), ours.get_slice("a")
    for name in (name for name in dir(real_slice) if not name.startswith("_")):
        assert hasattr(our_slice, name), name
    for option in inspect.signature(KEPT["real"]).parameters:
        assert option in {"filename", "framework", "device", "backend"}, f"new option of safe_open: {option}"


def test_handle_answers_as_the_real_one(served: tuple[Arrival, Path], folder: Path) -> None:
    arrival, path = served
    arrival.land("m.safetensors")
    with (
        safetensors.safe_open(path, framework="pt", device="cpu", backend="mmap") as ours,
        KEPT["real"](folder / "m.safetensors", framework="pt") as real,
    ):
        assert isinstance(ours, safetensors.safe_open) and isinstance(real, safetensors.safe_open)
        assert ours.keys() == real.keys()
        assert ours.offset_keys() == real.offset_keys()
        assert ours.metadata() == real.metadata()
        assert list(ours.get_tensors()) == list(real.get_tensors())
        assert same(dict(ours.get_tensors()), real.get_tensors())
        assert torch.equal(ours.get_tensor("a"), real.get_tensor("a"))
        assert torch.equal(ours.get_slice("a")[2:5], real.get_slice("a")[2:5])
        assert ours.get_slice("a").get_shape() == real.get_slice("a").get_shape()
        assert ours.get_slice("a").get_dtype() == real.get_slice("a").get_dtype()
        kept = ours.get_slice("a")
    for handle in (ours, real):
        for call in (handle.keys, handle.metadata, handle.get_tensors, lambda h=handle: h.get_tensor("a")):
            with pytest.raises(safetensors.SafetensorError, match="File is closed"):
                call()
    assert torch.equal(kept[...], expected(folder)["a"])


@pytest.mark.parametrize("method", ["get_tensor", "get_slice"])
def test_unknown_tensor_is_the_real_handles_error(served: tuple[Arrival, Path], folder: Path, method: str) -> None:
    arrival, path = served
    arrival.land("m.safetensors")
    messages = []
    for handle in (safetensors.safe_open(path, "pt"), KEPT["real"](folder / "m.safetensors", "pt")):
        with pytest.raises(safetensors.SafetensorError) as caught:
            getattr(handle, method)("nope")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_any_path_to_the_file_is_routed(served: tuple[Arrival, Path], tmp_path: Path) -> None:
    _, path = served
    alias = tmp_path / "alias"
    alias.symlink_to(path)
    os.link(path.resolve(), tmp_path / "hard")
    for name in (path, str(path), os.fsencode(path), alias, tmp_path / "hard"):
        assert isinstance(safetensors.safe_open(name, "pt"), router.Handle)


def test_load_file_returns_at_once_and_each_tensor_waits(served: tuple[Arrival, Path], folder: Path) -> None:
    arrival, path = served
    arrival.land_head("m.safetensors")
    tensors = safetensors.torch.load_file(path)
    first, *_, last = list(tensors)
    assert torch.equal(tensors[first], expected(folder)[first])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tensors.__getitem__, last)
        demanded(arrival, "m.safetensors")
        assert not waiting.done()
        arrival.land("m.safetensors")
        assert torch.equal(waiting.result(), expected(folder)[last])


@pytest.mark.parametrize(
    "read",
    [
        dict, OrderedDict, lambda t: {**t}, lambda t: dict(t.items()), lambda t: dict(zip(t, t.values(), strict=True)),
        lambda t: t.copy(), copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), lambda t: t | {},
        lambda t: {} | t, lambda t: {n: t.get(n) for n in t}, lambda t: {n: t.pop(n) for n in list(t)},
        lambda t: {n: t.setdefault(n, 0) for n in t}, lambda t: dict(t.popitem() for _ in range(3)),
        lambda t: dict(sorted(t.items())), lambda t: {**dict.fromkeys(t), **t}, lambda t: (lambda **k: k)(**t),
    ],
)  # fmt: skip
def test_no_way_to_read_the_dict_gives_anything_but_tensors(
    served: tuple[Arrival, Path], folder: Path, read: Callable[[Any], dict[str, Any]]
) -> None:
    arrival, path = served
    arrival.land("m.safetensors")
    found = read(safetensors.torch.load_file(path))
    assert {type(v) for v in found.values()} == {torch.Tensor}
    assert same(found, expected(folder))


def test_dict_of_arriving_tensors_is_a_dict(served: tuple[Arrival, Path]) -> None:
    arrival, path = served
    arrival.land("m.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert isinstance(tensors, dict)
    assert tensors["a"] is tensors["a"]
    assert len(tensors) == len(tensors.items()) == 3
    assert "a" in tensors and "x" not in tensors
    assert tensors.get("x", 1) == tensors.pop("x", 1) == 1
    tensors["new"] = 5
    assert list(tensors)[-1] == "new"
    with pytest.raises(KeyError):
        tensors["x"]
    del tensors["new"]
    assert "3 tensors" in repr(tensors)


def test_failed_transfer_ends_every_open_handle(served: tuple[Arrival, Path]) -> None:
    arrival, path = served
    arrival.land_head("m.safetensors")
    handle = safetensors.safe_open(path, "pt")
    last = handle.offset_keys()[-1]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(handle.get_tensor, last), pool.submit(dict, safetensors.torch.load_file(path))]
        demanded(arrival, "m.safetensors")
        arrival.fail(DownloadError("gone"))
        for future in waiting:
            with pytest.raises(DownloadError, match="gone"):
                future.result()


def test_file_that_is_refused_ends_its_readers_alone(served: tuple[Arrival, Path]) -> None:
    from fastload.errors import to_record

    arrival, path = served
    arrival.tell("refused", file="m.safetensors", error=to_record(IntegrityError("wrong bytes")))
    arrival.land("unet/m.safetensors")
    with pytest.raises(IntegrityError, match="wrong bytes"):
        safetensors.safe_open(path, "pt").keys()
    assert safetensors.safe_open(path.parent / "unet/m.safetensors", "pt").keys() == sorted(NAMES)


def test_other_frameworks_wait_for_the_verified_file(served: tuple[Arrival, Path], folder: Path) -> None:
    arrival, path = served
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(safetensors.safe_open, path, framework="numpy")
        arrival.finish()
        handle = waiting.result()
    assert type(handle) is KEPT["real"]
    assert handle.get_tensor("a").tolist() == expected(folder)["a"].tolist()


def test_verified_file_is_opened_by_the_real_one(served: tuple[Arrival, Path]) -> None:
    arrival, path = served
    arrival.finish()
    assert type(safetensors.safe_open(path, "pt")) is KEPT["real"]
    assert type(safetensors.safe_open(filename=path, framework="pt", device="cpu")) is KEPT["real"]


def test_other_files_and_wrong_calls_go_to_the_real_one(served: tuple[Arrival, Path], folder: Path) -> None:
    assert type(safetensors.safe_open(folder / "m.safetensors", "pt")) is KEPT["real"]
    for arguments in (("/does/not/exist", "pt"), (), ("x",), (folder / "m.safetensors", "abacus"), (None, "pt")):
        with pytest.raises(Exception) as of_real:
            KEPT["real"](*arguments)
        with pytest.raises(of_real.type) as of_ours:
            safetensors.safe_open(*arguments)
        assert str(of_ours.value) == str(of_real.value)


def test_device_of_the_handle_is_where_tensors_go(served: tuple[Arrival, Path]) -> None:
    arrival, path = served
    arrival.land("m.safetensors")
    handle = safetensors.safe_open(path, "pt", device="meta")
    assert handle.get_tensor("a").device.type == "meta"
    assert handle.get_tensors()["a"].device.type == "meta"
    assert handle.get_slice("a")[0].device.type == "meta"


# -- coming and going -------------------------------------------------------------------------------------------------


def test_every_module_that_holds_safe_open_is_rebound_and_restored(start: Callable[..., Arrival]) -> None:
    module = types.ModuleType("fastload_test_holder")
    module.safe_open = module.other_name = KEPT["real"]  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        holders = {n: m for n, m in sys.modules.items() if getattr(m, "__dict__", {}).get("safe_open") is KEPT["real"]}
        assert {"safetensors", "safetensors.torch", "fastload_test_holder"} <= holders.keys()
        with stream_of(start()).served():
            assert {m.safe_open for m in holders.values()} == {router.safe_open}
            assert module.other_name is router.safe_open  # type: ignore[attr-defined]
            late = types.ModuleType("fastload_test_late")
            exec("from safetensors import safe_open", vars(late))
            sys.modules[late.__name__] = late
        assert {m.safe_open for m in [*holders.values(), late]} == {KEPT["real"]}
        assert module.other_name is KEPT["real"]  # type: ignore[attr-defined]
    finally:
        del sys.modules[module.__name__]
        sys.modules.pop("fastload_test_late", None)


def test_modules_that_load_on_demand_are_not_woken(start: Callable[..., Arrival]) -> None:
    class Sleeping(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError("woken")

    sys.modules["fastload_test_sleeping"] = Sleeping("fastload_test_sleeping")
    try:
        with stream_of(start()).served():
            pass
    finally:
        del sys.modules["fastload_test_sleeping"]


def test_routes_overlap_and_the_last_to_go_restores(start: Callable[..., Arrival]) -> None:
    first, second = stream_of(start()).served(), stream_of(start()).served()
    path = first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert safetensors.safe_open is router.safe_open
    assert not path.exists()
    second.__exit__(None, None, None)
    assert safetensors.safe_open is KEPT["real"]


def test_one_file_may_be_served_twice_at_once(start: Callable[..., Arrival], folder: Path) -> None:
    arrival = start()
    with stream_of(arrival).served() as one:
        with stream_of(arrival).served() as two:
            pass
        arrival.land("m.safetensors")
        assert not two.exists()
        assert same(dict(safetensors.torch.load_file(one / "m.safetensors")), expected(folder))


def test_routes_come_and_go_in_many_threads(start: Callable[..., Arrival], folder: Path) -> None:
    arrivals = [start() for _ in range(4)]
    for arrival in arrivals:
        arrival.land("m.safetensors")

    def load(arrival: Arrival) -> bool:
        for _ in range(10):
            with stream_of(arrival).served() as path:
                if not same(dict(safetensors.torch.load_file(path / "m.safetensors")), expected(folder)):
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(load, arrivals)) == [True] * 4
    assert safetensors.safe_open is KEPT["real"]
    assert safetensors.torch.safe_open is KEPT["real"]


def test_who_kept_the_router_still_opens_files(start: Callable[..., Arrival], folder: Path) -> None:
    with stream_of(start()).served():
        kept = safetensors.safe_open
    gc.collect()
    assert type(kept(folder / "m.safetensors", "pt")) is KEPT["real"]


@pytest.mark.parametrize("memory_is", ["there", "full", "away"])
def test_links_stand_in_memory_if_they_can_unless_temporary_files_go_elsewhere(
    start: Callable[..., Arrival], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_is: str
):
    """To remove them from a disk is what a model would wait for."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    disk.mkdir()
    if memory_is != "away":
        memory.mkdir()
    if memory_is == "full":
        real = os.symlink

        def symlink(target: str, link: Path, *args: Any, **kwargs: Any) -> None:
            if memory in Path(link).parents:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(target, link, *args, **kwargs)

        monkeypatch.setattr(os, "symlink", symlink)
    monkeypatch.setattr(serving, "_MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    arrival = start()
    for default, wanted in (("/elsewhere", disk), (str(disk), memory if memory_is == "there" else disk)):
        monkeypatch.setattr(serving, "_DEFAULT", default)
        with stream_of(arrival).served() as folder:
            assert wanted in folder.parents
        assert not [*disk.iterdir(), *(memory.iterdir() if memory.exists() else ())]
