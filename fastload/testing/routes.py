"""Reading URLs and Range headers, writing listings: the parts of the Hub's protocol that need no connection."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ..types import ByteRange
from .files import Commit

_VERBS = ("revision", "tree", "paths-info", "refs")


@dataclass(frozen=True, slots=True)
class Route:
    """What a URL asks for."""

    kind: str
    repo: str = ""
    revision: str = "main"
    path: str = ""


def parse_route(segments: list[str]) -> Route:
    """Return what the decoded path *segments* of a URL of the hub ask for; kind ``unknown`` where nothing fits."""
    if segments[:1] == ["api"] and len(segments) == 2:
        return Route(segments[1])
    if segments[:2] == ["api", "models"]:
        rest = segments[2:]
        at = next((n for n, s in enumerate(rest) if n in (1, 2) and s in _VERBS), len(rest))
        if not 1 <= at <= 2:
            return Route("unknown")
        verb, *tail = rest[at:] or ["revision"]
        revision = (tail[0] if tail else "") or "main"
        return Route("info" if verb == "revision" else verb, "/".join(rest[:at]), revision, "/".join(tail[1:]))
    for at in (1, 2):
        if len(segments) >= at + 3 and segments[at] == "resolve":
            return Route("resolve", "/".join(segments[:at]), segments[at + 1], "/".join(segments[at + 2 :]))
    return Route("unknown")


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Return the bytes that a Range *header* asks for: ``None`` = all (no single sound range), empty = none of them."""
    unit, _, text = (header or "").partition("=")
    first, dash, last = text.strip().partition("-")
    if unit.strip() != "bytes" or not dash or not (first or last) or not f"{first or 0}{last or 0}".isdecimal():
        return None
    if not first:
        return ByteRange(max(0, size - int(last)), size)
    stop = min(size, int(last) + 1) if last else size
    if last and int(last) < int(first):
        return None
    return ByteRange(int(first), stop) if int(first) < stop else ByteRange(size, size)


def info_rows(commit: Commit, *, blobs: bool) -> list[dict[str, Any]]:
    """Return the ``siblings`` of a model page; with *blobs* also sizes and digests."""
    rows: list[dict[str, Any]] = []
    for entry in commit.files.values():
        row: dict[str, Any] = {"rfilename": entry.path}
        if blobs:
            row |= {"size": entry.size, "blobId": entry.blob_id}
            if entry.sha256:
                row["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_bytes}
        rows.append(row)
    return rows


def tree_rows(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Return what the tree API lists under *folder*, directories included."""
    prefix = f"{folder}/" if folder else ""
    rows: dict[str, dict[str, Any]] = {}
    for entry in commit.files.values():
        if not entry.path.startswith(prefix):
            continue
        parts = entry.path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.id}/{name}".encode(), usedforsecurity=False).hexdigest()
            rows.setdefault(name, {"type": "directory", "oid": oid, "size": 0, "path": name})
        if recursive or len(parts) == 1:
            row: dict[str, Any] = {"type": "file", "oid": entry.blob_id, "size": entry.size, "path": entry.path}
            if entry.sha256:
                row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_bytes}
            rows[entry.path] = row
    return list(rows.values())
