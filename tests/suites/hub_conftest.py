"""Takes the place of huggingface_hub's own conftest, which its source distribution lacks: its tests' repositories on our hub.

What they write (``create_repo``, ``upload_file`` …) goes to an embedded hub directly; what they read travels over HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fastload.testing import Hub

_TOKEN = "hf_HubCITokenXXXXXXXXXXXXXXXXXXXXX"  # the one that the tests know
_ATTRIBUTES = {".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n"}
_hub = Hub({}, token=_TOKEN, lfs=lambda path, size: path.endswith(".bin")).start()
os.environ["HF_ENDPOINT"] = _hub.endpoint  # before huggingface_hub is imported, which reads it once

from huggingface_hub import HfApi  # noqa: E402

#: Files by repository and branch.
_files: dict[str, dict[str, dict[str, bytes]]] = {}


class _RepoUrl(str):
    """As ``RepoUrl``, which refuses the URLs of hubs that are not Hugging Face's."""

    repo_id: str


class RepoFactory:
    """The tests name it in annotations."""


def _commit(repo: str, branch: str, files: dict[str, bytes]) -> SimpleNamespace:
    branches = _files[repo]
    branches[branch] = {**branches.get(branch, branches.get("main", {})), **files}
    oid = _hub.update(repo, branches[branch], revision=branch)
    return SimpleNamespace(oid=oid)


def _create_repo(self: HfApi, repo_id: str, **options: Any) -> _RepoUrl:
    repo = repo_id if "/" in repo_id else f"user/{repo_id}"
    _files[repo] = {}
    _commit(repo, "main", _ATTRIBUTES)
    _private(repo, bool(options.get("private")))
    url = _RepoUrl(f"{_hub.endpoint}/{repo}")
    url.repo_id = repo
    return url


def _private(repo: str, on: bool) -> None:
    rules = _hub._protocol._rules
    _hub._protocol._rules = replace(rules, private=rules.private | {repo} if on else rules.private - {repo})


def _move_repo(self: HfApi, before: str, after: str) -> None:
    rules = _hub._protocol._rules
    for branch, files in _files.setdefault(after, _files[before]).items():
        _hub.update(after, files, revision=branch)
    renamed = {old: new for old, new in rules.renamed.items() if old != after}
    _hub._protocol._rules = replace(rules, renamed={**renamed, before: after})
    _private(after, before in rules.private)


def _upload_file(self: HfApi, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, **_: Any) -> SimpleNamespace:
    return _commit(repo_id, "main", {path_in_repo: path_or_fileobj})


def _create_commit(self: HfApi, repo_id: str, operations: Any, *, revision: str = "main", **_: Any) -> SimpleNamespace:
    return _commit(repo_id, revision, {o.path_in_repo: o.path_or_fileobj for o in operations})


def _create_branch(self: HfApi, repo_id: str, *, branch: str, **_: Any) -> None:
    _commit(repo_id, branch, {})


@pytest.fixture(scope="session", autouse=True)
def _writes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, function in {
            "create_repo": _create_repo, "upload_file": _upload_file, "create_commit": _create_commit,
            "create_branch": _create_branch, "move_repo": _move_repo,
            "update_repo_settings": lambda self, repo_id, *, private, **_: _private(repo_id, private),
            "delete_repo": lambda self, repo_id, **_: None,
        }.items():  # fmt: skip
            patch.setattr(HfApi, name, function)
        yield
    _hub.close()


@pytest.fixture(scope="session")
def api(_writes: None) -> HfApi:
    return HfApi(endpoint=_hub.endpoint, token=_TOKEN)


@pytest.fixture
def repo_factory(api: HfApi) -> Any:
    numbers = iter(range(100))
    return lambda **options: SimpleNamespace(
        repo_id=api.create_repo(f"user/made-{id(numbers)}-{next(numbers)}", **options).repo_id
    )


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Any) -> None:
    if request.cls is not None:
        request.cls.cache_dir = tmp_path
