"""The embedded hub speaks the Hub's protocol, as the real client understands it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download

from fastload.testing import Hub
from fastload.types import Digest

MakeHub = Callable[..., Hub]
FILES = {"config.json": b"{}", "folder/a b%#&ü.txt": b"awful name", "empty.txt": b"", "w.safetensors": bytes(1000)}


def test_client_gets_sizes_and_digests_that_match_the_manifest(hub: Hub) -> None:
    info = HfApi(endpoint=hub.endpoint).model_info("org/tiny", files_metadata=True)
    assert info.sha == hub.commit("org/tiny")
    manifest = hub.manifest("org/tiny")
    assert len(info.siblings) == len(manifest.files) == 5
    for sibling, file in zip(info.siblings, manifest.files, strict=True):
        digest = Digest("sha256", sibling.lfs.sha256) if sibling.lfs else Digest("git-sha1", sibling.blob_id)
        assert (sibling.rfilename, sibling.size, digest) == (file.path, file.size, file.digest)


def test_client_downloads_a_snapshot_that_it_finds_complete_and_clean(
    hub: Hub, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(snapshot_download("org/tiny", endpoint=hub.endpoint, cache_dir=tmp_path))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    hub.clear()
    again = snapshot_download("org/tiny", endpoint=hub.endpoint, cache_dir=tmp_path, local_files_only=True)
    assert again == str(folder)
    assert hub.requests == []
    report = HfApi(endpoint=hub.endpoint).verify_repo_checksums("org/tiny", cache_dir=tmp_path)
    assert (report.checked_count, report.mismatches, report.missing_paths, report.extra_paths) == (5, [], [], [])


def test_client_lists_1500_files_over_two_pages(make_hub: MakeHub) -> None:
    files = {f"folder{n % 3}/{n:04}.txt": b"%d" % n for n in range(1500)}
    hub = make_hub({"org/many": files})
    listed = list(HfApi(endpoint=hub.endpoint).list_repo_tree("org/many", recursive=True))
    sizes = {f.path: f.size for f in listed if f.path in files}
    assert sizes == {path: len(data) for path, data in files.items()}
    assert {f.path for f in listed} - files.keys() == {"folder0", "folder1", "folder2"}
    assert hub.counts() == {"GET hub 200": 2}


def test_client_lists_one_folder_and_asks_for_some_paths(make_hub: MakeHub) -> None:
    hub = make_hub({"org/names": FILES})
    api = HfApi(endpoint=hub.endpoint)
    assert {f.path for f in api.list_repo_tree("org/names")} == {"config.json", "empty.txt", "folder", "w.safetensors"}
    assert [f.path for f in api.list_repo_tree("org/names", "folder")] == ["folder/a b%#&ü.txt"]
    found = api.get_paths_info("org/names", ["folder/a b%#&ü.txt", "nope", "w.safetensors"])
    assert {f.path: f.size for f in found} == {"folder/a b%#&ü.txt": 10, "w.safetensors": 1000}
    assert [b.target_commit for b in api.list_repo_refs("org/names").branches] == [hub.commit("org/names")]


def test_client_downloads_awful_names_and_empty_files(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub({"org/names": FILES})
    folder = Path(snapshot_download("org/names", endpoint=hub.endpoint, cache_dir=tmp_path))
    assert {n: (folder / n).read_bytes() for n in FILES} == FILES


@pytest.mark.parametrize(
    ("shape", "status", "leaves"), [("hub", 302, True), ("mirror", 200, False), ("presigned", 200, False)]
)
def test_client_reads_metadata_from_every_shape_of_hub(
    make_hub: MakeHub, tmp_path: Path, shape: str, status: int, leaves: bool
) -> None:
    hub = make_hub({"org/names": FILES}, shape=shape)
    url = hf_hub_url("org/names", "w.safetensors", endpoint=hub.endpoint)
    metadata = get_hf_file_metadata(url, endpoint=hub.endpoint)
    file = hub.manifest("org/names").get("w.safetensors")
    assert file is not None and file.digest is not None
    assert (metadata.etag, metadata.size, metadata.commit_hash) == (file.digest.value, 1000, hub.commit("org/names"))
    assert metadata.location.startswith(hub.cdn) is leaves
    assert hub.counts() == {f"HEAD hub {status}": 1}
    path = hf_hub_download("org/names", "w.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert Path(path).read_bytes() == FILES["w.safetensors"]
    assert ("GET cdn 200" in hub.counts()) is (shape != "mirror")


@pytest.mark.parametrize(
    ("repo", "revision", "file", "token", "error"),
    [
        ("org/nope", "main", "config.json", False, errors.RepositoryNotFoundError),
        ("org/nope", "main", "config.json", "hf_wrong", errors.RepositoryNotFoundError),
        ("org/open", "nope", "config.json", False, errors.RevisionNotFoundError),
        ("org/open", "main", "nope.json", False, errors.RemoteEntryNotFoundError),
        ("org/private", "main", "config.json", False, errors.RepositoryNotFoundError),
        ("org/private", "main", "config.json", "hf_wrong", errors.RepositoryNotFoundError),
        ("org/private", "main", "config.json", "hf_right", None),
        ("org/gated", "main", "config.json", False, errors.GatedRepoError),
        ("org/gated", "main", "config.json", "hf_wrong", errors.GatedRepoError),
        ("org/gated", "main", "config.json", "hf_right", None),
        ("org/disabled", "main", "config.json", "hf_right", errors.DisabledRepoError),
        ("org/old", "main", "config.json", False, None),
    ],
)
def test_client_raises_what_it_raises_on_the_real_hub(
    make_hub: MakeHub,
    tmp_path: Path,
    repo: str,
    revision: str,
    file: str,
    token: str | bool,
    error: type[Exception] | None,
) -> None:
    content = {"config.json": b"{}"}
    hub = make_hub(
        {f"org/{name}": content for name in ("open", "private", "gated", "disabled")},
        token="hf_right",
        gated=["org/gated"],
        private=["org/private"],
        disabled=["org/disabled"],
        renamed={"org/old": "org/open"},
    )
    where: dict[str, Any] = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "token": token}
    if error is None:
        assert Path(hf_hub_download(repo, file, revision=revision, **where)).read_bytes() == b"{}"
    else:
        with pytest.raises(error):
            get_hf_file_metadata(
                hf_hub_url(repo, file, revision=revision, endpoint=hub.endpoint), token=token, endpoint=hub.endpoint
            )


def test_page_of_a_gated_repository_is_public_and_tells_it(make_hub: MakeHub) -> None:
    hub = make_hub({"org/gated": FILES}, gated=["org/gated"], token="hf_right")
    info = HfApi(endpoint=hub.endpoint, token=False).model_info("org/gated")
    assert (info.gated, info.sha) == ("manual", hub.commit("org/gated"))


def test_renamed_repository_answers_with_a_relative_redirect(make_hub: MakeHub) -> None:
    hub = make_hub({"org/new": FILES}, renamed={"org/old": "org/new"})
    assert HfApi(endpoint=hub.endpoint).model_info("org/old").id == "org/new"
    assert hub.counts() == {"GET hub 307": 1, "GET hub 200": 1}


def test_other_revisions_and_earlier_commits_stay(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub({"org/m": {"a.txt": b"two"}}, revisions={"org/m": {"refs/pr/1": {"a.txt": b"one"}}})
    first = hub.commit("org/m", "refs/pr/1")
    second = hub.commit("org/m")
    third = hub.update("org/m", {"a.txt": b"three"})
    assert len({first, second, third}) == 3
    for revision, text in (("refs/pr/1", b"one"), (second, b"two"), ("main", b"three")):
        path = hf_hub_download("org/m", "a.txt", revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path)
        assert Path(path).read_bytes() == text


def test_whoami_knows_only_the_token(make_hub: MakeHub) -> None:
    hub = make_hub({}, token="hf_right")
    assert HfApi(endpoint=hub.endpoint).whoami(token="hf_right")["name"] == "tester"
    with pytest.raises(errors.HfHubHTTPError):
        HfApi(endpoint=hub.endpoint).whoami(token="hf_wrong")
