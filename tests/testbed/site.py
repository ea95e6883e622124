"""The hub as files that nginx serves: JSON answers of the API, contents by id, and nginx maps between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from .real import link
from .repos import Commit, Repo, RepoFile

PAGE_ENTRIES = 1000  # specified: the Hub lists so many files a page


def write_site(www: Path, repos: Iterable[Repo]) -> str:
    """Write everything that is served under *www*.

    Returns:
        nginx ``map`` directives: ``$file`` (``/lfs/{sha256}`` or ``/git/{sha1}``) and ``$commit``, each also with the
        prefix ``stale_``, ``$known_repo``, ``$lfs_size``, ``$xet`` and ``$cursor``.
    """
    repos = list(repos)
    for file in {f.etag: f for r in repos for c in r.commits for f in c.files}.values():
        _write_content(www, file)
    maps = [_repo_map(repos), _size_maps(repos)]
    cursors: dict[str, str] = {}
    for prefix in ("", "stale_"):
        files: dict[str, str] = {}
        commits: dict[str, str] = {}
        for repo in repos:
            revisions = repo.revisions(stale=bool(prefix))
            commits |= {f"{repo.id} {quote(name, safe='')}": c.id for name, c in revisions.items()}
            for name, at in revisions.items():
                files |= {f"/{repo.id}/resolve/{name}/{f.path}": f"/{_folder(f)}/{f.etag}" for f in at.files}
            cursors |= _write_api(www / f"{prefix}api", repo, revisions)
        maps += [nginx_map("$u", f"${prefix}file", files), nginx_map("$rev_key", f"${prefix}commit", commits)]
    return "".join([*maps, nginx_map('"$u $arg_cursor"', "$cursor", cursors)])


def nginx_map(source: str, target: str, values: Mapping[str, str]) -> str:
    """Return an nginx ``map`` of exact strings; anything else maps to the empty string."""
    rows = "".join(f"  {_quoted(key)} {_quoted(value)};\n" for key, value in values.items())
    return f'map {source} {target} {{\n  default "";\n{rows}}}\n'


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _folder(file: RepoFile) -> str:
    return "lfs" if file.sha256 else "git"


def _write_content(www: Path, file: RepoFile) -> None:
    target = www / _folder(file) / file.etag
    if isinstance(file.content, Path):
        link(file.content, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.content)


def _repo_map(repos: Iterable[Repo]) -> str:
    return nginx_map("$repo_key", "$known_repo", {repo.id: "1" for repo in repos})


def _size_maps(repos: Iterable[Repo]) -> str:
    large = {f.sha256: f for r in repos for c in r.commits for f in c.files if f.sha256}
    sizes = {sha256: str(f.size) for sha256, f in large.items()}
    hashes = {sha256: _xet_hash(sha256) for sha256 in large}
    return nginx_map("$lfs", "$lfs_size", sizes) + nginx_map("$lfs", "$xet", hashes)


def _xet_hash(sha256: str) -> str:
    """A Xet hash in its form only: its real value takes the chunking of the Xet format."""
    return hashlib.sha256(f"xet {sha256}".encode()).hexdigest()


def _write_api(api: Path, repo: Repo, revisions: Mapping[str, Commit]) -> dict[str, str]:
    """Write the answers of ``/api/models/{repo}``; return the query of the next page by this page's path and cursor."""
    base = api / "models" / repo.id
    cursors: dict[str, str] = {}
    for name, commit in revisions.items():
        info = _model_info(repo, commit)
        _dump(base / "revision" / f"{name}.json", info)
        if name == "main":
            _dump(base / "index.json", info)
        tree = [_tree_entry(file, xet=False) for file in commit.files]
        for start in range(0, max(1, len(tree)), PAGE_ENTRIES):
            page = start // PAGE_ENTRIES
            suffix = f".{page}" if page else ""
            _dump(base / "tree" / f"{name}{suffix}.json", tree[start : start + PAGE_ENTRIES])
            if start + PAGE_ENTRIES < len(tree):
                cursor = f"?recursive=True&expand=False&cursor={page + 1}"
                cursors[f"/api/models/{repo.id}/tree/{name} {page or ''}"] = cursor
        _dump(base / "tree-xet" / f"{name}.json", [_tree_entry(file, xet=True) for file in commit.files])
    branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": revisions["main"].id}
    tag = {"name": "v1", "ref": "refs/tags/v1", "targetCommit": revisions["v1"].id}
    _dump(base / "refs.json", {"branches": [branch], "converts": [], "tags": [tag], "pullRequests": []})
    return cursors


def _model_info(repo: Repo, commit: Commit) -> dict[str, object]:
    siblings = []
    for file in commit.files:
        entry: dict[str, object] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
        if file.sha256:
            entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_bytes}
        siblings.append(entry)
    return {
        "_id": commit.id[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.id,
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "private": repo.name.startswith("private-"),
        "gated": "manual" if repo.name.startswith("gated-") else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }


def _tree_entry(file: RepoFile, *, xet: bool) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": file.oid, "size": file.size, "path": file.path}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_bytes}
        if xet:
            entry["xetHash"] = _xet_hash(file.sha256)
    return entry


def _dump(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
