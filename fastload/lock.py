"""``fastload.lock``: commit, files, sizes and digests of what a program loads, pinned in a file beside its code.

With a lock nothing is asked of the hub: what it lists is fetched, and nothing else is accepted. One line a file,
sorted, so that a diff shows what changed::

    {
      "version": 1,
      "sources": [
        {
          "source": "org/model", "revision": "main",
          "commit": "c5f93f70e865d1a5…",
          "url_prefix": "org/model/resolve/c5f93f70e865d1a5…/",
          "files": [
            {"path": "config.json", "size": 612, "digest": "git-sha1:72b9…"},
            {"path": "model.safetensors", "size": 90868376, "digest": "sha256:53aa…"}
          ]
        }
      ]
    }

The lock names no endpoint: it is where the token goes, and a file from somebody else's repository must not choose that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urlsplit

from .errors import NotFoundError, SettingsError, UnsupportedSourceError
from .types import Digest, Manifest, RemoteFile

VERSION = 1
#: The name that the command line reads and writes where none is given.
FILENAME = "fastload.lock"
#: Guessed: a repository of 100 000 files has a lock of 15 MB; what is longer is not a lock.
_MAX_BYTES = 256 << 20

_LOCK_KEYS = frozenset({"version", "sources"})
_SOURCE_KEYS = frozenset({"source", "revision", "commit", "url_prefix", "files"})
_FILE_KEYS = frozenset({"path", "size", "digest", "url_path", "url"})


@dataclass(frozen=True, slots=True)
class Lock:
    """What may be loaded: one manifest a source and revision. Immutable; no I/O but in :meth:`read` and :meth:`write`.

    Attributes:
        manifests: Sorted by source and revision, their ``endpoint`` empty.
    """

    manifests: tuple[Manifest, ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Lock:
        """Return the lock in the file *path*.

        Raises:
            NotFoundError: There is no such file.
            SettingsError: It cannot be read, or is not a lock; the message names file and key.
        """
        try:
            with open(path, "rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError as e:
            raise NotFoundError(
                f"{os.fspath(path)}: no such lock file", hint=f"`fastload lock SOURCE -o {os.fspath(path)}` writes it"
            ) from e
        except OSError as e:
            raise SettingsError(f"{os.fspath(path)}: cannot be read: {e.strerror or e}") from e
        if len(data) > _MAX_BYTES:
            raise SettingsError(f"{os.fspath(path)}: longer than {_MAX_BYTES} bytes, not a lock")
        return cls.parse(data, name=os.fspath(path))

    @classmethod
    def parse(cls, data: bytes | str, *, name: str = FILENAME) -> Lock:
        """Return the lock that *data* holds; *name* is what errors call it.

        Raises:
            SettingsError: Not JSON, of another version, or a key is missing, unknown or wrong.
        """
        return _Reader(name).lock(data)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the lock to *path*, whole or not at all.

        Raises:
            SettingsError: It cannot be written there.
        """
        target = Path(os.path.realpath(path))  # a link stays a link
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(self.text(), encoding="utf-8", newline="\n")
            os.replace(temporary, target)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise SettingsError(f"{os.fspath(path)}: cannot be written: {e.strerror or e}") from e

    def manifest(self, source: str, revision: str | None = None, *, endpoint: str = "") -> Manifest | None:
        """Return what is locked for *source*, or ``None``.

        Args:
            source: ``org/name``, as :attr:`Manifest.source` has it.
            revision: As it was locked, or the commit itself; ``None``: the only one locked, else ``main``.
            endpoint: Becomes the manifest's: the lock itself names none.
        """
        found = [m for m in self.manifests if m.source == source]
        if revision is not None:
            found = [m for m in found if revision == m.revision] or [m for m in found if revision == m.commit]
        elif len(found) > 1:
            found = [m for m in found if m.revision == "main"]
        return _with_endpoint(found[0], endpoint) if found else None

    def with_manifest(self, manifest: Manifest) -> Lock:
        """Return a lock that holds *manifest* too; it replaces what was locked for the same source and revision.

        Raises:
            UnsupportedSourceError: A folder of this machine; or a file without digest, with an unsafe path or address.
        """
        if manifest.local is not None:
            raise UnsupportedSourceError(
                f"{manifest.source} is a folder on this machine: there is nothing to lock",
                hint="lock the repository that it came from",
            )
        for file in manifest.files:
            reason = _why_not(file)
            if reason:
                raise UnsupportedSourceError(f"{manifest.source}: {file.path}: {reason}, so it cannot be locked")
        files = tuple(sorted(manifest.files, key=lambda f: f.path))
        new = Manifest(manifest.source, manifest.revision, manifest.commit, "", files)
        key = (new.source, new.revision)
        rest = [m for m in self.manifests if (m.source, m.revision) != key]
        return Lock(tuple(sorted([*rest, new], key=lambda m: (m.source, m.revision))))

    def text(self) -> str:
        """Return the JSON text, the same for the same content."""
        sources = ",\n".join(_source_text(m) for m in self.manifests)
        body = f"[\n{sources}\n  ]" if sources else "[]"
        return f'{{\n  "version": {VERSION},\n  "sources": {body}\n}}\n'

    def to_record(self) -> dict[str, Any]:
        """Return the same as plain data."""
        record: dict[str, Any] = json.loads(self.text())
        return record


def _with_endpoint(manifest: Manifest, endpoint: str) -> Manifest:
    return Manifest(manifest.source, manifest.revision, manifest.commit, endpoint, manifest.files)


# -- writing --------------------------------------------------------------------------------------------------------


def _why_not(file: RemoteFile) -> str | None:
    """Say what keeps *file* out of a lock."""
    if file.digest is None:
        return "its source tells no digest"
    return _unsafe_path(file.path) or (_unsafe_url(file.url) if file.url is not None else None)


def _source_text(manifest: Manifest) -> str:
    prefix = _common_prefix(manifest.files)
    pairs = [
        f'"source": {_json(manifest.source)}, "revision": {_json(manifest.revision)}',
        f'"commit": {_json(manifest.commit)}',
    ]
    if prefix is not None:
        pairs.append(f'"url_prefix": {_json(prefix)}')
    lines = ",\n".join(f"        {_json(_file_record(f, prefix))}" for f in manifest.files)
    pairs.append(f'"files": [\n{lines}\n      ]' if lines else '"files": []')
    inner = ",\n".join(f"      {pair}" for pair in pairs)
    return f"    {{\n{inner}\n    }}"


def _file_record(file: RemoteFile, prefix: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {"path": file.path, "size": file.size, "digest": str(file.digest)}
    if file.url_path and prefix is None:
        record["url_path"] = file.url_path
    if file.url is not None:
        record["url"] = file.url
    return record


def _common_prefix(files: Iterable[RemoteFile]) -> str | None:
    """Return what stands before the quoted path in every file's ``url_path``; ``None`` where they disagree."""
    prefixes = set()
    for file in files:
        quoted = quote(file.path, safe="/")
        if not file.url_path.endswith(quoted):
            return None
        prefixes.add(file.url_path[: len(file.url_path) - len(quoted)])
    return prefixes.pop() if len(prefixes) == 1 else None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- checking -------------------------------------------------------------------------------------------------------


def _unsafe_path(path: str) -> str | None:
    """Say why *path* may not be the place of a file in a snapshot."""
    parts = path.split("/")
    if path.startswith("/") or ":" in parts[0] or "\\" in path:
        return "not a relative path with '/'"
    if any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c == "\x7f" for c in path):
        return "a path that leaves the snapshot, or is no path at all"
    return None


def _unsafe_url_path(text: str) -> str | None:
    """Say why *text* may not follow a base URL: it must not change the host, nor climb out of the base's path."""
    path = text.removeprefix("/").partition("?")[0]
    if not path[:1].isalnum() or "\\" in text or any(ord(c) <= 32 or ord(c) > 126 for c in text):
        return "not what may follow a base URL"
    if any(part in (".", "..") for part in unquote(path).split("/")):
        return "an address that leaves its base"
    return None


def _unsafe_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "not an http(s) address"
    return "an address with credentials" if parts.username or parts.password else None


class _Reader:
    """Turns JSON into a :class:`Lock`; every error names the lock's file and the key."""

    def __init__(self, name: str) -> None:
        self._name = name

    def lock(self, data: bytes | str) -> Lock:
        try:
            record = json.loads(data, object_pairs_hook=self._object, parse_constant=self._constant)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise SettingsError(f"{self._name}: not JSON: {e}", hint="`fastload lock` writes it anew") from e
        record = self._mapping(record, "the lock", {"version"})
        version = record["version"]
        if version != VERSION or type(version) is not int:
            raise SettingsError(
                f"{self._name}: version: {version!r} is not {VERSION}, the one that this fastload reads",
                hint="write it anew with `fastload lock`, or install the fastload that wrote it",
            )
        record = self._mapping(record, "the lock", _LOCK_KEYS, allowed=_LOCK_KEYS)
        manifests: dict[tuple[str, str], Manifest] = {}
        for index, item in enumerate(self._list(record, "sources", "")):
            manifest = self._source(item, f"sources[{index}]")
            if (manifest.source, manifest.revision) in manifests:
                self._refuse(f"sources[{index}]", f"{manifest.source} at {manifest.revision} is listed twice")
            manifests[manifest.source, manifest.revision] = manifest
        return Lock(tuple(manifests[key] for key in sorted(manifests)))

    def _source(self, item: Any, key: str) -> Manifest:
        record = self._mapping(item, key, _SOURCE_KEYS - {"url_prefix"}, allowed=_SOURCE_KEYS)
        prefix = self._text(record, "url_prefix", key) if "url_prefix" in record else None
        items = self._list(record, "files", f"{key}.")
        files = [self._file(file, f"{key}.files[{index}]", prefix) for index, file in enumerate(items)]
        paths: set[str] = set()
        for index, file in enumerate(files):
            if file.path in paths:
                self._refuse(f"{key}.files[{index}].path", f"{file.path!r} is listed twice")
            paths.add(file.path)
        for path in paths:
            parents = path.split("/")[:-1]
            clash = next((p for n in range(len(parents)) if (p := "/".join(parents[: n + 1])) in paths), None)
            if clash is not None:
                self._refuse(f"{key}.files", f"{clash!r} is a file and the folder of {path!r}")
        commit, revision = self._text(record, "commit", key), self._text(record, "revision", key)
        if "/" in commit or _unsafe_path(commit):  # it names a folder of the cache
            self._refuse(f"{key}.commit", f"{commit!r} is not a commit")
        if _unsafe_path(revision):
            self._refuse(f"{key}.revision", f"{revision!r} is not a revision")
        return Manifest(
            source=self._text(record, "source", key),
            revision=revision,
            commit=commit,
            endpoint="",
            files=tuple(sorted(files, key=lambda f: f.path)),
        )

    def _file(self, item: Any, key: str, prefix: str | None) -> RemoteFile:
        record = self._mapping(item, key, frozenset({"path", "size", "digest"}), allowed=_FILE_KEYS)
        path = self._text(record, "path", key)
        reason = _unsafe_path(path)
        if reason:
            self._refuse(f"{key}.path", f"{path!r} is {reason}")
        size = record["size"]
        if type(size) is not int or not 0 <= size < 1 << 63:
            self._refuse(f"{key}.size", f"{size!r} is not a number of bytes")
        try:
            digest = Digest.parse(self._text(record, "digest", key))
        except ValueError as e:
            self._refuse(f"{key}.digest", str(e))
        url = self._text(record, "url", key) if "url" in record else None
        if url is not None and (reason := _unsafe_url(url)):
            self._refuse(f"{key}.url", f"{url!r} is {reason}")
        url_path = "" if prefix is None else prefix + quote(path, safe="/")
        url_path = self._text(record, "url_path", key) if "url_path" in record else url_path
        if url_path and (reason := _unsafe_url_path(url_path)):
            self._refuse(f"{key}.url_path", f"{url_path!r} is {reason}")
        return RemoteFile(path, size, digest, url_path, url)

    def _mapping(
        self, value: Any, key: str, needed: Iterable[str], allowed: frozenset[str] | None = None
    ) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self._refuse(key, f"an object is needed, not {type(value).__name__}")
        missing = sorted(set(needed) - value.keys())
        if missing:
            self._refuse(key, f"{missing[0]!r} is missing")
        unknown = sorted(value.keys() - allowed) if allowed is not None else []
        if unknown:
            self._refuse(key, f"{unknown[0]!r} is not a key of a lock")
        return value

    def _list(self, record: Mapping[str, Any], name: str, prefix: str) -> list[Any]:
        value = record[name]
        if not isinstance(value, list):
            self._refuse(f"{prefix}{name}", f"a list is needed, not {type(value).__name__}")
        return value

    def _text(self, record: Mapping[str, Any], name: str, key: str) -> str:
        value = record[name]
        if not isinstance(value, str) or (not value and name != "url_prefix"):
            self._refuse(f"{key}.{name}", f"a text is needed, not {value!r}")
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise SettingsError(f"{self._name}: {twice!r} is given twice in one object")
        return found

    def _constant(self, text: str) -> NoReturn:
        raise SettingsError(f"{self._name}: {text} is not JSON")

    def _refuse(self, key: str, reason: str) -> NoReturn:
        raise SettingsError(f"{self._name}: {key}: {reason}", hint="`fastload lock` writes it anew")
