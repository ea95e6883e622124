"""fastload against a real server: every way that nginx serves the hub, and every fault of it, ends in the right files."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
from testbed.nginx_faults import FAULTS, NginxFaults
from testbed.nginx_hub import NginxHub

import fastload
from fastload.errors import AccessError, NotFoundError, SourceError

LLAMA = "tb/llama-tiny-bf16"


def prefetch(source: str, cache: Path, endpoint: str, revision: str = "v1", **settings: Any) -> Path:
    return fastload.prefetch(
        source, revision=revision, settings={"cache_dir": cache, "endpoint": endpoint, **settings}
    ).path


def assert_same_files(snapshot: Path, model: Path) -> None:
    names = sorted(p.name for p in model.iterdir())
    assert filecmp.cmpfiles(snapshot, model, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("server", ["hub", "short", "xet", "mirror", "stale", "tls"])
def test_every_server_gives_the_same_files_and_the_cdn_sees_no_token(
    nginx_hub: NginxHub, tiny_llama: Path, tmp_path: Path, server: str
) -> None:
    mark = nginx_hub.mark()
    trust = {"ca_file": nginx_hub.ca_file} if server == "tls" else {}
    snapshot = prefetch(LLAMA, tmp_path, nginx_hub.endpoint(server), token=nginx_hub.token, **trust)
    assert_same_files(snapshot, tiny_llama)
    requests = nginx_hub.requests(mark)
    assert {r.authorization for r in requests if r.server == server} == {f"Bearer {nginx_hub.token}"}
    assert {r.authorization for r in requests if r.server != server} <= {""}


@pytest.mark.parametrize(
    ("repo", "expected"), [("private", NotFoundError), ("gated", AccessError), ("disabled", AccessError)]
)
def test_closed_doors_say_so(nginx_hub: NginxHub, tmp_path: Path, repo: str, expected: type[SourceError]) -> None:
    with pytest.raises(expected) as caught:
        prefetch(f"tb/{repo}-llama", tmp_path, nginx_hub.url)
    assert caught.value.hint


@pytest.mark.parametrize("repo", ["private", "gated"])
def test_token_opens_closed_doors(nginx_hub: NginxHub, tiny_llama: Path, tmp_path: Path, repo: str) -> None:
    snapshot = prefetch(f"tb/{repo}-llama", tmp_path, nginx_hub.url, token=nginx_hub.token)
    assert_same_files(snapshot, tiny_llama)


def test_awful_names_arrive(nginx_hub: NginxHub, tmp_path: Path) -> None:
    snapshot = prefetch("tb/awful-names", tmp_path, nginx_hub.url)
    expected = {f.path: f.content for f in nginx_hub.repos["tb/awful-names"].head.files}
    found = {p.relative_to(snapshot).as_posix(): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()}
    assert found == expected


# Those that break the API too leave nothing to begin with: a captive portal is no hub.
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"captive"}))
def test_an_origin_with_a_fault_costs_nothing_but_time(
    nginx_hub: NginxHub, nginx_faults: NginxFaults, tiny_llama: Path, tmp_path: Path, fault: str
) -> None:
    mark = nginx_faults.mark()
    snapshot = prefetch(
        LLAMA, tmp_path, nginx_faults.endpoint(fault), mirrors=(nginx_hub.endpoint("mirror"),), stall_s=0.5
    )
    assert_same_files(snapshot, tiny_llama)
    assert any("/resolve/" in r.path for r in nginx_faults.requests(mark)), "the fault was never met"


def test_a_captive_portal_is_no_hub(nginx_faults: NginxFaults, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a Hugging Face hub"):
        prefetch(LLAMA, tmp_path, nginx_faults.endpoint("captive"))
