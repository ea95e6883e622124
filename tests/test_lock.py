"""A lock reads what it wrote, and refuses everything that it would not have written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fastload.errors import NotFoundError, SettingsError, UnsupportedSourceError
from fastload.lock import Lock
from fastload.types import Digest, Manifest, RemoteFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA256 = Digest("sha256", "ab" * 32)
SHA1 = Digest("git-sha1", "cd" * 20)


def remote(path: str, size: int = 10, digest: Digest | None = SHA1, **rest: str) -> RemoteFile:
    return RemoteFile(path, size, digest, url_path=f"org/model/resolve/{COMMIT}/{path.replace(' ', '%20')}", **rest)


MANIFEST = Manifest(
    source="org/model",
    revision="main",
    commit=COMMIT,
    endpoint="https://hub.example",
    files=(remote("model.safetensors", 90_868_376, SHA256), remote("config.json"), remote("a folder/x.txt")),
)
LOCK = Lock().with_manifest(MANIFEST)


def test_a_lock_reads_what_it_wrote(tmp_path: Path):
    LOCK.write(tmp_path / "fastload.lock")
    again = Lock.read(tmp_path / "fastload.lock")
    assert again == LOCK
    manifest = again.manifest("org/model", "main", endpoint="https://hub.example")
    assert manifest == replace(MANIFEST, files=tuple(sorted(MANIFEST.files, key=lambda f: f.path)))


def test_the_text_is_the_same_for_the_same_content_and_one_line_a_file():
    backwards = Lock().with_manifest(replace(MANIFEST, files=MANIFEST.files[::-1]))
    assert backwards.text() == LOCK.text()
    lines = LOCK.text().splitlines()
    assert sum('"path"' in line for line in lines) == len(MANIFEST.files)
    assert LOCK.text().endswith("}\n")


def test_a_new_commit_changes_two_lines_and_those_of_changed_files():
    """Addresses share a prefix that is written once, so that a diff shows the files that differ."""
    moved = tuple(replace(f, url_path=f.url_path.replace(COMMIT, "f" * 40)) for f in MANIFEST.files)
    other = Lock().with_manifest(replace(MANIFEST, commit="f" * 40, files=moved))
    changed = [a for a, b in zip(LOCK.text().splitlines(), other.text().splitlines(), strict=True) if a != b]
    assert [line.split('"')[1] for line in changed] == ["commit", "url_prefix"]


def test_entries_are_added_replaced_and_sorted():
    two = LOCK.with_manifest(replace(MANIFEST, source="org/another")).with_manifest(replace(MANIFEST, commit="e" * 40))
    assert [(m.source, m.commit) for m in two.manifests] == [("org/another", COMMIT), ("org/model", "e" * 40)]


@pytest.mark.parametrize(
    ("revision", "found"),
    [(None, True), ("main", True), (COMMIT, True), ("v1", False), ("0" * 40, False)],
)
def test_a_manifest_is_found_by_revision_or_commit(revision: str | None, found: bool):
    assert (LOCK.manifest("org/model", revision) is not None) is found
    assert LOCK.manifest("org/other", revision) is None


def test_no_revision_means_the_only_one_locked_else_main():
    tagged = Lock().with_manifest(replace(MANIFEST, revision="v1", commit="1" * 40))
    assert tagged.manifest("org/model").commit == "1" * 40
    both = tagged.with_manifest(MANIFEST)
    assert both.manifest("org/model").commit == COMMIT
    neither = tagged.with_manifest(replace(MANIFEST, revision="v2", commit="2" * 40))
    assert neither.manifest("org/model") is None


def test_a_lock_does_not_choose_where_the_token_goes():
    """Somebody else's lock file must not name the endpoint."""
    assert LOCK.manifest("org/model").endpoint == ""
    assert "hub.example" not in LOCK.text()
    record = LOCK.to_record()
    record["sources"][0]["endpoint"] = "https://evil.example"
    with pytest.raises(SettingsError, match="'endpoint' is not a key of a lock"):
        Lock.parse(json.dumps(record))


def test_addresses_of_their_own_are_kept():
    files = (
        RemoteFile("a.bin", 1, SHA256, url="https://cdn.example/x?y=1"),
        RemoteFile("b.bin", 1, SHA256, "elsewhere/b"),
    )
    lock = Lock().with_manifest(replace(MANIFEST, files=files))
    assert Lock.parse(lock.text()).manifest("org/model").files == files


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (remote("w.bin", digest=None), "no digest"),
        (remote("../w.bin"), "leaves the snapshot"),
        (replace(remote("w.bin"), url="https://user:secret@h/w"), "credentials"),
        (replace(remote("w.bin"), url="file:///etc/passwd"), "not an http"),
    ],
)
def test_what_could_not_be_read_back_is_not_locked(file: RemoteFile, reason: str):
    with pytest.raises(UnsupportedSourceError, match=reason) as e:
        Lock().with_manifest(replace(MANIFEST, files=(file,)))
    assert "secret" not in str(e.value)


def test_a_folder_of_this_machine_cannot_be_locked(tmp_path: Path):
    with pytest.raises(UnsupportedSourceError, match="nothing to lock"):
        Lock().with_manifest(replace(MANIFEST, local=tmp_path))


def change(record: dict, path: str, value: object) -> None:
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    at: object = record
    for step in parents:
        at = at[step]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value


FILE = "sources.0.files.0"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("version", 2, "version: 2"),
        ("version", "1", "version"),
        ("version", True, "version"),
        ("version", KeyError, "'version' is missing"),
        ("sources", KeyError, "'sources' is missing"),
        ("sources", {}, "sources: a list"),
        ("sources.0", [], r"sources\[0\]"),
        ("sources.0.comit", "x", "'comit' is not a key"),
        ("sources.0.source", "", r"sources\[0\].source"),
        ("sources.0.revision", None, r"sources\[0\].revision"),
        ("sources.0.revision", "../../x", "not a revision"),
        ("sources.0.commit", "../x", "not a commit"),
        ("sources.0.commit", "a/b", "not a commit"),
        ("sources.0.files", None, r"sources\[0\].files"),
        (f"{FILE}.path", KeyError, "'path' is missing"),
        (f"{FILE}.path", "/etc/passwd", r"files\[0\].path"),
        (f"{FILE}.path", "a/../../b", r"files\[0\].path"),
        (f"{FILE}.path", "./a", r"files\[0\].path"),
        (f"{FILE}.path", "a//b", r"files\[0\].path"),
        (f"{FILE}.path", "a\\b", r"files\[0\].path"),
        (f"{FILE}.path", "C:/b", r"files\[0\].path"),
        (f"{FILE}.path", "a\0b", r"files\[0\].path"),
        (f"{FILE}.path", "config.json", "listed twice"),
        (f"{FILE}.path", "config.json/x", "a file and the folder"),
        (f"{FILE}.size", -1, r"files\[0\].size"),
        (f"{FILE}.size", 1.5, r"files\[0\].size"),
        (f"{FILE}.size", True, r"files\[0\].size"),
        (f"{FILE}.size", "10", r"files\[0\].size"),
        (f"{FILE}.digest", "md5:00", r"files\[0\].digest"),
        (f"{FILE}.digest", "sha256:" + "zz" * 32, r"files\[0\].digest"),
        (f"{FILE}.digest", None, r"files\[0\].digest"),
        (f"{FILE}.url", "ftp://h/x", r"files\[0\].url"),
        (f"{FILE}.url", "https://u:p@h/x", r"files\[0\].url"),
        (f"{FILE}.url_path", "//evil.example/x", r"files\[0\].url_path"),  # another host, after a base URL
        (f"{FILE}.url_path", "@evil.example/x", r"files\[0\].url_path"),
        (f"{FILE}.url_path", "org/%2e%2e/x", r"files\[0\].url_path"),
        ("sources.0.url_prefix", "../../other/", r"files\[0\].url_path"),
    ],
)
def test_a_damaged_lock_is_refused_and_the_key_is_named(path: str, value: object, named: str):
    record = LOCK.to_record()
    change(record, path, value)
    with pytest.raises(SettingsError, match=named) as e:
        Lock.parse(json.dumps(record), name="some.lock")
    assert str(e.value).startswith("some.lock: ")
    assert e.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'{"version": 1, "version": 1, "sources": []}',
        b'{"version": NaN}',
    ],
)
def test_what_is_not_json_is_refused(data: bytes):
    with pytest.raises(SettingsError):
        Lock.parse(data)


def test_a_source_listed_twice_is_refused():
    record = LOCK.to_record()
    record["sources"] *= 2
    with pytest.raises(SettingsError, match=r"sources\[1\]: org/model at main is listed twice"):
        Lock.parse(json.dumps(record))


def test_an_empty_lock_reads_back(tmp_path: Path):
    Lock().write(tmp_path / "l")
    assert Lock.read(tmp_path / "l") == Lock()


def test_a_missing_lock_says_how_to_write_one(tmp_path: Path):
    with pytest.raises(NotFoundError) as e:
        Lock.read(tmp_path / "fastload.lock")
    assert "fastload lock" in (e.value.hint or "")


def test_a_folder_is_not_a_lock(tmp_path: Path):
    with pytest.raises(SettingsError, match="cannot be read"):
        Lock.read(tmp_path)


def test_writing_is_all_or_nothing(tmp_path: Path):
    target = tmp_path / "fastload.lock"
    LOCK.write(target)
    before = target.read_text()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError, match="cannot be written"):
        Lock().write(tmp_path / "folder")
    with pytest.raises(SettingsError, match="cannot be written"):
        Lock().write(tmp_path / "missing" / "fastload.lock")
    assert target.read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["fastload.lock", "folder"]


def test_a_link_to_a_lock_stays_a_link(tmp_path: Path):
    real = tmp_path / "real.lock"
    real.write_text("")
    link = tmp_path / "fastload.lock"
    link.symlink_to(real)
    LOCK.write(link)
    assert link.is_symlink()
    assert Lock.read(real) == LOCK
