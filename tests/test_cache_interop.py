"""The cache on disk is the one that huggingface_hub makes and reads; the real one does both here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubcache import (
    COMMIT,
    DIGESTS,
    FILES,
    FILL,
    HF,
    LISTED,
    OTHER_COMMIT,
    REPO,
    WEIGHTS,
    Process,
    arrive,
    entries,
    fill,
    manifest,
    publish,
)

from fastload.cache import RepoCache
from fastload.journal import Journal
from fastload.testing import Hub
from fastload.types import Digest, Manifest, RemoteFile


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    # huggingface_hub 1 takes a CDN on another port of the same host for the hub itself.
    with Hub({REPO: FILES}, revisions={REPO: {"refs/pr/1": FILES}}, redirect=False) as hub:
        yield hub.endpoint


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


# -- what huggingface_hub makes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no symlinks"])
def test_published_tree_is_the_one_that_huggingface_hub_makes(
    tmp_path: Path, endpoint: str, umask: None, symlinks: bool
) -> None:
    env = {} if symlinks else {"HF_HUB_DISABLE_SYMLINKS": "1"}
    Process(tmp_path / "theirs", endpoint).run(HF + FILL, **env)
    fill(RepoCache(tmp_path / "ours" / "hub", REPO, symlinks=symlinks))
    theirs, ours = entries(tmp_path / "theirs" / "hub"), entries(tmp_path / "ours" / "hub")
    assert theirs == ours
    folder = "models--org--a.model"
    kind, mode, holds = ours[f"{folder}/snapshots/{COMMIT}/unet/deep/er/model.safetensors"]
    if symlinks:
        digest = DIGESTS["unet/deep/er/model.safetensors"].value
        assert (kind, holds) == ("l", f"../../../../../blobs/{digest}")
        assert ours[f"{folder}/blobs/{digest}"][1] == 0o640
    else:
        assert (kind, mode, holds) == ("-", 0o640, FILES["unet/deep/er/model.safetensors"])
        assert not [name for name in ours if name.startswith(f"{folder}/blobs/")]


def test_cachedir_tag_has_the_signature_that_backup_tools_look_for(cache: RepoCache) -> None:
    text = (cache.root / "CACHEDIR.TAG").read_bytes()
    assert text.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")


# -- huggingface_hub reads what we wrote ------------------------------------------------------------------------------


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no symlinks"])
def test_huggingface_hub_finds_offline_what_was_published(cache: RepoCache, process: Process, symlinks: bool) -> None:
    cache.symlinks = symlinks
    fill(cache)
    found = process.run(
        HF
        + f"""
folder = hf.snapshot_download({REPO!r}, local_files_only=True)
paths = {list(FILES)!r}
print(json.dumps({{
    "folder": folder,
    "files": {{p: open(hf.hf_hub_download({REPO!r}, p, local_files_only=True), "rb").read().hex() for p in paths}},
    "revision": hf.hf_hub_download({REPO!r}, "config.json", revision="refs/pr/1", local_files_only=True),
    "tree": sorted(f.path for f in hf.get_cached_repo_tree({REPO!r})),
    "no_exist": hf.try_to_load_from_cache({REPO!r}, "generation config.json") is hf._CACHED_NO_EXIST,
}}))""",
        HF_HUB_OFFLINE="1",
    )
    assert found["folder"] == str(cache.snapshot_path(COMMIT))
    assert {path: bytes.fromhex(text) for path, text in found["files"].items()} == FILES
    assert found["revision"] == str(cache.snapshot_path(COMMIT) / "config.json")
    assert found["tree"] == sorted(FILES)
    assert found["no_exist"] is True


def test_snapshot_of_ours_with_a_file_missing_is_called_incomplete(cache: RepoCache, process: Process) -> None:
    fill(cache)
    (cache.snapshot_path(COMMIT) / "unet/deep/er/model.safetensors").unlink()
    message = process.run(
        HF
        + f"""
try: hf.snapshot_download({REPO!r}, local_files_only=True)
except hf.errors.IncompleteSnapshotError as e: print(json.dumps(str(e)))"""
    )
    assert "unet/deep/er/model.safetensors" in message


def test_what_is_ours_alone_is_no_damage_to_scan_cache_dir(cache: RepoCache, process: Process) -> None:
    fill(cache)
    cache.stamp(WEIGHTS, cache.blob_path(WEIGHTS), synced=True)
    arriving = Digest("sha256", "ab" * 32)
    arrive(cache, arriving, b"part")
    fd = os.open(cache.journal_path(arriving), os.O_RDWR | os.O_CREAT)
    Journal.create(fd, size=4096, digest=str(arriving)).close()
    scanned = process.run(
        HF
        + """
found = hf.scan_cache_dir()
print(json.dumps({
    "warnings": [str(w) for w in found.warnings],
    "files": sorted(f.file_path.relative_to(r.snapshot_path).as_posix()
                    for repo in found.repos for r in repo.revisions for f in r.files),
    "refs": sorted(ref for repo in found.repos for r in repo.revisions for ref in r.refs),
    "incomplete": [f.file_path.name for f in found.incomplete_files]}))"""
    )
    assert scanned == {
        "warnings": [],
        "files": sorted(FILES),
        "refs": ["main", "refs/pr/1"],
        "incomplete": [cache.partial_path(arriving).name],
    }


def test_a_cache_with_nothing_but_a_partial_file_is_no_damage(cache: RepoCache, process: Process) -> None:
    arrive(cache, WEIGHTS, b"part")
    assert process.run(HF + "print(json.dumps([str(w) for w in hf.scan_cache_dir().warnings]))") == []


def test_huggingface_hub_downloads_nothing_that_is_there(cache: RepoCache, process: Process) -> None:
    fill(cache)
    with Hub({REPO: FILES}) as hub:
        process.run(HF + f"hf.snapshot_download({REPO!r}); print('null')", HF_ENDPOINT=hub.endpoint)
        assert [request.path for request in hub.requests] == [f"/api/models/{REPO}/revision/main"]


# -- we read what huggingface_hub wrote -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tree", [True, False], ids=["tree listing", "links only"])
def test_manifest_for_offline_use_has_exact_sizes_and_digests(
    cache: RepoCache, process: Process, endpoint: str, with_tree: bool
) -> None:
    process.run(HF + f"hf.snapshot_download({REPO!r}); print('null')", HF_ENDPOINT=endpoint)
    if not with_tree:
        (cache.folder / "trees" / f"{COMMIT}.json").unlink()
    commit = cache.read_ref(None)
    assert commit == COMMIT
    found = cache.read_tree(REPO, commit, "main", endpoint)
    assert found is not None
    assert (found.source, found.revision, found.commit, found.endpoint) == (REPO, "main", COMMIT, endpoint)
    assert {f.path: (f.size, f.digest) for f in found.files} == {
        path: (len(data), DIGESTS[path]) for path, data in FILES.items()
    }
    awful = found.get("awful/100 % #1 & ü?.json")
    assert awful is not None
    assert awful.url_path == f"/{REPO}/resolve/{COMMIT}/awful/100%20%25%20%231%20%26%20%C3%BC%3F.json"
    for file in found.files:
        place = cache.find(commit, file)
        assert place is not None and place.read_bytes() == FILES[file.path]
        assert file.digest is not None and not cache.is_trusted(file.digest, place)


def test_real_files_without_a_listing_make_no_manifest(cache: RepoCache) -> None:
    publish(cache, "config.json")
    assert cache.read_tree(REPO, COMMIT, "main", "http://x") is not None
    (cache.snapshot_path(COMMIT) / "notes.txt").write_text("by the user")
    assert cache.read_tree(REPO, COMMIT, "main", "http://x") is None
    assert cache.read_tree(REPO, OTHER_COMMIT, "main", "http://x") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format_version": 2, "files": {}}',
        '{"format_version": 1}',
        '{"format_version": 1, "files": {"a": {"size": 1}}}',
        '{"format_version": 1, "files": {"a": {"size": "1", "blob_id": "' + "0" * 40 + '"}}}',
        '{"format_version": 1, "files": {"a": {"size": 1, "blob_id": "no digest"}}}',
    ],
)
def test_damaged_listing_is_as_good_as_none(cache: RepoCache, text: str) -> None:
    tree = cache.folder / "trees" / f"{COMMIT}.json"
    tree.parent.mkdir()
    tree.write_text(text)
    assert cache.read_tree(REPO, COMMIT, "main", "http://x") is None
    cache.write_tree(manifest())
    assert cache.read_tree(REPO, COMMIT, "main", "http://x") == _placed(manifest(), "http://x")


def _placed(listed: Manifest, endpoint: str) -> Manifest:
    from urllib.parse import quote

    files = [
        RemoteFile(f.path, f.size, f.digest, f"/{REPO}/resolve/{COMMIT}/{quote(f.path)}")
        for f in sorted(listed.files, key=lambda f: f.path)
    ]
    return Manifest(REPO, "main", COMMIT, endpoint, tuple(files))


def test_listing_that_is_there_stays(cache: RepoCache) -> None:
    cache.write_tree(manifest())
    tree = cache.folder / "trees" / f"{COMMIT}.json"
    record = json.loads(tree.read_text())
    record["files"]["model.safetensors"]["xet_hash"] = "ef" * 32  # which no manifest of ours knows
    tree.write_text(json.dumps(record))
    cache.write_tree(manifest())
    assert json.loads(tree.read_text()) == record


def test_git_names_that_the_source_did_not_tell_are_those_of_lfs_pointers(tmp_path: Path) -> None:
    told, untold = RepoCache(tmp_path / "told", REPO), RepoCache(tmp_path / "untold", REPO)
    told.write_tree(manifest(blob_ids=True))
    untold.write_tree(manifest(blob_ids=False))
    texts = [(c.folder / "trees" / f"{COMMIT}.json").read_text() for c in (told, untold)]
    assert texts[0] == texts[1]
    record = json.loads(texts[0])["files"]["model.safetensors"]
    assert record["blob_id"] == LISTED.files["model.safetensors"].blob_id


def test_listing_without_all_digests_is_not_kept(cache: RepoCache) -> None:
    files = (*manifest().files, RemoteFile("unknown.bin", 3, None))
    cache.write_tree(Manifest(REPO, "main", COMMIT, "http://x", files))
    cache.write_tree(Manifest(REPO, "main", "not-a-commit", "http://x", manifest().files))
    assert not (cache.folder / "trees").exists()
