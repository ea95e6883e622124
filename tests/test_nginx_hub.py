"""The nginx hub speaks the Hub's protocol: the real huggingface_hub is the judge."""

from __future__ import annotations

import filecmp
import hashlib
import http.client
import ssl
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from testbed.nginx_conf import SECRET
from testbed.nginx_hub import NginxHub
from testbed.repos import AWFUL_NAMES

LLAMA = "tb/llama-tiny-bf16"
SHARD = "model-00001-of-00005.safetensors"
LAST_SHARD = "model-00005-of-00005.safetensors"


@pytest.fixture
def api(nginx_hub: NginxHub) -> HfApi:
    return HfApi(endpoint=nginx_hub.url, token=False)


def get(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, Mapping[str, str], bytes]:
    """One plain GET that follows nothing."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path, headers=dict(headers or {}))
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, {k.lower(): v for k, v in response.headers.items()}, body


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_model_info_names_commit_sizes_and_digests(api: HfApi, nginx_hub: NginxHub, tiny_llama: Path) -> None:
    info = api.model_info(LLAMA, revision="v1", files_metadata=True)
    assert info.sha == nginx_hub.repos[LLAMA].first.id
    listed = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings or ()}
    files = [p for p in tiny_llama.iterdir() if p.is_file()]
    large = {p.name: (p.stat().st_size, sha256(p)) for p in files if p.suffix == ".safetensors"}
    assert listed == {**{p.name: (p.stat().st_size, None) for p in files}, **large}


def test_first_and_newest_commit_differ_in_two_files(api: HfApi) -> None:
    def files(revision: str) -> dict[str, str | None]:
        info = api.model_info(LLAMA, revision=revision, files_metadata=True)
        return {s.rfilename: s.blob_id for s in info.siblings or ()}

    old, new = files("v1"), files("main")
    assert {name for name in new if new[name] != old[name]} == {"README.md", LAST_SHARD}
    assert files("refs/pr/1") == old


def test_tree_of_many_files_comes_in_two_pages(api: HfApi, nginx_hub: NginxHub) -> None:
    mark = nginx_hub.mark()
    assert len(list(api.list_repo_tree("tb/many-files", recursive=True))) == 1500
    assert [r.query.partition("&cursor=")[2] for r in nginx_hub.requests(mark)] == ["", "1"]


def test_paths_info_finds_awful_names_and_leaves_out_missing_ones(api: HfApi) -> None:
    found = api.get_paths_info("tb/awful-names", [*AWFUL_NAMES, "nope"])
    assert {f.path for f in found} == set(AWFUL_NAMES)


def test_refs_name_branch_and_tag(api: HfApi) -> None:
    refs = api.list_repo_refs(LLAMA)
    assert ([b.name for b in refs.branches], [t.name for t in refs.tags]) == (["main"], ["v1"])


@pytest.mark.parametrize("server", ["hub", "xet", "mirror"])
def test_metadata_of_a_large_file(nginx_hub: NginxHub, tiny_llama: Path, server: str) -> None:
    endpoint = nginx_hub.endpoint(server)
    metadata = get_hf_file_metadata(hf_hub_url(LLAMA, SHARD, endpoint=endpoint), token=False, endpoint=endpoint)
    assert metadata.etag == sha256(tiny_llama / SHARD)
    assert metadata.size == (tiny_llama / SHARD).stat().st_size
    assert metadata.commit_hash == nginx_hub.repos[LLAMA].head.id
    assert metadata.location.startswith(endpoint if server == "mirror" else nginx_hub.endpoint("cdn"))
    assert (metadata.xet_file_data is not None) == (server == "xet")


@pytest.mark.parametrize(
    ("repo", "filename", "revision", "expected"),
    [
        (LLAMA, "nope.txt", "main", RemoteEntryNotFoundError),
        (LLAMA, "config.json", "nope", RevisionNotFoundError),
        ("tb/nope", "config.json", "main", RepositoryNotFoundError),
        ("tb/private-llama", "config.json", "main", RepositoryNotFoundError),
        ("tb/gated-llama", "config.json", "main", GatedRepoError),
        ("tb/disabled-llama", "config.json", "main", DisabledRepoError),
    ],
)
def test_refusals_are_those_of_the_real_hub(
    nginx_hub: NginxHub, repo: str, filename: str, revision: str, expected: type[Exception]
) -> None:
    url = hf_hub_url(repo, filename, revision=revision, endpoint=nginx_hub.url)
    with pytest.raises(expected) as caught:
        get_hf_file_metadata(url, token=False, endpoint=nginx_hub.url)
    assert type(caught.value) is expected


def test_wrong_token_makes_private_missing_and_gated_forbidden(nginx_hub: NginxHub) -> None:
    headers = {"Authorization": "Bearer hf_other"}
    status, answer, _ = get(f"{nginx_hub.url}/api/models/tb/private-llama", headers)
    assert (status, answer["x-error-code"]) == (404, "RepoNotFound")
    status, answer, _ = get(f"{nginx_hub.url}/tb/gated-llama/resolve/main/config.json", headers)
    assert (status, answer["x-error-code"]) == (403, "GatedRepo")


@pytest.mark.parametrize("repo", ["tb/private-llama", "tb/gated-llama"])
def test_token_opens_closed_doors_and_stays_at_the_hub(
    nginx_hub: NginxHub, tiny_llama: Path, tmp_path: Path, repo: str
) -> None:
    mark = nginx_hub.mark()
    path = hf_hub_download(repo, SHARD, endpoint=nginx_hub.url, token=nginx_hub.token, cache_dir=tmp_path)
    assert filecmp.cmp(path, tiny_llama / SHARD, shallow=False)
    seen = {r.server: r.authorization for r in nginx_hub.requests(mark)}
    assert seen == {"hub": f"Bearer {nginx_hub.token}", "cdn": ""}


def test_cdn_refuses_a_token_that_comes_along(nginx_hub: NginxHub) -> None:
    location = signed_location(nginx_hub)
    assert get(location)[0] == 200
    assert get(location, {"Authorization": f"Bearer {nginx_hub.token}"})[0] == 400


def signed_location(hub: NginxHub, server: str = "hub") -> str:
    status, headers, _ = get(f"{hub.endpoint(server)}/{LLAMA}/resolve/main/{SHARD}")
    assert status == 302
    return headers["location"]


@pytest.mark.parametrize(("expires", "status"), [("9999999999", 200), ("1000000000", 403)])
def test_cdn_refuses_an_old_signature(nginx_hub: NginxHub, expires: str, status: int) -> None:
    path = urlsplit(signed_location(nginx_hub)).path
    digest = hashlib.md5(f"{expires}{path} {SECRET}".encode()).digest()
    signature = urlsafe_b64encode(digest).decode().rstrip("=")
    url = f"{nginx_hub.endpoint('cdn')}{path}?Expires={expires}&Signature={signature}"
    assert get(url)[0] == status
    assert get(url[:-4] + "AAAA")[0] == 403


def test_short_signatures_hold_two_seconds(nginx_hub: NginxHub) -> None:
    _, headers, _ = get(f"{nginx_hub.endpoint('short')}/{LLAMA}/resolve/main/{SHARD}")
    expires = int(urlsplit(headers["location"]).query.partition("=")[2].partition("&")[0])
    (redirect,) = [r for r in nginx_hub.requests() if r.server == "short"][-1:]
    assert expires - redirect.at_s <= 2


def test_snapshot_is_complete_offline_and_verifies(
    api: HfApi, nginx_hub: NginxHub, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = snapshot_download(LLAMA, revision="v1", endpoint=nginx_hub.url, cache_dir=tmp_path, token=False)
    names = sorted(p.name for p in tiny_llama.iterdir())
    assert filecmp.cmpfiles(folder, tiny_llama, names, shallow=False) == (names, [], [])
    mark = nginx_hub.mark()
    assert snapshot_download(LLAMA, revision="v1", cache_dir=tmp_path, local_files_only=True) == folder
    assert nginx_hub.requests(mark) == []
    checked = api.verify_repo_checksums(LLAMA, revision="v1", cache_dir=tmp_path)
    assert (checked.checked_count, checked.mismatches, checked.missing_paths) == (len(names), [], [])
    assert [r.repo_id for r in scan_cache_dir(tmp_path).repos] == [LLAMA]


@pytest.mark.parametrize("server", ["hub", "mirror"])
def test_awful_names_arrive(nginx_hub: NginxHub, tmp_path: Path, server: str) -> None:
    folder = Path(
        snapshot_download("tb/awful-names", endpoint=nginx_hub.endpoint(server), cache_dir=tmp_path, token=False)
    )
    contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert contents == {name: b"" if name.startswith("empty") else b"{}\n" + name.encode() for name in AWFUL_NAMES}


def test_stale_mirror_has_the_first_commit_only(nginx_hub: NginxHub) -> None:
    repo = nginx_hub.repos[LLAMA]
    stale = HfApi(endpoint=nginx_hub.endpoint("stale"), token=False)
    assert stale.model_info(LLAMA).sha == repo.first.id
    with pytest.raises(RevisionNotFoundError):
        stale.model_info(LLAMA, revision=repo.head.id)


def test_missing_file_names_the_commit_so_that_clients_can_remember(nginx_hub: NginxHub, tmp_path: Path) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(LLAMA, "nope.txt", endpoint=nginx_hub.url, cache_dir=tmp_path, token=False)
    head = nginx_hub.repos[LLAMA].head.id
    assert (tmp_path / "models--tb--llama-tiny-bf16/.no_exist" / head / "nope.txt").exists()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(LLAMA, "nope.txt", endpoint=nginx_hub.url, cache_dir=tmp_path, local_files_only=True)


def test_ranges_are_kept_as_long_as_the_etag_fits(nginx_hub: NginxHub, tiny_llama: Path) -> None:
    url = f"{nginx_hub.endpoint('mirror')}/{LLAMA}/resolve/main/{SHARD}"
    content = (tiny_llama / SHARD).read_bytes()
    etag = f'"{sha256(tiny_llama / SHARD)}"'
    mark = nginx_hub.mark()
    status, headers, body = get(url, {"Range": "bytes=10-19", "If-Range": etag})
    assert (status, headers["content-range"], body) == (206, f"bytes 10-19/{len(content)}", content[10:20])
    status, _, body = get(url, {"Range": "bytes=10-19", "If-Range": '"other"'})
    assert (status, body) == (200, content)
    logged = [(r.server, r.status, r.range, r.body_bytes) for r in nginx_hub.requests(mark)]
    assert logged == [("mirror", 206, "bytes=10-19", 10), ("mirror", 200, "bytes=10-19", len(content))]


def test_tls_mirror_is_trusted_by_its_own_certificate_alone(nginx_hub: NginxHub) -> None:
    netloc = urlsplit(nginx_hub.endpoint("tls")).netloc

    def status(context: ssl.SSLContext) -> int:
        connection = http.client.HTTPSConnection(netloc, context=context, timeout=30)
        try:
            connection.request("GET", f"/{LLAMA}/resolve/main/config.json")
            return connection.getresponse().status
        finally:
            connection.close()

    assert status(ssl.create_default_context(cafile=str(nginx_hub.ca_file))) == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        status(ssl.create_default_context())
