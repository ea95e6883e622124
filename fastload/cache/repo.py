"""One repository in the cache: where things stand, who may write, and how a verified file gets its name."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from ..errors import SourceError
from ..types import Digest, Manifest, RemoteFile
from . import filesystem, refs, stamps, tree
from .disk import (
    LOCKS,
    check_path,
    disk,
    has_no_symlinks,
    is_in_flight,
    new_file_mode,
    open_lock,
    removed_on_error,
    sync,
    temporary_path,
    with_folder,
)

log = logging.getLogger("fastload")

_COMMIT = re.compile(r"[0-9a-fA-F]{40}")
#: Specified, bford.info/cachedir: the first line; backup tools leave such a folder out.
_CACHEDIR_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# This file is a cache directory tag created by fastload.\n"
)


class RepoCache:
    """One repository in the cache. Thread-safe: the filesystem is the only state; several processes may share it.

    Methods block on the disk, so call them in threads; the coroutines do so themselves.

    Args:
        root: The cache, as ``HF_HUB_CACHE`` names it.
        source: ``org/name``.
        symlinks: Link snapshots to blobs; else, and where the filesystem has no links, snapshots hold the files.
        network: Other machines may write there too; ``None``: as the filesystem's type says.

    Attributes:
        folder: ``models--org--name`` in *root*.
    """

    def __init__(self, root: Path, source: str, *, symlinks: bool = True, network: bool | None = None) -> None:
        check_path(source, "repository name")
        if "--" in source:  # the Hub allows none: it separates the parts of the folder's name
            raise SourceError(f"{source!r} is not a repository name: it may not hold '--'")
        self.root = Path(root).absolute()
        self.source = source
        self.symlinks = symlinks
        name = f"models--{source.replace('/', '--')}"
        self.folder = self.root / name
        self._locks = self.root / ".locks" / name
        self._file_mode: int | None = None
        self._network = network
        self._writer = ""

    def prepare(self) -> None:
        """Make the folders; find out now, not after the download, what files can be made there.

        Raises:
            CacheError: None, or none that processes can share.
        """
        with disk("write to the cache", self.folder):
            for name in ("blobs", "snapshots"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._file_mode = new_file_mode(self.folder / "blobs")
        network = filesystem.is_network(self.folder) if self._network is None else self._network
        locks = filesystem.check_files(self.folder / "blobs")
        self._writer = filesystem.writer_name(network=network, locks=locks)
        with suppress(OSError), open(self.root / "CACHEDIR.TAG", "x") as tag:
            tag.write(_CACHEDIR_TAG)

    # -- places -----------------------------------------------------------------------------------------------------

    def snapshot_path(self, commit: str) -> Path:
        """Return the folder of *commit*, whether it exists or not."""
        check_path(commit, "commit")
        return self.folder / "snapshots" / commit

    def blob_path(self, digest: Digest) -> Path:
        """Return where the bytes of *digest* stand once they are verified."""
        if not digest.value.isalnum():
            raise SourceError(f"{digest.value!r} is not a digest")
        return self.folder / "blobs" / digest.value

    def partial_path(self, digest: Digest) -> Path:
        """Return where the bytes of *digest* arrive: on the same filesystem, under a name that no reader takes."""
        return self._beside(digest, "incomplete")

    def journal_path(self, digest: Digest) -> Path:
        """Return the journal beside the partial file."""
        return self._beside(digest, "journal")

    def _beside(self, digest: Digest, kind: str) -> Path:
        writer = f".{self._writer}" if self._writer else ""
        return self.blob_path(digest).with_name(f"{digest.value}{writer}.fastload.{kind}")

    def lock_path(self, digest: Digest) -> Path:
        """Return the file that whoever writes this blob locks, huggingface_hub too."""
        return self._locks / f"{self.blob_path(digest).name}.lock"

    def _pointer(self, commit: str, path: str) -> Path:
        check_path(path)
        return self.snapshot_path(commit) / path

    def find(self, commit: str, file: RemoteFile) -> Path | None:
        """Return a file of the right size, in the snapshot or as a blob of any commit; its bytes are not looked at."""
        places = [self._pointer(commit, file.path)]
        if file.digest is not None:
            places.append(self.blob_path(file.digest))
        for place in places:
            with suppress(OSError):
                status = os.stat(place)  # first: most often there is nothing, and that is all there is to ask
                if stat.S_ISREG(status.st_mode) and status.st_size == file.size and not is_in_flight(place):
                    return place
        return None

    # -- one writer a blob --------------------------------------------------------------------------------------------

    def try_lock(self, digest: Digest) -> int | None:
        """Become the only writer of *digest* among all processes, without waiting.

        Returns:
            A descriptor that holds the lock until :meth:`unlock` or the end of the process; ``None``: somebody has it.

        Raises:
            CacheError: Not writable, or a filesystem without flock.
        """
        path = self.lock_path(digest)
        with disk("lock", path):
            fd = with_folder(path, lambda: open_lock(path))
            LOCKS.add(fd)
            held = False
            try:
                # Some filesystems say EACCES, not EAGAIN (fcntl(2) allows both). And somebody may have removed the file
                # in between: what is locked then guards nothing.
                with suppress(BlockingIOError, PermissionError, FileNotFoundError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = os.path.samestat(os.fstat(fd), os.stat(path))
            finally:
                if not held:
                    LOCKS.discard(fd)
                    os.close(fd)
        return fd if held else None

    def unlock(self, fd: int) -> None:
        """Give back what :meth:`try_lock` returned; the lock file stays, as everybody else's does.

        Without effect in a process that was forked meanwhile: the lock is its parent's.
        """
        if fd not in LOCKS:
            return
        try:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # not close() alone: somebody else may hold a copy
        finally:
            LOCKS.discard(fd)
            os.close(fd)

    # -- putting files into snapshots ---------------------------------------------------------------------------------

    def publish(self, digest: Digest, commit: str, paths: Sequence[str]) -> dict[str, Path]:
        """Give the verified partial file its final name and let the snapshot show it at *paths*.

        The caller holds the lock and removes the journal afterwards. A blob that is there already is replaced.

        Returns:
            Where each path stands now.

        Raises:
            SourceError: A path is refused; nothing was written.
            CacheError: The disk refused; the partial file, or the blob, is still whole.
        """
        pointers = {path: self._pointer(commit, path) for path in paths}
        partial, blob = self.partial_path(digest), self.blob_path(digest)
        with disk("publish", blob):
            shared = os.path.lexists(blob)  # then other snapshots may link to it
            with suppress(OSError):  # a mount without modes is still a cache
                if self._file_mode is None:
                    self._file_mode = new_file_mode(self.folder / "blobs")
                os.chmod(partial, self._file_mode)
            os.replace(partial, blob)
            home = blob
            for pointer in pointers.values():
                if self._show(home, pointer, move=home is blob and not shared):
                    home = pointer
        return pointers

    def link(self, commit: str, path: str, digest: Digest) -> Path:
        """Let the snapshot show a blob that is there already; harmless when it does.

        Raises:
            CacheError: The disk refused.
        """
        pointer = self._pointer(commit, path)
        with disk("link", pointer):
            self._show(self.blob_path(digest), pointer, move=False)
        return pointer

    def _show(self, blob: Path, pointer: Path, *, move: bool) -> bool:
        """Link *pointer* to *blob*, or copy or move it there; tell whether it was moved."""
        if self.symlinks and with_folder(pointer, lambda: self._symlink(blob, pointer)):
            return False
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if move:
            os.replace(blob, pointer)
            return True
        if pointer.exists() and pointer.samefile(blob):
            return False
        temporary = temporary_path(self.folder / "blobs")
        with removed_on_error(temporary):
            shutil.copyfile(blob, temporary)
            status = os.stat(blob)
            times_ns = (status.st_atime_ns, status.st_mtime_ns)
            os.utime(temporary, ns=times_ns)  # so that the stamp of the blob holds for the copy
            os.replace(temporary, pointer)
        return False

    def _symlink(self, blob: Path, pointer: Path) -> bool:
        target = os.path.relpath(blob, pointer.parent)
        try:
            os.symlink(target, pointer)
        except FileExistsError:
            if pointer.is_symlink() and os.readlink(pointer) == target:
                return True
            temporary = temporary_path(self.folder / "blobs")
            with removed_on_error(temporary):
                os.symlink(target, temporary)
                os.replace(temporary, pointer)
        except OSError as e:
            if not has_no_symlinks(e):
                raise
            log.warning("%s has no symbolic links: snapshots hold the files themselves", self.root)
            self.symlinks = False
            return False
        return True

    def discard(self, digest: Digest) -> None:
        """Throw away what has arrived of *digest*, and its journal."""
        with disk("discard", self.partial_path(digest)):
            self.partial_path(digest).unlink(missing_ok=True)
            self.journal_path(digest).unlink(missing_ok=True)

    def sync(self, path: Path) -> None:
        """Bring *path*, its bytes and its name, to the disk; returns when a power cut cannot take them any more."""
        with disk("sync", path):
            sync(path)

    # -- revisions, listings, absences --------------------------------------------------------------------------------

    async def write_ref(self, revision: str, commit: str, *, executor: Executor | None = None) -> None:
        """Remember that *revision* is *commit*. Call it once the snapshot exists: a ref to nothing counts as damage.

        Args:
            executor: Threads for the disk; ``None``: the loop's own.
        """
        check_path(revision, "revision")
        if revision != commit:
            await refs.write_ref(self.folder, revision, commit, executor)

    def read_ref(self, revision: str | None) -> str | None:
        """Return the commit that *revision* (``None``: ``main``) was when it was last asked for; a commit is itself."""
        revision = revision or "main"
        check_path(revision, "revision")
        if _COMMIT.fullmatch(revision):
            return revision
        return refs.read_ref(self.folder, revision)

    async def write_no_exist(self, commit: str, paths: Iterable[str], *, executor: Executor | None = None) -> None:
        """Remember that *commit* has no file at *paths*, so that nobody asks again."""
        check_path(commit, "commit")
        for path in paths:
            check_path(path)
            await refs.write_no_exist(self.folder, commit, path, executor)

    def known_missing(self, commit: str, path: str) -> bool:
        """Tell whether the hub once said that *commit* has no such file."""
        check_path(commit, "commit")
        check_path(path)
        return (self.folder / ".no_exist" / commit / path).is_file()

    def lacks(self, commit: str, path: str) -> bool:
        """Tell whether it is known that *commit* has no such file: from the hub's answer, or from its whole listing."""
        if self.known_missing(commit, path):
            return True
        listed = tree.read_tree(self.folder, commit)
        return listed is not None and all(file.path != path for file in listed)

    def write_tree(self, manifest: Manifest) -> None:
        """Keep the listing of a whole commit, which makes huggingface_hub's check for completeness work offline.

        Call it with all that the source lists, never with a selection: huggingface_hub asks no hub once it is there.
        Without effect where it is there, where the commit is none of Git's, or a file has no digest; a disk that
        refuses is warned of by huggingface_hub, not raised.
        """
        if _COMMIT.fullmatch(manifest.commit) and tree.read_tree(self.folder, manifest.commit) is None:
            tree.write_tree(self.folder, manifest)

    def read_tree(
        self, source: str, commit: str, revision: str, endpoint: str, *, whole: bool = False
    ) -> Manifest | None:
        """Return what the cache knows *commit* to hold, with exact sizes and digests, for a load without network.

        From the commit's listing; without one (unless *whole*), from the links of its snapshot, if all of them lead to
        blobs that are named by digest: then it is what is there, which need not be all of the commit.
        """
        check_path(commit, "commit")
        files = tree.read_tree(self.folder, commit)
        if files is None and not whole:
            files = tree.linked_files(self.snapshot_path(commit))
        if files is None:
            return None
        prefix = f"/{source}/resolve/{commit}/"
        placed = tuple(replace(file, url_path=prefix + quote(file.path)) for file in files)
        return Manifest(source, revision, commit, endpoint, placed)

    # -- what was hashed here -----------------------------------------------------------------------------------------

    def is_trusted(self, digest: Digest, path: Path) -> bool:
        """Tell whether *path* is what was hashed here as *digest*, so that it need not be hashed again.

        It is if size and time of change are the same, and it was synced or the machine has not started since.
        """
        return stamps.is_trusted(self.folder, digest, path)

    def stamp(self, digest: Digest, path: Path, *, synced: bool) -> None:
        """Remember that *path* was hashed and is *digest*; *synced*: after :meth:`sync`. Never raises."""
        stamps.write_stamp(self.folder, digest, path, synced=synced)
