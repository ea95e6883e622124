"""Unchanged code of the real libraries gets our bytes, and everything else exactly as without us."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import huggingface_hub  # noqa: E402
import safetensors.torch  # noqa: E402
from accelerating import KEPT, WEIGHTS, everything_is_put_back, links_in_flight, point_to, write_model  # noqa: E402
from compare import diff_models  # noqa: E402
from huggingface_hub import errors as hub_errors  # noqa: E402
from huggingface_hub import file_download  # noqa: E402

import fastload  # noqa: E402
from fastload import dropin, inflight, ondemand, plainway, readers, router, starting  # noqa: E402
from fastload.errors import DownloadError, FastloadWarning, IntegrityError, SettingsError  # noqa: E402
from fastload.testing import Fault, Hub  # noqa: E402

pytestmark = [pytest.mark.transformers]

BIG = Fault("hold", path="*.safetensors", times=None)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("accelerate") / "model")


@pytest.fixture
def hub(model: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    started = make_hub({"org/model": model})
    point_to(started, monkeypatch)
    return started


@pytest.fixture(autouse=True)
def off_means_off() -> Iterator[None]:
    with everything_is_put_back():
        yield


def tree(cache: Path) -> dict[str, str]:
    """Return every name in *cache* but for ours, and what it holds or points to."""
    found = {}
    for path in sorted(cache.rglob("*")):
        name = str(path.relative_to(cache))
        if "/.fastload" in name or name == "CACHEDIR.TAG":
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = f"{path.stat().st_mode:o} {hash(path.read_bytes())}"
    return found


def resolved(hub: Hub) -> str:
    return hub.commit("org/model")


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"device_map": "cpu"}, {"disable_mmap": True}], ids=str)
def test_from_pretrained_gives_the_same_model_and_the_same_cache(hub: Hub, tmp_path: Path, options: dict[str, Any]):
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load("org/model", cache_dir=tmp_path / "plain", **options)
    hub.clear()
    with fastload.accelerate():
        ours = load("org/model", cache_dir=tmp_path / "ours", **options)
    assert diff_models(plain, ours) == []
    assert tree(tmp_path / "plain") == tree(tmp_path / "ours")
    weights = [r for r in hub.requests if r.file and r.file.endswith(".safetensors") and r.status == 206]
    assert len(weights) >= 2  # ranges: it was us
    assert len({r.connection for r in weights}) >= 2


def test_weights_are_read_while_they_arrive(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.script(Fault("hold", path=WEIGHTS, times=None, offset=2_700_000))
    opened = threading.Event()

    class Seen(inflight.GuardedHandle):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.set()

    monkeypatch.setattr(inflight, "GuardedHandle", Seen)
    with fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        loading = pool.submit(transformers.AutoModel.from_pretrained, "org/model", cache_dir=tmp_path)
        assert opened.wait(60)  # by from_pretrained, of a file that cannot be complete
        assert not loading.done()
        link = next(tmp_path.rglob(f"snapshots/*/{WEIGHTS}"))
        assert os.readlink(link).startswith("/proc/self/fd/")
        assert safetensors.safe_open is not KEPT["safe_open"]
        hub.script()
        hub.release()
        loading.result(60)
    assert os.readlink(link).startswith("../../blobs/")


def test_no_model_is_returned_before_it_is_verified(hub: Hub, tmp_path: Path):
    hub.script(Fault("flip", path=WEIGHTS, times=None, offset=900_000))
    with pytest.raises(IntegrityError, match=WEIGHTS), fastload.accelerate():
        transformers.AutoModelForCausalLM.from_pretrained("org/model", cache_dir=tmp_path)
    assert not list(tmp_path.rglob(f"snapshots/*/{WEIGHTS}"))
    hub.script()
    with fastload.accelerate():
        transformers.AutoModelForCausalLM.from_pretrained("org/model", cache_dir=tmp_path)


def test_bytes_that_were_wrong_once_are_never_in_a_model(hub: Hub, tmp_path: Path):
    plain = transformers.AutoModelForCausalLM.from_pretrained("org/model", cache_dir=tmp_path / "plain")
    hub.script(Fault("flip", path=WEIGHTS, times=1, offset=900_000))
    try:
        with fastload.accelerate():
            ours = transformers.AutoModelForCausalLM.from_pretrained("org/model", cache_dir=tmp_path / "ours")
    except IntegrityError:  # tensors had been handed out by then
        with fastload.accelerate():
            ours = transformers.AutoModelForCausalLM.from_pretrained("org/model", cache_dir=tmp_path / "ours")
    assert diff_models(plain, ours) == []


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin", "config.json", "vocab/tokens.txt"])
def test_hf_hub_download_returns_the_same_path_to_a_whole_file(hub: Hub, model: Path, tmp_path: Path, name: str):
    plain = huggingface_hub.hf_hub_download("org/model", name, cache_dir=tmp_path / "plain")
    with fastload.accelerate():
        ours = huggingface_hub.hf_hub_download("org/model", name, cache_dir=tmp_path / "ours")
        assert Path(ours).read_bytes() == (model / name).read_bytes()  # whole at once: anybody may open it in any way
    assert Path(ours).relative_to(tmp_path / "ours") == Path(plain).relative_to(tmp_path / "plain")
    assert tree(tmp_path / "plain") == tree(tmp_path / "ours")


def test_what_was_verified_as_it_came_is_not_hashed_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []
    real = plainway.check_digest
    monkeypatch.setattr(
        plainway, "check_digest", lambda path, name, digest: (hashed.append(name), real(path, name, digest))
    )
    with fastload.accelerate():
        huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
        assert not hashed
        huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path, force_download=True)
        assert hashed == [WEIGHTS]  # that one came the plain way


@pytest.mark.parametrize(
    "patterns", [{}, {"allow_patterns": ["*.json", "*.safetensors"]}, {"ignore_patterns": "*.bin"}]
)
def test_snapshot_download_fills_the_same_cache(hub: Hub, tmp_path: Path, patterns: dict[str, Any]):
    plain = huggingface_hub.snapshot_download("org/model", cache_dir=tmp_path / "plain", **patterns)
    with fastload.accelerate():
        ours = huggingface_hub.snapshot_download("org/model", cache_dir=tmp_path / "ours", **patterns)
        assert not [p for p in Path(ours).rglob("*") if p.is_symlink() and "/proc/" in os.readlink(p)]
    assert Path(ours).relative_to(tmp_path / "ours") == Path(plain).relative_to(tmp_path / "plain")
    assert tree(tmp_path / "plain") == tree(tmp_path / "ours")


def test_a_file_that_is_cached_costs_no_process(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    huggingface_hub.snapshot_download("org/model", cache_dir=tmp_path)
    monkeypatch.setattr(ondemand, "Running", lambda *a, **k: pytest.fail("a transfer was begun"))
    with fastload.accelerate():
        transformers.AutoModel.from_pretrained("org/model", cache_dir=tmp_path)
        huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)


def test_a_download_goes_on_where_a_killed_one_stopped(hub: Hub, model: Path, tmp_path: Path):
    hub.script(Fault("hold", path=WEIGHTS, times=None, offset=2_700_000))
    code = (
        "import sys, fastload, huggingface_hub\n"
        "with fastload.accelerate(): huggingface_hub.hf_hub_download('org/model', sys.argv[1], cache_dir=sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, WEIGHTS, str(tmp_path)])
    hub.wait(lambda requests: sum(r.bytes_sent for r in requests if r.file == WEIGHTS) >= 2 << 20)
    hub.wait(lambda requests: any(r.held for r in requests if r.file == WEIGHTS))
    from programs import landed_bytes, until

    until(lambda: landed_bytes(tmp_path) >= 1 << 20, "something has landed")
    process.kill()
    process.wait()
    hub.script()
    hub.release()
    hub.clear()
    with fastload.accelerate():
        path = huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
    assert Path(path).read_bytes() == (model / WEIGHTS).read_bytes()
    assert hub.bytes_sent(WEIGHTS) <= (model / WEIGHTS).stat().st_size - (1 << 20)


def test_a_link_that_a_crash_left_is_no_file(hub: Hub, tmp_path: Path):
    folder = tmp_path / "models--org--model" / "snapshots" / resolved(hub)
    folder.mkdir(parents=True)
    other = tmp_path / "other"
    other.write_bytes(b"another file")
    with other.open() as f, fastload.accelerate():  # the number that the link holds means something here
        (folder / WEIGHTS).symlink_to(f"/proc/self/fd/{f.fileno()}")
        transformers.AutoModel.from_pretrained("org/model", cache_dir=tmp_path)
        (folder / "pytorch_model.bin").symlink_to(f"/proc/self/fd/{f.fileno()}")
        path = huggingface_hub.hf_hub_download(
            "org/model", "pytorch_model.bin", revision=resolved(hub), cache_dir=tmp_path
        )
        assert Path(path).stat().st_size == 1_500_000
    assert os.readlink(folder / WEIGHTS).startswith("../../blobs/")


def test_a_download_that_was_started_is_joined(hub: Hub, tmp_path: Path, model: Path):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    running = fastload.start("org/model", settings={"cache_dir": tmp_path})
    try:
        with fastload.accelerate("org/model"), ThreadPoolExecutor(1) as pool:
            loading = pool.submit(transformers.AutoModel.from_pretrained, "org/model", cache_dir=tmp_path)
            hub.wait(lambda requests: sum(r.held for r in requests) >= 1)
            hub.script()
            hub.release()
            loading.result(60)
    finally:
        running.wait()
        running.join()
    size = sum((model / f"model-0000{n}-of-00002.safetensors").stat().st_size for n in (1, 2))
    assert sum(hub.bytes_sent(f"model-0000{n}-of-00002.safetensors") for n in (1, 2)) == size


# -- everything else stays theirs -------------------------------------------------------------------------------------


ERRORS: dict[str, tuple[type[BaseException], Callable[[Path], Any]]] = {
    "no such file": (
        hub_errors.EntryNotFoundError,
        lambda cache: huggingface_hub.hf_hub_download("org/model", "none.safetensors", cache_dir=cache),
    ),
    "no such repository": (
        hub_errors.RepositoryNotFoundError,
        lambda cache: huggingface_hub.hf_hub_download("org/none", WEIGHTS, cache_dir=cache),
    ),
    "no such revision": (
        hub_errors.RevisionNotFoundError,
        lambda cache: huggingface_hub.hf_hub_download("org/model", WEIGHTS, revision="none", cache_dir=cache),
    ),
    "not in the cache": (
        hub_errors.LocalEntryNotFoundError,
        lambda cache: huggingface_hub.hf_hub_download("org/model", WEIGHTS, local_files_only=True, cache_dir=cache),
    ),
    "no such model": (
        OSError,
        lambda cache: transformers.AutoModel.from_pretrained("org/none", cache_dir=cache),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_libraries_own_and_nobody_warns(hub: Hub, tmp_path: Path, name: str):
    kind, call = ERRORS[name]
    with pytest.raises(kind) as plain:
        call(tmp_path / "plain")
    with pytest.raises(kind) as ours, fastload.accelerate():
        call(tmp_path / "ours")
    assert type(ours.value) is type(plain.value)
    strip = lambda e: str(e).split("(Request ID")[0].split("Root=")[0].split("\n")[0]  # noqa: E731
    assert strip(ours.value) == strip(plain.value)


def test_offline_is_theirs(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub_errors.LocalEntryNotFoundError), fastload.accelerate():
        huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
    assert not hub.requests


def test_a_gated_repository_says_so_and_opens_with_the_token(model: Path, make_hub: Any, tmp_path: Path):
    hub = make_hub({"org/gated": model}, gated={"org/gated"}, token="secret")
    with fastload.accelerate():
        with pytest.raises(hub_errors.GatedRepoError):
            huggingface_hub.hf_hub_download("org/gated", WEIGHTS, endpoint=hub.endpoint, cache_dir=tmp_path)
        path = huggingface_hub.hf_hub_download(
            "org/gated", WEIGHTS, endpoint=hub.endpoint, cache_dir=tmp_path, token="secret"
        )
    assert Path(path).read_bytes() == (model / WEIGHTS).read_bytes()
    assert not [r for r in hub.requests if r.origin == "cdn" and "authorization" in r.headers]


@pytest.mark.parametrize("options", [{"force_download": True}, {"local": True}, {"dry_run": True}], ids=str)
def test_arguments_that_are_not_ours_go_the_plain_way(
    hub: Hub, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ondemand, "Running", lambda *a, **k: pytest.fail("a transfer was begun"))
    found = []
    for name in ("plain", "ours"):
        given = {"local_dir": tmp_path / name / "local"} if options.get("local") else options
        with fastload.accelerate() if name == "ours" else contextlib.nullcontext():
            result = huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path / name, **given)
        found.append(str(result).replace(str(tmp_path / name), ""))
    assert found[0] == found[1]
    assert {n: v for n, v in tree(tmp_path / "plain").items() if ".metadata" not in n} == {
        n: v for n, v in tree(tmp_path / "ours").items() if ".metadata" not in n
    }


def test_a_progress_bar_of_the_callers_hears_every_byte(hub: Hub, tmp_path: Path, model: Path):
    seen: list[tuple[str, int]] = []

    class Bar(huggingface_hub.utils.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            seen.append(("total", kwargs["total"]))

        def update(self, n: float | None = 1) -> None:
            seen.append(("bytes", int(n or 0)))

    with fastload.accelerate():
        huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path, tqdm_class=Bar)
    size = (model / WEIGHTS).stat().st_size
    assert seen[0] == ("total", size)
    assert sum(n for what, n in seen if what == "bytes") == size


def test_a_client_of_the_programs_own_is_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ondemand, "Running", lambda *a, **k: pytest.fail("a transfer was begun"))
    made = []

    def factory() -> Any:
        made.append(1)
        return huggingface_hub.utils._http.default_client_factory()

    huggingface_hub.set_client_factory(factory)
    try:
        with fastload.accelerate():
            huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert made


# -- scope ------------------------------------------------------------------------------------------------------------


def test_only_the_models_that_were_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ondemand, "Running", lambda *a, **k: pytest.fail("a transfer was begun"))
    with fastload.accelerate("org/other", "hf://org/third@main"):
        huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
    with pytest.raises(SettingsError, match="names of models"), fastload.accelerate(3):  # type: ignore[arg-type]
        pass


def test_blocks_nest_and_overlap_and_the_last_one_puts_everything_back(hub: Hub):
    first, second = fastload.accelerate("org/model"), fastload.accelerate()
    with first:
        ours = file_download._hf_hub_download_to_cache_dir
        assert ours is not KEPT["download"]
        second.__enter__()
        with fastload.accelerate():
            assert file_download._hf_hub_download_to_cache_dir is ours
    assert file_download._hf_hub_download_to_cache_dir is ours
    second.__exit__(None, None, None)
    assert file_download._hf_hub_download_to_cache_dir is KEPT["download"]


def test_a_module_that_took_the_name_over_gets_it_back(monkeypatch: pytest.MonkeyPatch):
    import types

    holder = types.ModuleType("holder")
    holder.fetch = KEPT["download"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "holder", holder)
    with fastload.accelerate():
        assert holder.fetch is file_download._hf_hub_download_to_cache_dir is not KEPT["download"]  # type: ignore[attr-defined]
    assert holder.fetch is KEPT["download"]  # type: ignore[attr-defined]


def test_many_threads_load_at_once(hub: Hub, tmp_path: Path, model: Path):
    def fetch(n: int) -> bytes:
        name = [WEIGHTS, "pytorch_model.bin", "model-00002-of-00002.safetensors"][n % 3]
        with fastload.accelerate():
            path = huggingface_hub.hf_hub_download("org/model", name, cache_dir=tmp_path)
            return Path(path).read_bytes() == (model / name).read_bytes()

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(fetch, range(6)))
    assert hub.bytes_sent(WEIGHTS) == (model / WEIGHTS).stat().st_size


# -- surprises --------------------------------------------------------------------------------------------------------


def downloads_with_one_warning(cache: Path, model: Path) -> None:
    """Whatever the surprise is, the files come, and there is one warning."""
    with pytest.warns(FastloadWarning, match="plain way") as warned, fastload.accelerate():
        for name in (WEIGHTS, "pytorch_model.bin"):
            path = huggingface_hub.hf_hub_download("org/model", name, cache_dir=cache)
            assert Path(path).read_bytes() == (model / name).read_bytes()
    assert len(warned) == 1


def test_a_function_with_another_signature_is_left_alone(hub: Hub, tmp_path: Path, model: Path):
    def other(**everything: Any) -> Any:
        return KEPT["download"](**everything)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download, "_hf_hub_download_to_cache_dir", other)
        downloads_with_one_warning(tmp_path, model)
        assert file_download._hf_hub_download_to_cache_dir is other


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a defect of ours")


def test_an_engine_that_breaks_does_not_break_the_download(hub: Hub, tmp_path: Path, model: Path, monkeypatch: Any):
    monkeypatch.setattr(ondemand, "Running", _broken)
    downloads_with_one_warning(tmp_path, model)


def test_an_engine_that_fails_does_not_break_the_download(hub: Hub, tmp_path: Path, model: Path, monkeypatch: Any):
    def refuse(self: Any, path: str) -> None:
        raise DownloadError("the line is cut")

    monkeypatch.setattr(ondemand.Running, "want", refuse)
    downloads_with_one_warning(tmp_path, model)


def test_a_hub_that_lists_nothing_is_left_to_the_library(hub: Hub, tmp_path: Path, model: Path):
    hub.script(Fault("garbage_json", path="*", times=None))
    downloads_with_one_warning(tmp_path, model)


def test_arguments_that_nobody_knows_yet_are_passed_on():
    seen: dict[str, Any] = {}

    def newer(*, cache_dir: Any, repo_id: Any, filename: Any, repo_type: Any, revision: Any, endpoint: Any, headers: Any,
              local_files_only: Any, force_download: Any, dry_run: Any, tqdm_class: Any, etag_timeout: Any, token: Any,
              colour: str = "none") -> Any:  # fmt: skip
        seen.update(colour=colour)
        return "there"

    arguments = dict.fromkeys(dropin._KNOWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download, "_hf_hub_download_to_cache_dir", newer)
        with pytest.warns(FastloadWarning, match="colour"), fastload.accelerate():
            assert file_download._hf_hub_download_to_cache_dir(**arguments, colour="red") == "there"
    assert seen == {"colour": "red"}


def test_a_transfer_that_dies_under_its_readers_is_finished_the_plain_way(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = transformers.AutoModelForCausalLM.from_pretrained("org/model", cache_dir=tmp_path / "plain")
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    handed = threading.Event()
    take = inflight.InFlight.take

    def taken(self: Any, name: str) -> None:
        handed.set()
        take(self, name)

    monkeypatch.setattr(inflight.InFlight, "take", taken)
    monkeypatch.setenv("FASTLOAD_PROCESS", "1")
    with pytest.warns(FastloadWarning, match="plain way"), fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        load = transformers.AutoModelForCausalLM.from_pretrained
        loading = pool.submit(load, "org/model", cache_dir=tmp_path / "ours")
        assert handed.wait(60)  # some tensors are out, others wait
        [transfer] = dropin._state.transfers._open.values()
        hub.script()
        transfer._running._carrier._process.kill()
        ours = loading.result(60)
    hub.release()
    assert diff_models(plain, ours) == []
    assert tree(tmp_path / "plain").keys() <= tree(tmp_path / "ours").keys()
    link = next((tmp_path / "ours").rglob(f"snapshots/*/{WEIGHTS}"))
    assert os.readlink(link).startswith("../../blobs/")


def test_a_transfer_that_dies_with_the_hub_raises_what_the_library_raises(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    monkeypatch.setenv("FASTLOAD_PROCESS", "1")
    with pytest.raises(OSError), pytest.warns(FastloadWarning), fastload.accelerate(), ThreadPoolExecutor(1) as pool:
        loading = pool.submit(transformers.AutoModel.from_pretrained, "org/model", cache_dir=tmp_path)
        hub.wait(lambda requests: any(r.held for r in requests))
        [transfer] = dropin._state.transfers._open.values()
        hub.script(Fault("status", status=403, path="*.safetensors", times=None))
        transfer._running._carrier._process.kill()
        hub.release()
        loading.result(60)
    assert not list(tmp_path.rglob("snapshots/*/*.safetensors"))


def test_an_exception_in_the_block_stops_everything(hub: Hub, tmp_path: Path):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=2_700_000))
    with pytest.raises(ZeroDivisionError), ThreadPoolExecutor(1) as pool, fastload.accelerate():
        loading = pool.submit(transformers.AutoModel.from_pretrained, "org/model", cache_dir=tmp_path)
        hub.wait(lambda requests: any(r.held for r in requests))
        hub.script()
        raise ZeroDivisionError
    hub.release()
    with contextlib.suppress(Exception):
        loading.result(60)
    assert not links_in_flight(tmp_path)


def test_a_small_file_that_comes_wrong_once_comes_again(hub: Hub, tmp_path: Path, model: Path):
    hub.script(Fault("flip", path="config.json", times=1, after_bytes=10))
    with pytest.warns(FastloadWarning, match=r"config\.json"), fastload.accelerate():
        path = huggingface_hub.hf_hub_download("org/model", "config.json", cache_dir=tmp_path)
    assert Path(path).read_bytes() == (model / "config.json").read_bytes()


def test_a_small_file_that_is_always_wrong_is_an_error_and_not_in_the_cache(hub: Hub, tmp_path: Path):
    hub.script(Fault("flip", path="config.json", times=None, after_bytes=10))
    with pytest.warns(FastloadWarning), pytest.raises(IntegrityError, match=r"config\.json"), fastload.accelerate():
        huggingface_hub.hf_hub_download("org/model", "config.json", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("snapshots/*/config.json"))


def test_a_cache_without_links_gets_whole_files(hub: Hub, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS", True)
    with fastload.accelerate():
        transformers.AutoModel.from_pretrained("org/model", cache_dir=tmp_path)
    path = next(tmp_path.rglob(f"snapshots/*/{WEIGHTS}"))
    assert not path.is_symlink()
    assert path.read_bytes() == (model / WEIGHTS).read_bytes()


def test_no_process_of_ours_outlives_the_block(hub: Hub, tmp_path: Path):
    from programs import children

    before = children(os.getpid())
    with fastload.accelerate():
        huggingface_hub.hf_hub_download("org/model", WEIGHTS, cache_dir=tmp_path)
    assert children(os.getpid()) == before
    assert not router._routes.files
    assert not router._routes.names


# -- who reads --------------------------------------------------------------------------------------------------------


def test_only_known_readers_get_a_path_early():
    assert not readers.reads_by_safe_open("org/model")
    names: dict[str, Any] = {"__name__": "transformers.modeling_utils", "ask": readers.reads_by_safe_open}
    exec("def from_pretrained(**kwargs): return ask('org/model')", names)
    assert names["from_pretrained"]()
    assert not names["from_pretrained"](disable_mmap=True)
    names["__name__"] = "transformers.tokenization_utils_base"
    assert not names["from_pretrained"]()


def test_a_snapshot_for_two_callers_is_early_only_if_both_read_so():
    inner: dict[str, Any] = {"__name__": "huggingface_hub._snapshot_download", "ask": readers.reads_by_safe_open}
    exec(
        "def snapshot_download(repo_id, pool, go):\n"
        "    def _inner(): return go() and ask(repo_id)\n"
        "    return pool.submit(_inner).result()", inner,
    )  # fmt: skip
    outer: dict[str, Any] = {"__name__": "diffusers.pipelines.pipeline_utils", "inner": inner["snapshot_download"]}
    exec("def from_pretrained(*a): return inner(*a)", outer)
    with ThreadPoolExecutor(4) as pool:
        assert outer["from_pretrained"]("org/model", pool, lambda: True)
        assert not inner["snapshot_download"]("org/model", pool, lambda: True)
        waiting, go = threading.Event(), threading.Event()
        other = pool.submit(inner["snapshot_download"], "org/model", pool, lambda: waiting.set() or go.wait())
        assert waiting.wait(10)
        assert not outer["from_pretrained"]("org/model", pool, lambda: True)
        assert outer["from_pretrained"]("org/another", pool, lambda: True)
        go.set()
        other.result()


# -- without code -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python whose site-packages hold ``fastload-start.pth``, as the wheel puts it there."""
    import venv

    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    root = Path(fastload.__file__).parents[1]
    others = [p for p in sys.path if p.endswith("site-packages")]
    (site / "a.pth").write_text("\n".join([str(root), str(root / "plugins"), *others]))
    (site / "fastload-start.pth").write_text((root / "fastload-start.pth").read_text())
    return folder / "bin" / "python"


def run(python: Path, code: str, *words: str, **environ: str) -> str:
    done = subprocess.run(
        [python, "-c", code, *words], capture_output=True, text=True, timeout=60, env={**os.environ, **environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_without_the_variables_nothing_is_imported(python: Path):
    assert run(python, "import sys; print([m for m in sys.modules if m.startswith('fastload')])") == "[]\n"


LOAD = """
import sys, huggingface_hub.file_download as f, huggingface_hub
print(f._hf_hub_download_to_cache_dir.__code__.co_filename.rpartition('/')[2])
huggingface_hub.hf_hub_download("org/model", sys.argv[1])
"""


@pytest.mark.parametrize(
    ("value", "by"), [("1", "dropin.py"), ("org/a,org/model", "dropin.py"), ("0", "file_download.py")]
)
def test_the_environment_accelerates_a_program(python: Path, hub: Hub, value: str, by: str):
    assert run(python, LOAD, WEIGHTS, FASTLOAD_ACCELERATE=value) == f"{by}\n"
    ranged = [r for r in hub.requests if r.file == WEIGHTS and r.method == "GET" and r.range]
    assert bool(ranged) is (by == "dropin.py")


def test_the_environment_starts_a_transfer_that_a_plain_program_joins(python: Path, hub: Hub, model: Path):
    hub.script(BIG)
    process = subprocess.Popen(
        [python, "-c", "import sys; sys.stdin.readline()\n" + LOAD, WEIGHTS], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "FASTLOAD_START": "org/model"},
    )  # fmt: skip
    hub.wait(lambda requests: any(r.held and r.file == WEIGHTS for r in requests))  # it has not run a line yet
    hub.script()
    hub.release()
    out, err = process.communicate("go\n", timeout=60)
    assert (process.returncode, out, err) == (0, "dropin.py\n", "")
    assert hub.bytes_sent(WEIGHTS) == (model / WEIGHTS).stat().st_size


def test_the_processes_of_a_program_do_not_start_again(python: Path, hub: Hub):
    code = (
        "import subprocess, sys, os; from fastload import running\n"
        "print(len(running._started))\n"
        "if 'inner' not in sys.argv: print(subprocess.run([sys.executable, '-c', open(sys.argv[1]).read(), 'x', 'inner'],"
        " capture_output=True, text=True).stdout)\n"
        "for r in running._started.values(): r.wait()\n"
    )
    script = Path(os.environ["HF_HOME"]).parent / "code.py"
    script.write_text(code)
    assert run(python, code, str(script), FASTLOAD_START="org/model").split() == ["1", "0"]


def test_a_wrong_environment_does_not_break_a_program(python: Path):
    out = run(python, "print('ran')", FASTLOAD_START="not a model", FASTLOAD_CONNECTIONS="many")
    assert "ran\n" in out
    assert "FASTLOAD_START=" in out and "Traceback" not in out


def test_a_pid_that_is_another_users_counts_as_alive(monkeypatch: pytest.MonkeyPatch):
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert starting._is_started_above("1")
    assert not starting._is_started_above("none")
