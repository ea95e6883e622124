"""Without a network, without space, without the right to write, and with little memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from programs import ENVIRON, ROOT, children, run, until
from transfers import LARGE, MODEL, RANGE, SMALL, expected_bytes, fetch, noise, tensor_bytes, write_weights

import fastload
from fastload.errors import NotFoundError, OfflineError, SourceError
from fastload.lock import Lock
from fastload.testing import Fault, Hub
from fastload.types import Digest, Manifest, RemoteFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("loader-cache")
    write_weights(made / LARGE)
    (made / "config.json").write_text("{}")
    return made


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = make_hub({"org/m": folder})
    for name, value in {**ENVIRON, "HF_ENDPOINT": made.endpoint}.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


# -- offline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "FASTLOAD_OFFLINE"])
def test_offline_a_complete_cache_is_enough(name: str, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    fastload.prefetch("org/m")
    hub.clear()
    monkeypatch.setenv(name, "1")
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected_bytes(folder / LARGE)
    assert not hub.requests


def test_offline_what_is_missing_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    fastload.prefetch("org/m", files="config.json")
    hub.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fastload.prefetch("org/m", files="config.json").files == ("config.json",)
    with pytest.raises(OfflineError, match=r"1 of 2 files are not in the cache \(model.safetensors\)"):
        fastload.load_tensors("org/m")
    with pytest.raises(OfflineError, match="org/other at main is not in the cache"):
        fastload.prefetch("org/other")
    with pytest.raises(OfflineError, match="org/m at v2 is not in the cache"):
        fastload.prefetch("org/m@v2")
    assert not hub.requests


def test_offline_a_damaged_file_is_an_error_and_stays_where_it_is(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    snapshot = fastload.prefetch("org/m").path
    with open(snapshot / LARGE, "r+b") as f:
        f.seek(RANGE)
        f.write(b"damage")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(fastload.errors.IntegrityError, match="the cache"):
        fastload.load_tensors("org/m")
    assert (snapshot / LARGE).exists()


def test_a_hub_that_is_gone_is_replaced_by_the_cache(hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture):
    fastload.prefetch("org/m")
    hub.close()
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected_bytes(folder / LARGE)
    assert "the hub is out of reach, using the cache" in caplog.text


def test_what_huggingface_hub_wrote_is_used_offline(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    run("import huggingface_hub as hf; hf.snapshot_download('org/m')")
    hub.clear()
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected_bytes(folder / LARGE)
    assert hub.bytes_sent(LARGE) == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected_bytes(folder / LARGE)


# -- a cache that cannot be written ----------------------------------------------------------------------------------

#: Root may write everywhere, so that a read-only mount, seen by this process alone, has to do.
READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
shift
exec "$@"
"""


def unshared(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--mount", "--map-root-user", "bash", "-c", script, "bash", *arguments]
    search = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", ROOT / "tests")))
    return subprocess.run(
        command, text=True, capture_output=True, timeout=90, env={**os.environ, "PYTHONPATH": search}, check=False
    )


@pytest.fixture(scope="module")
def mounts() -> None:
    try:
        able = unshared("mount -t tmpfs none /mnt").returncode == 0
    except OSError:
        able = False
    if not able:
        pytest.skip("no mounts of one's own here")


def python(code: str) -> list[str]:
    import sys

    return [sys.executable, "-P", "-c", code]


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("call", ["prefetch", "load_tensors"])
def test_a_read_only_cache_that_holds_everything_will_do(call: str, hub: Hub, cache: Path):
    fastload.prefetch("org/m")
    hub.clear()
    result = unshared(READ_ONLY, str(cache), *python(f"import fastload; fastload.{call}('org/m'); print('done')"))
    assert (result.stdout, result.stderr) == ("done\n", "")
    assert hub.bytes_sent() == 0


@pytest.mark.usefixtures("mounts")
def test_a_read_only_cache_that_lacks_a_file_is_an_error(hub: Hub, cache: Path):
    fastload.prefetch("org/m", files="config.json")
    code = "import fastload; fastload.prefetch('org/m')"
    result = unshared(READ_ONLY, str(cache), *python(code))
    assert "CacheError" in result.stderr and "Read-only" in result.stderr and "HF_HUB_CACHE" in result.stderr


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("call", ["load_tensors", "stream"])
def test_a_load_needs_no_writable_cache(call: str, hub: Hub, cache: Path, tmp_path: Path):
    """It goes through a temporary folder, says so, and leaves nothing there."""
    cache.mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    body = "print(len(fastload.load_tensors('org/m')))"
    if call == "stream":
        body = "\nwith fastload.stream('org/m') as weights: print(len(dict(iter(weights))))"
    result = unshared(
        READ_ONLY, str(cache), "env", f"TMPDIR={tmp_path / 'temporary'}", *python(f"import fastload; {body}")
    )
    assert result.stdout == "12\n", result.stderr
    assert "Read-only" in result.stderr and "the next one fetches everything again" in result.stderr
    assert list((tmp_path / "temporary").iterdir()) == []


# -- no space left ---------------------------------------------------------------------------------------------------

FULL = """
set -e
mkdir -p "$1"
mount -t tmpfs -o size=$2 none "$1"
shift 2
exec "$@"
"""

FILLS_UP = """
import os, sys, fastload
from pathlib import Path
from programs import landed_bytes, journal_of
cache = Path(os.environ["HF_HOME"]) / "hub"
ballast = cache / "ballast"
ballast.write_bytes(bytes(int(sys.argv[1])))
try:
    fastload.prefetch("org/m")
except fastload.errors.CacheError as e:
    print("full", "space" in str(e), "kept" in str(e))
print(landed_bytes(cache))
assert not list(cache.glob("models--*/snapshots/*/model.safetensors"))
ballast.unlink()
print(len(fastload.load_tensors("org/m")), journal_of(cache))
"""


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("free_kib", [704, 300, 40])
def test_a_full_disk_is_an_error_and_what_landed_is_used_once_there_is_space(free_kib: int, hub: Hub, cache: Path):
    size_kib = 3072
    used = (size_kib - free_kib) << 10
    result = unshared(FULL, str(cache), f"{size_kib}k", *python(FILLS_UP), str(used))
    assert result.returncode == 0, result.stderr
    full, landed, end = result.stdout.splitlines()
    assert full.startswith("full True")
    assert end == "12 None"
    sent, size = hub.bytes_sent(LARGE), (hub.manifest("org/m").get(LARGE) or RemoteFile("", 0, None)).size
    assert sent <= size + 9 * RANGE if int(landed) else sent >= size
    assert int(landed) > 0 or free_kib < 200


MARKS = """
import os, sys
from fastload.journal import BLOCK_BYTES, Journal
from fastload.types import ByteRange
size = 50_000 * BLOCK_BYTES
folder = os.environ["HF_HOME"] + "/hub"
journal = Journal.create(os.open(folder + "/journal", os.O_RDWR | os.O_CREAT), size=size, digest="")
try:
    with open(folder + "/ballast", "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
except OSError:
    pass
journal.mark(ByteRange(0, size))
print(journal.missing())
"""


@pytest.mark.usefixtures("mounts")
def test_a_full_disk_does_not_kill_who_notes_what_has_landed(cache: Path):
    # A page of a mapped file that finds no room is a SIGBUS.
    result = unshared(FULL, str(cache), "512k", *python(MARKS))
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


# -- a lock ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lock(hub: Hub, tmp_path: Path) -> Path:
    Lock(()).with_manifest(hub.manifest("org/m")).write(tmp_path / "fastload.lock")
    return tmp_path / "fastload.lock"


def test_a_locked_load_makes_no_metadata_request(hub: Hub, folder: Path, lock: Path):
    assert tensor_bytes(fastload.load_tensors("org/m", lock=lock)) == expected_bytes(folder / LARGE)
    assert not [r for r in hub.requests if r.path.startswith("/api/")]


def test_a_locked_load_gets_what_was_locked_though_main_moved_on(hub: Hub, folder: Path, lock: Path, tmp_path: Path):
    hub.update("org/m", {LARGE: write_weights(tmp_path / LARGE, seed=9).read_bytes()})
    assert tensor_bytes(fastload.load_tensors("org/m", lock=lock)) == expected_bytes(folder / LARGE)


def test_a_locked_load_accepts_nothing_else(hub: Hub, lock: Path):
    hub.script(Fault("flip", path=LARGE, offset=5000))
    with pytest.raises(fastload.errors.IntegrityError):
        fastload.load_tensors("org/m", lock=lock)
    with pytest.raises(NotFoundError, match="the lock holds no org/other"):
        fastload.load_tensors("org/other", lock=lock)
    with pytest.raises(NotFoundError, match="the lock holds no org/m at v2"):
        fastload.load_tensors("org/m@v2", lock=lock)


def test_a_locked_load_works_offline(hub: Hub, folder: Path, lock: Path, monkeypatch: pytest.MonkeyPatch):
    fastload.prefetch("org/m", lock=lock)
    hub.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert tensor_bytes(fastload.load_tensors("org/m", lock=lock)) == expected_bytes(folder / LARGE)


# -- folders, and paths that are none --------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_it_is(folder: Path, tmp_path: Path):
    assert tensor_bytes(fastload.load_tensors(folder)) == expected_bytes(folder / LARGE)
    assert fastload.prefetch(folder).path == folder
    assert not (tmp_path / "hf").exists()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob("*")}


BAD_PATHS = ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "", "a//b", "./a", "a/./b", "C:/evil", "a\0b", ".."]


@pytest.mark.parametrize("path", BAD_PATHS)
async def test_a_path_that_leaves_the_snapshot_is_refused_before_anything_is_written(path: str, tmp_path: Path):
    data = noise(10)
    import hashlib

    digest = Digest("sha256", hashlib.sha256(data).hexdigest())
    locked = Manifest("org/m", "main", "c" * 40, "http://127.0.0.1:9", (RemoteFile(path, 10, digest, "/x"),))
    outcome = await fetch(tmp_path / "cache", "http://127.0.0.1:9", request={"locked": locked})
    assert isinstance(outcome.error, SourceError), outcome.error
    assert not (tmp_path / "cache").exists()
    assert names(tmp_path) <= {"hf"}


@pytest.mark.parametrize("commit", ["../../evil", "", "a/b/../..", "main"])
async def test_a_commit_that_is_none_is_refused(commit: str, make_hub: Callable[..., Hub], tmp_path: Path):
    hub = make_hub({"org/m": MODEL})
    locked = replace(hub.manifest("org/m"), commit=commit)
    outcome = await fetch(tmp_path / "cache", hub.endpoint, request={"locked": locked})
    if commit != "main":
        assert isinstance(outcome.error, SourceError), outcome.error
        assert not names(tmp_path) & {"evil"}


async def test_a_file_that_nobody_can_verify_is_refused(make_hub: Callable[..., Hub], tmp_path: Path):
    hub = make_hub({"org/m": MODEL})
    manifest = hub.manifest("org/m")
    files = tuple(replace(f, digest=None) if f.path == SMALL else f for f in manifest.files)
    outcome = await fetch(tmp_path, hub.endpoint, request={"locked": replace(manifest, files=files)})
    assert isinstance(outcome.error, SourceError)
    assert SMALL in str(outcome.error) and "digest" in str(outcome.error)


# -- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import fastload, sys
from programs import children
import os, threading
peak = [0, 0]
running = fastload.start("org/big", settings={"ring_bytes": int(sys.argv[1]), "range_bytes": 1 << 18})
pid = running._carrier.pid
first = None
while not running.done:
    running._carrier._thread.join(0.01)
    if running.failed:
        running.wait()
    try:
        text = open(f"/proc/{pid}/status").read()
    except OSError:
        break
    rss = [int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")]
    if rss:
        if first is None and running.transfer.snapshot is not None:
            first = rss[0]
        peak[0] = max(peak[0], rss[0])
print(peak[0], first)
"""


@pytest.mark.parametrize("framing", [None, "no_range"])
def test_memory_is_bounded_by_the_ring_whatever_the_size(
    framing: str | None, make_hub: Callable[..., Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    size = 64 << 20
    (tmp_path / "big").mkdir()
    with open(tmp_path / "big" / LARGE, "wb") as f:
        for n in range(64):
            f.write(noise(1 << 20, n))
    hub = make_hub({"org/big": tmp_path / "big"}, faults=[Fault(framing)] if framing else ())  # type: ignore[arg-type]
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    peaks = {}
    for ring in (1 << 20, 8 << 20):
        monkeypatch.setenv("HF_HOME", str(tmp_path / f"hf{ring}"))
        peak_kib, _ = run(PEAK, str(ring)).split()
        peaks[ring] = int(peak_kib) << 10
    assert hub.bytes_sent(LARGE) >= 2 * size
    assert peaks[1 << 20] < 80 << 20  # interpreter and libraries, nothing of the file
    assert peaks[8 << 20] - peaks[1 << 20] < 12 << 20


@pytest.fixture(autouse=True)
def nothing_started_is_left() -> Iterator[None]:
    yield
    until(lambda: not children(os.getpid()), "a process is left")
