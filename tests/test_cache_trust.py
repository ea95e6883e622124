"""What was hashed is trusted until it may have changed, and `fastload verify` trusts nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hubcache import (
    COMMIT,
    DIGESTS,
    FILES,
    REPO,
    WEIGHTS,
    fill,
    publish,
)

from fastload.cache import FileCheck, RepoCache, check_snapshot
from fastload.errors import NotFoundError


@pytest.fixture
def cache(tmp_path: Path) -> RepoCache:
    made = RepoCache(tmp_path / "home" / "hub", REPO)
    made.prepare()
    return made


# -- stamps -----------------------------------------------------------------------------------------------------------


def test_blob_is_trusted_once_it_is_stamped_until_it_changes(cache: RepoCache) -> None:
    pointer = publish(cache, "model.safetensors")
    blob = cache.blob_path(WEIGHTS)
    assert not cache.is_trusted(WEIGHTS, blob)
    cache.stamp(WEIGHTS, blob, synced=False)
    assert cache.is_trusted(WEIGHTS, blob) and cache.is_trusted(WEIGHTS, pointer)
    mtime_ns = blob.stat().st_mtime_ns
    os.utime(blob, ns=(mtime_ns, mtime_ns + 1))
    assert not cache.is_trusted(WEIGHTS, blob)
    os.truncate(blob, 7)
    os.utime(blob, ns=(mtime_ns, mtime_ns))
    assert not cache.is_trusted(WEIGHTS, blob)
    blob.unlink()
    assert not cache.is_trusted(WEIGHTS, blob)


def test_blob_in_the_layer_of_an_image_is_trusted(cache: RepoCache) -> None:
    """Layers keep whole seconds, and an image that hashed its weights at every start would start late."""
    publish(cache, "model.safetensors")
    blob = cache.blob_path(WEIGHTS)
    second_ns = 1_700_000_000 * 10**9
    os.utime(blob, ns=(second_ns, second_ns + 123_456_789))
    cache.stamp(WEIGHTS, blob, synced=True)
    os.utime(blob, ns=(second_ns, second_ns))
    assert cache.is_trusted(WEIGHTS, blob)
    for other_ns in (second_ns + 10**9, second_ns - 10**9, second_ns + 1):
        os.utime(blob, ns=(second_ns, other_ns))
        assert not cache.is_trusted(WEIGHTS, blob)


@pytest.mark.parametrize(("synced", "trusted"), [(True, True), (False, False)])
def test_after_a_restart_of_the_machine_only_synced_blobs_are_trusted(
    cache: RepoCache, synced: bool, trusted: bool
) -> None:
    publish(cache, "model.safetensors")
    blob = cache.blob_path(WEIGHTS)
    cache.sync(blob)
    cache.stamp(WEIGHTS, blob, synced=synced)
    stamp = cache.folder / ".fastload" / "verified" / WEIGHTS.value
    record = json.loads(stamp.read_text())
    assert record["boot_id"]
    stamp.write_text(json.dumps(record | {"boot_id": "that of another boot"}))
    assert cache.is_trusted(WEIGHTS, blob) is trusted


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"size": 1}', "\x00", "null"])
def test_damaged_stamp_is_as_good_as_none(cache: RepoCache, text: str) -> None:
    publish(cache, "model.safetensors")
    cache.stamp(WEIGHTS, cache.blob_path(WEIGHTS), synced=True)
    (cache.folder / ".fastload" / "verified" / WEIGHTS.value).write_text(text)
    assert not cache.is_trusted(WEIGHTS, cache.blob_path(WEIGHTS))


def test_stamp_that_cannot_be_written_is_no_error(cache: RepoCache) -> None:
    publish(cache, "model.safetensors")
    (cache.folder / ".fastload").write_text("in the way")
    cache.stamp(WEIGHTS, cache.blob_path(WEIGHTS), synced=True)
    assert not cache.is_trusted(WEIGHTS, cache.blob_path(WEIGHTS))


# -- verify -----------------------------------------------------------------------------------------------------------


def test_every_file_is_hashed_again_and_damage_is_named(cache: RepoCache) -> None:
    fill(cache)
    blob = cache.blob_path(WEIGHTS)
    cache.stamp(WEIGHTS, blob, synced=True)
    before = blob.stat()
    with open(blob, "r+b") as file:  # as a failing disk would: same size, same time
        file.write(b"\xff")
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    (cache.snapshot_path(COMMIT) / "empty.txt").unlink()
    (cache.snapshot_path(COMMIT) / "notes.txt").write_text("by the user")
    assert cache.is_trusted(WEIGHTS, blob)

    hashed: dict[str, int] = {}
    checks = check_snapshot(
        cache.root, REPO, "main", lambda path, added: hashed.__setitem__(path, hashed.get(path, 0) + added)
    )

    found = {check.path: check for check in checks}
    assert [c.path for c in checks] == sorted([*FILES, "notes.txt"])
    states = {path: check.state for path, check in found.items() if check.state != "ok"}
    assert states == {"empty.txt": "missing", "model.safetensors": "corrupt", "notes.txt": "unknown"}
    wrong = found["model.safetensors"]
    assert wrong.expected == str(WEIGHTS) and wrong.actual not in (None, str(WEIGHTS))
    config = str(DIGESTS["config.json"])
    assert found["config.json"] == FileCheck("config.json", config, config, "ok")
    assert hashed == {path: len(data) for path, data in FILES.items() if data}
    assert not cache.is_trusted(WEIGHTS, blob), "what verify found corrupt is fetched again by the next load"
    assert cache.is_trusted(DIGESTS["config.json"], cache.blob_path(DIGESTS["config.json"]))


def test_snapshot_without_a_listing_is_checked_by_the_names_of_its_blobs(cache: RepoCache) -> None:
    publish(cache, "config.json")
    (cache.snapshot_path(COMMIT) / "gone.safetensors").symlink_to(f"../../blobs/{WEIGHTS.value}")
    states = [(check.path, check.state) for check in check_snapshot(cache.root, REPO, COMMIT)]
    assert states == [("config.json", "ok"), ("gone.safetensors", "missing")]


@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
def test_verify_of_what_was_never_cached_is_told_apart_from_damage(cache: RepoCache, revision: str | None) -> None:
    with pytest.raises(NotFoundError, match=r"org/a\.model at .* is not in the cache"):
        check_snapshot(cache.root, REPO, revision)
