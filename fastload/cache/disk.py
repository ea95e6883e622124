"""Single steps on the disk, and the errors that they end in."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ..errors import CacheError, SourceError

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
#: Specified, symlink(2): EPERM where the filesystem has none; FUSE mounts of object stores answer with the others.
_NO_SYMLINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_OWN_FDS = "/proc/self/fd/"
#: Guessed: a tenth of a second of a slow disk.
_STEP_BYTES = 16 << 20
#: Specified, sync_file_range(2): WAIT_BEFORE | WRITE | WAIT_AFTER, and what it says where it cannot.
_WRITE_AND_WAIT = 7
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EPERM}
#: Specified: huggingface_hub lets a group share its locks.
_LOCK_MODE = 0o664


def check_path(path: str, what: str = "file name") -> None:
    """Refuse a path that could leave the folder it is joined to, here or on Windows, or that git itself cannot hold.

    Args:
        path: Relative, with ``/``, as a source lists it.
        what: What the error calls it.

    Raises:
        SourceError: It is absolute or empty, or has a part that is ``.``, ``..``, empty, a drive, or holds a backslash,
            a control character or half a surrogate pair.
    """
    bad_part = any(part in ("", ".", "..") or part[1:2] == ":" for part in path.split("/"))
    if bad_part or "\\" in path or any(c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in path):
        raise SourceError(
            f"refused the {what} {path!r}: it could leave the cache, or is no name at all",
            hint="ask the owner of the repository to rename it" if what == "file name" else None,
        )


def cache_error(error: OSError, doing: str, path: Path | str) -> CacheError:
    """Return the :class:`CacheError` that says what *error* kept from being done, and what helps; ``errno`` is kept."""
    other = "choose another cache_dir (FASTLOAD_CACHE_DIR or HF_HUB_CACHE)"
    hint = None
    if error.errno in _FULL:
        hint = f"free some space ({_free_bytes(Path(path))} bytes are left there) or {other}"
    elif error.errno in _DENIED:
        hint = f"make it writable for user {os.geteuid()} or {other}"
    elif error.errno in _NO_FLOCK and doing == "lock":
        hint = f"this filesystem has no locks (flock): {other}"
    code = errno.errorcode.get(error.errno or 0, "no errno")
    result = CacheError(f"cannot {doing} {path}: {error.strerror or error} [{code}]", hint=hint)
    result.errno = error.errno
    return result


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


@contextmanager
def disk(doing: str, path: Path) -> Iterator[None]:
    """Turn the OSError of the block into a :class:`CacheError` that says ``cannot {doing} {path}``."""
    try:
        yield
    except CacheError:
        raise
    except OSError as e:
        raise cache_error(e, doing, path) from e


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove the temporary file *path* if the block, which makes it and gives it its final name, raises."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def with_folder(path: Path, make: Callable[[], T]) -> T:
    """Return what *make* returns, which makes *path*; where the folder of that is missing, make it first.

    Nearly always it is there: of 1,000 small files only the first finds it missing.
    """
    try:
        return make()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return make()


def open_lock(path: Path) -> int:
    """Open the lock file *path*, made with the mode that huggingface_hub gives it; return the descriptor."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, _LOCK_MODE)
    except FileExistsError:
        return os.open(path, flags)
    with suppress(PermissionError):
        os.fchmod(fd, _LOCK_MODE)  # the umask took the group's right to write
    return fd


def new_file_mode(folder: Path) -> int:
    """Return the mode that a new file gets in *folder*.

    Made by making one: the umask belongs to the whole process, so a thread cannot look at it, and a folder's default
    ACL overrides it.
    """
    probe = temporary_path(folder)
    fd = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
        os.unlink(probe)


#: Descriptors of this process that hold a lock, or are about to.
LOCKS: set[int] = set()


def _forked() -> None:
    """A copy would keep the lock when its owner is killed, and nobody could go on with the file."""
    while LOCKS:
        with suppress(OSError):
            os.close(LOCKS.pop())  # closed, not unlocked: that would take it from the parent


os.register_at_fork(after_in_child=_forked)


def temporary_path(folder: Path) -> Path:
    """Return a free name in *folder*; among blobs, huggingface_hub prunes what a crash leaves under such a name."""
    return folder / f"{os.urandom(8).hex()}.incomplete"


def in_flight_link(fd: int) -> str:
    """Return what a link must hold to stand for the file behind *fd*, in this process alone."""
    return f"{_OWN_FDS}{fd}"


def is_in_flight(path: Path) -> bool:
    """Tell whether *path* is such a link: whatever it leads to is not verified."""
    return in_flight_fd(path) is not None


def in_flight_fd(path: Path) -> int | None:
    """Return the descriptor that *path* is such a link to, in the process that put it there; ``None``: it is none."""
    try:
        target = os.readlink(path)
    except OSError:
        return None
    number = target.removeprefix(_OWN_FDS)
    return int(number) if number != target and number.isdecimal() else None


def has_no_symlinks(error: OSError) -> bool:
    """Tell whether *error* says that the filesystem knows no symbolic links."""
    return error.errno in _NO_SYMLINKS


def sync(path: Path) -> None:
    """Bring the bytes of *path* and its name to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _write_out(fd)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    for folder in {path.parent, Path(os.path.realpath(path)).parent}:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _write_out(fd: int) -> None:
    """Have the disk write what the file holds, a step at a time, where the system can.

    A process cannot end while one of its threads waits for the disk: it shall wait for a step, not for gigabytes.
    """
    size = os.fstat(fd).st_size
    if size <= _STEP_BYTES or sys.platform != "linux":
        return
    try:
        import ctypes  # costs milliseconds, and only large files need it
    except ImportError:  # a Python that was built without
        return
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is None:
        return
    for start in range(0, size, _STEP_BYTES):
        if call(fd, ctypes.c_int64(start), ctypes.c_int64(_STEP_BYTES), _WRITE_AND_WAIT):
            code = ctypes.get_errno()
            if code in _CANNOT:
                return
            raise OSError(code, os.strerror(code))  # it will not be reported a second time, by fdatasync
