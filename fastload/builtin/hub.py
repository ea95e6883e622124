"""Sources on the Hugging Face Hub and on hubs that speak its protocol: ``org/name``, ``org/name@revision``, ``hf://…``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin

from ..errors import MirrorError, NotFoundError, SettingsError, SourceChangedError
from ..hookspecs import hookimpl
from ..types import Digest, Http, Manifest, RemoteFile

if TYPE_CHECKING:
    from ..settings import Settings
    from ..types import Source

#: As huggingface_hub.utils.validate_repo_id has it: letters, digits, ``-_.``, at most 96 a part, one slash.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"^(?:{_PART}/)?{_PART}$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True, slots=True)
class HubSource:
    """One model repository of a hub."""

    uri: str
    name: str
    revision: str
    endpoint: str

    async def files(self, http: Http, settings: Settings) -> Manifest:
        """List the repository at the commit that the revision stands for: one request at the Hub.

        Where the listing lacks sizes or digests (foreign hubs) the tree API is asked, then HEAD for each file.

        Raises:
            SourceError: The hub does not have it, or does not let us have it.
        """
        url = f"{self.endpoint}/api/models/{quote(self.name)}/revision/{quote(self.revision, safe='')}?blobs=True"
        info, _ = await http.get_json(url)
        commit = info.get("sha") if isinstance(info, Mapping) else None
        if not isinstance(commit, str) or not isinstance(info.get("siblings"), list):
            raise MirrorError(
                f"{self.endpoint}: the answer for {self.name} names no commit or no files", retryable=False
            )
        if _COMMIT.match(self.revision) and commit != self.revision:
            raise SourceChangedError(
                f"{self.name}: asked for commit {self.revision}, the hub answers with {commit}",
                expected=self.revision,
                actual=commit,
                hint="the hub or mirror at this endpoint is stale or broken",
            )
        entries = {s["rfilename"]: _entry(s) for s in info["siblings"] if isinstance(s, Mapping) and "rfilename" in s}
        if not all(entries.values()):
            entries.update(await self._tree(http, commit))
        files = []
        for path, entry in entries.items():
            size, digest, blob_id = entry or await self._head(http, commit, path)
            url_path = f"/{self.name}/resolve/{commit}/{quote(path)}"
            files.append(RemoteFile(path, size, digest, url_path=url_path, blob_id=blob_id))
        return Manifest(self.name, self.revision, commit, self.endpoint, tuple(files))

    async def _tree(self, http: Http, commit: str) -> dict[str, Entry]:
        """Ask the paged tree API (1000 entries a page, RFC 8288 ``Link: <…>; rel="next"``); nothing where there is none."""
        url = f"{self.endpoint}/api/models/{quote(self.name)}/tree/{commit}?recursive=True&expand=False"
        entries: dict[str, Entry] = {}
        while url:
            try:
                page, headers = await http.get_json(url)
            except (MirrorError, NotFoundError):
                return {}
            entries.update({e["path"]: _entry(e) for e in page if isinstance(e, Mapping) and e.get("type") == "file"})
            match = re.search(r'<([^>]+)>\s*;\s*rel="?next"?', headers.get("Link", ""))
            url = urljoin(url, match[1]) if match else ""
        return entries

    async def _head(self, http: Http, commit: str, path: str) -> tuple[int, Digest | None, str | None]:
        """Read size and digest off the hub's own answer for one file."""
        headers = await http.head(f"{self.endpoint}/{self.name}/resolve/{commit}/{quote(path)}")
        redirect = "Location" in headers  # then Content-Length is that of the redirect's own body
        size = headers.get("X-Linked-Size") or ("" if redirect else headers.get("Content-Length", ""))
        etag = (headers.get("X-Linked-ETag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        if not size.isdigit():
            raise MirrorError(f"{self.endpoint}: says nothing about the size of {path}", retryable=False)
        digest = _digest(etag)
        return int(size), digest, etag if digest and digest.algorithm == "git-sha1" else None


Entry = tuple[int, Digest | None, str | None] | None


def _digest(text: object) -> Digest | None:
    try:
        return Digest.parse(str(text))
    except ValueError:
        return None


def _entry(record: Mapping[str, Any]) -> Entry:
    """Return size, digest and git id of one record of either API, or ``None`` where it does not tell both."""
    lfs = record.get("lfs")
    blob_id = record.get("blobId") or record.get("oid")
    if isinstance(lfs, Mapping):
        size, digest = lfs.get("size"), _digest(lfs.get("sha256") or lfs.get("oid"))
    else:
        size, digest = record.get("size"), _digest(blob_id)
    if not isinstance(size, int) or digest is None:
        return None
    return size, digest, str(blob_id) if blob_id else None


@hookimpl
def fastload_mirrors(source: Source, settings: Settings) -> tuple[str, ...]:
    """Offer the mirrors of the settings (``mirrors=``, FASTLOAD_MIRRORS)."""
    return settings.mirrors


@hookimpl
def fastload_source(uri: str, revision: str | None, settings: Settings) -> HubSource | None:
    """Take whatever looks like the name of a repository."""
    text = uri.removeprefix("hf://").removeprefix("models/")
    name, _, at = text.partition("@")
    if not _REPO.match(name) or ".." in name or "--" in name:
        return None
    if revision and at and revision != at:
        raise SettingsError(f"{uri!r} names revision {at!r}, the argument {revision!r}", hint="give one of them")
    return HubSource(uri, name, revision or at or "main", settings.endpoint)
