"""The cache on disk: blobs, snapshots, names, refs."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubcache import (
    COMMIT,
    DIGESTS,
    FILES,
    OTHER_COMMIT,
    REPO,
    WEIGHTS,
    Process,
    arrive,
    entries,
    manifest,
    publish,
)

from fastload.cache import RepoCache, check_path
from fastload.cache.disk import in_flight_link
from fastload.errors import CacheError, SourceError
from fastload.types import Digest, RemoteFile


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """Runs Python, and huggingface_hub, with the folder of *cache* as its cache and no hub to reach."""
    return Process(tmp_path / "home")


@pytest.fixture
def cache(tmp_path: Path) -> RepoCache:
    made = RepoCache(tmp_path / "home" / "hub", REPO)
    made.prepare()
    return made


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o027)
    yield
    os.umask(old)


# -- blobs and snapshots ----------------------------------------------------------------------------------------------


def test_file_of_another_commit_is_found_and_linked(cache: RepoCache) -> None:
    publish(cache, "model.safetensors")
    file = RemoteFile("model.safetensors", len(FILES["model.safetensors"]), WEIGHTS)
    assert cache.find(OTHER_COMMIT, file) == cache.blob_path(WEIGHTS)
    for _ in range(2):
        pointer = cache.link(OTHER_COMMIT, "model.safetensors", WEIGHTS)
        assert cache.find(OTHER_COMMIT, file) == pointer
        assert os.readlink(pointer) == f"../../blobs/{WEIGHTS.value}"


def test_file_of_another_size_is_not_found(cache: RepoCache) -> None:
    publish(cache, "model.safetensors")
    assert cache.find(COMMIT, RemoteFile("model.safetensors", 1, WEIGHTS)) is None
    cache.blob_path(WEIGHTS).unlink()
    assert cache.find(COMMIT, RemoteFile("model.safetensors", len(FILES["model.safetensors"]), WEIGHTS)) is None


def test_file_in_flight_is_not_found(cache: RepoCache) -> None:
    publish(cache, "model.safetensors")
    file = RemoteFile("model.safetensors", len(FILES["model.safetensors"]), WEIGHTS)
    pointer = cache.link(COMMIT, "model.safetensors", WEIGHTS)
    with open(cache.blob_path(WEIGHTS), "rb") as arriving:  # of the right size, as partial files are from the start
        cache.blob_path(WEIGHTS).unlink()
        pointer.unlink()
        pointer.symlink_to(in_flight_link(arriving.fileno()))
        assert os.stat(pointer).st_size == file.size
        assert cache.find(COMMIT, file) is None


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no symlinks"])
def test_one_file_at_two_paths_of_one_commit_is_shown_at_both(cache: RepoCache, symlinks: bool) -> None:
    cache.symlinks = symlinks
    arrive(cache, WEIGHTS, FILES["model.safetensors"])
    pointers = cache.publish(WEIGHTS, COMMIT, ["a/model.safetensors", "b.safetensors"])
    assert [p.relative_to(cache.snapshot_path(COMMIT)).as_posix() for p in pointers.values()] == list(pointers)
    assert [p.read_bytes() for p in pointers.values()] == [FILES["model.safetensors"]] * 2
    assert [p.is_symlink() for p in pointers.values()] == [symlinks] * 2
    assert len(list(cache.folder.glob("blobs/*"))) == (1 if symlinks else 0)
    cache.stamp(WEIGHTS, pointers["b.safetensors"], synced=False)
    assert cache.is_trusted(WEIGHTS, pointers["a/model.safetensors"])


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no symlinks"])
def test_blob_that_somebody_else_published_meanwhile_stays_one_blob(cache: RepoCache, symlinks: bool) -> None:
    publish(cache, "model.safetensors", OTHER_COMMIT)
    cache.blob_path(WEIGHTS).write_bytes(b"damaged: the reason for fetching it again")
    cache.symlinks = symlinks
    pointer = publish(cache, "model.safetensors")
    assert [p.name for p in cache.folder.glob("blobs/*")] == [WEIGHTS.value]
    assert pointer.read_bytes() == FILES["model.safetensors"]
    assert pointer.is_symlink() is symlinks
    assert (cache.snapshot_path(OTHER_COMMIT) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize("before", ["file", "wrong link", "dangling link", "right link"])
@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no symlinks"])
def test_publish_replaces_whatever_the_snapshot_showed(cache: RepoCache, before: str, symlinks: bool) -> None:
    pointer = cache.snapshot_path(COMMIT) / "model.safetensors"
    pointer.parent.mkdir()
    if before == "file":
        pointer.write_bytes(b"wrong")
    else:
        publish(cache, "config.json", OTHER_COMMIT)
        name = {"wrong link": DIGESTS["config.json"].value, "right link": WEIGHTS.value}.get(before, "gone")
        pointer.symlink_to(f"../../blobs/{name}")
    cache.symlinks = symlinks
    publish(cache, "model.safetensors")
    assert pointer.read_bytes() == FILES["model.safetensors"]
    assert pointer.is_symlink() is symlinks
    assert not list(cache.folder.glob("blobs/*.incomplete"))


def test_without_symlinks_a_blob_is_copied_over_what_is_wrong_and_a_link_to_it_is_left(cache: RepoCache) -> None:
    pointer = publish(cache, "model.safetensors", OTHER_COMMIT)
    cache.symlinks = False
    assert cache.link(OTHER_COMMIT, "model.safetensors", WEIGHTS).is_symlink()
    wrong = cache.snapshot_path(COMMIT) / "model.safetensors"
    wrong.parent.mkdir()
    wrong.write_bytes(b"wrong")
    assert cache.link(COMMIT, "model.safetensors", WEIGHTS) == wrong
    assert not wrong.is_symlink()
    assert wrong.read_bytes() == pointer.read_bytes() == FILES["model.safetensors"]


def test_mount_without_modes_is_still_a_cache(cache: RepoCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as chmod(2) on some FUSE mounts

    monkeypatch.setattr(os, "chmod", refuse)
    assert publish(cache, "config.json").read_bytes() == FILES["config.json"]


def test_filesystem_without_symlinks_gets_the_files_themselves(
    cache: RepoCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as symlink(2) on vfat

    monkeypatch.setattr(os, "symlink", refuse)
    for path in ("model.safetensors", "config.json"):
        pointer = publish(cache, path)
        assert not pointer.is_symlink() and pointer.read_bytes() == FILES[path]
    assert len(caplog.records) == 1
    assert not list(cache.folder.glob("blobs/*"))


def test_partial_file_becomes_readable_as_the_umask_says(umask: None, cache: RepoCache) -> None:
    fd = os.open(cache.partial_path(WEIGHTS), os.O_CREAT | os.O_WRONLY, 0o600)
    os.close(fd)
    cache.publish(WEIGHTS, COMMIT, ["model.safetensors"])
    assert stat.S_IMODE(cache.blob_path(WEIGHTS).stat().st_mode) == 0o640


def test_discard_removes_partial_file_and_journal_and_nothing_else(cache: RepoCache) -> None:
    publish(cache, "model.safetensors")
    arrive(cache, WEIGHTS, b"part")
    cache.journal_path(WEIGHTS).write_bytes(b"journal")
    for _ in range(2):
        cache.discard(WEIGHTS)
        assert [p.name for p in cache.folder.glob("blobs/*")] == [WEIGHTS.value]


def test_blob_in_the_store_that_repositories_share_is_found_and_never_written(cache: RepoCache) -> None:
    payload = cache.root / "blobs" / "ab" / ("ab" * 32)
    payload.parent.mkdir(parents=True)
    payload.write_bytes(FILES["model.safetensors"])
    blob = cache.blob_path(WEIGHTS)
    blob.symlink_to(f"../../blobs/ab/{payload.name}")
    assert cache.find(COMMIT, RemoteFile("model.safetensors", payload.stat().st_size, WEIGHTS)) == blob
    pointer = cache.link(COMMIT, "model.safetensors", WEIGHTS)
    assert os.readlink(pointer) == f"../../blobs/{WEIGHTS.value}"
    payload.write_bytes(b"damaged")
    publish(cache, "model.safetensors")
    assert pointer.read_bytes() == FILES["model.safetensors"]
    assert not blob.is_symlink() and payload.read_bytes() == b"damaged"


# -- names ------------------------------------------------------------------------------------------------------------

BAD_PATHS = [
    "", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "a//b", "a/", "./a", "C:x", "C:/x", "a/D:x",
    "\\\\host\\x", "a\\..\\x", "a\\b", "nul\0byte", "new\nline", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=ascii)
def test_path_that_could_leave_the_cache_is_refused_before_anything_is_written(cache: RepoCache, path: str) -> None:
    arrive(cache, WEIGHTS, b"verified")
    before = entries(cache.root)
    with pytest.raises(SourceError):
        check_path(path)
    with pytest.raises(SourceError):
        cache.publish(WEIGHTS, COMMIT, ["fine.safetensors", path])
    with pytest.raises(SourceError):
        cache.link(COMMIT, path, WEIGHTS)
    with pytest.raises(SourceError):
        asyncio.run(cache.write_no_exist(COMMIT, [path]))
    with pytest.raises(SourceError):
        cache.known_missing(COMMIT, path)
    with pytest.raises(SourceError):
        cache.find(COMMIT, RemoteFile(path, 1, None))
    with pytest.raises(SourceError):
        asyncio.run(cache.write_ref(path, COMMIT))
    with pytest.raises(SourceError):
        cache.publish(WEIGHTS, path, ["fine.safetensors"])
    with pytest.raises(SourceError):
        RepoCache(cache.root, path)
    assert entries(cache.root) == before


def test_every_path_that_huggingface_hub_refuses_is_refused(process: Process) -> None:
    tried = [*BAD_PATHS, *FILES, "a:", "a/1:b", "//x/y", "x/\\\\y/z/w", "x/\\y", "...", "a..b", "a/..b", "~/x", "CON"]
    refused = process.run(
        f"""
import json
from huggingface_hub._local_folder import _validate_relative_filename as validate
def refused(path):
    try: validate(path)
    except ValueError: return True
print(json.dumps([path for path in {tried!r} if refused(path)]))"""
    )
    assert len(refused) > 8
    for path in refused:
        with pytest.raises(SourceError):
            check_path(path)
    for path in FILES:
        check_path(path)


def test_folder_of_another_repository_cannot_be_named(tmp_path: Path) -> None:
    assert RepoCache(tmp_path, "gpt2").folder.name == "models--gpt2"
    with pytest.raises(SourceError):
        RepoCache(tmp_path, "org--a.model")
    with pytest.raises(SourceError):
        RepoCache(tmp_path, REPO).blob_path(Digest("sha256", "../../x"))


# -- refs and absences ------------------------------------------------------------------------------------------------


async def test_coroutines_leave_the_event_loop_free(cache: RepoCache) -> None:
    await cache.write_ref("main", COMMIT)
    await cache.write_ref("main", COMMIT)
    await cache.write_no_exist(COMMIT, ["a/b.json"])
    (cache.folder / "refs" / "folder").mkdir()
    with pytest.raises(CacheError):
        await cache.write_ref("folder", COMMIT)
    assert sorted(path.name for path in cache.folder.glob("refs/*")) == ["folder", "main"]


def test_ref_is_written_when_it_changed_and_only_then(cache: RepoCache) -> None:
    assert cache.read_ref(None) is None
    asyncio.run(cache.write_ref("main", OTHER_COMMIT))
    asyncio.run(cache.write_ref("main", COMMIT))
    ref = cache.folder / "refs" / "main"
    assert ref.read_bytes() == COMMIT.encode()
    before = ref.stat().st_ino
    asyncio.run(cache.write_ref("main", COMMIT))
    assert ref.stat().st_ino == before
    assert cache.read_ref("main") == cache.read_ref(None) == cache.read_ref(COMMIT) == COMMIT
    asyncio.run(cache.write_ref(COMMIT, COMMIT))
    assert [p.name for p in ref.parent.iterdir()] == ["main"]


def test_absence_is_remembered_for_one_commit(cache: RepoCache) -> None:
    asyncio.run(cache.write_no_exist(COMMIT, ["a/b.json"]))
    assert cache.known_missing(COMMIT, "a/b.json")
    assert not cache.known_missing(COMMIT, "a")
    assert not cache.known_missing(OTHER_COMMIT, "a/b.json")


# -- cost -------------------------------------------------------------------------------------------------------------


def test_importing_and_using_the_cache_does_not_import_huggingface_hub(process: Process, cache: RepoCache) -> None:
    cache.write_tree(manifest())
    publish(cache, "config.json")
    imported = process.run(
        f"""
import json, sys
from pathlib import Path
from fastload.cache import RepoCache, check_snapshot
from fastload.types import Digest
cache = RepoCache(Path({str(cache.root)!r}), {REPO!r})
cache.prepare()
assert cache.read_tree({REPO!r}, {COMMIT!r}, "main", "")
check_snapshot(cache.root, {REPO!r}, {COMMIT!r})
print(json.dumps(sorted({{"huggingface_hub", "aiofiles", "asyncio", "httpx", "httpx2", "torch"}} & sys.modules.keys())))
"""
    )
    assert imported == []
