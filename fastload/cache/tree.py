"""What a commit holds, as the cache knows it: huggingface_hub's ``trees/{commit}.json``, or the snapshot's links."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..types import Digest, Manifest, RemoteFile

#: Specified: huggingface_hub's format; another one is for another version to read.
_VERSION = 1


def read_tree(folder: Path, commit: str) -> list[RemoteFile] | None:
    """Return every file of *commit* from its tree listing, without URLs; ``None`` where there is none to be read.

    Read here, not by huggingface_hub, because importing its reader takes 60 to 80 ms (measured) of a start offline.
    """
    try:
        record: Any = json.loads((folder / "trees" / f"{commit}.json").read_text(encoding="utf-8"))
        if record["format_version"] != _VERSION:
            return None
        return [_file(path, entry) for path, entry in record["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _file(path: str, entry: dict[str, Any]) -> RemoteFile:
    sha256, blob_id = entry.get("lfs_sha256"), entry["blob_id"]
    size = entry["size"] if sha256 is None or entry.get("lfs_size") is None else entry["lfs_size"]
    if type(size) is not int or size < 0:
        raise ValueError(f"{size!r} is not a number of bytes")
    return RemoteFile(path, size, Digest.parse(blob_id if sha256 is None else sha256), blob_id=blob_id)


def write_tree(folder: Path, manifest: Manifest) -> None:
    """Keep the listing of *manifest*, if it names a digest for every file.

    huggingface_hub trusts such a listing for ever, so it must be all of the commit. It reads the Git names
    (``blob_id``) of LFS files nowhere on the way to a download; where the source did not tell them, they are those of
    the pointer files that Git LFS writes.
    """
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    entries = {}
    for file in manifest.files:
        if file.digest is None:
            return
        if file.digest.algorithm == "sha256":
            blob_id = file.blob_id or _pointer_id(file.digest.value, file.size)
            lfs = {"lfs_sha256": file.digest.value, "lfs_size": file.size}
            entries[file.path] = TreeCacheEntry(file.size, blob_id, **lfs)
        else:
            entries[file.path] = TreeCacheEntry(file.size, file.digest.value)
    write_tree_cache(str(folder), manifest.commit, entries)


def _pointer_id(sha256: str, size: int) -> str:
    """Return the Git name of an LFS pointer file, whose text is specified to the byte (git-lfs, docs/spec.md)."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()


def linked_files(snapshot: Path) -> list[RemoteFile] | None:
    """Return the files that *snapshot* links to, by the digests in the names of their blobs.

    ``None`` unless every file there is a link to a whole blob with a digest for a name. Nothing says that the snapshot
    is complete.
    """
    files = []
    for path in present_files(snapshot):
        digest = linked_digest(snapshot / path)
        if digest is None:
            return None
        try:
            files.append(RemoteFile(path, os.stat(snapshot / path).st_size, digest))
        except OSError:
            return None
    return files or None


def linked_digest(pointer: Path) -> Digest | None:
    """Return what the blob that *pointer* links to must hash to, by its name."""
    try:
        return Digest.parse(os.path.basename(os.readlink(pointer)))
    except (OSError, ValueError):
        return None


def present_files(snapshot: Path) -> Iterator[str]:
    """Yield the paths of all files and links in *snapshot*, relative, with ``/``, in order."""
    for folder, folders, names in os.walk(snapshot):
        folders.sort()
        for name in sorted(names):
            yield os.path.relpath(os.path.join(folder, name), snapshot)
