"""What the filesystem of the cache can be trusted with: whether other machines write there, whether its locks hold."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import socket
from pathlib import Path

from .disk import disk, temporary_path
from .stamps import boot_id

#: Types in mountinfo of filesystems that other machines may have mounted too.
_NETWORK = frozenset(
    "9p afs beegfs ceph cifs coda fuse gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs pvfs2 smb3 smbfs"
    " vboxsf virtiofs wekafs".split()
)


def is_network(path: Path, mounts: str | None = None) -> bool:
    """Tell whether *path* lies on a network filesystem, or on one in user space (FUSE), which mostly is one.

    Args:
        mounts: Read instead of ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)).
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:  # not Linux
            return False
    real = os.path.realpath(path)
    longest, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = fields[4].encode().decode("unicode_escape")  # a space in a name is written \040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:  # of mounts over each other the last one holds
            longest, kind = len(point), after.split()[0]
    return kind in _NETWORK or kind.startswith("fuse.")


def check_files(folder: Path) -> bool:
    """Try in *folder* what a transfer needs of its files; tell whether a lock keeps others out.

    On some network filesystems every lock is granted, to everybody.

    Raises:
        CacheError: No files can be made there, or none that several processes can map.
    """
    probe = temporary_path(folder)
    with disk("make files in", folder):
        first = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(first, mmap.PAGESIZE)
            with mmap.mmap(first, mmap.PAGESIZE):
                pass
            return _excludes(first, probe)
        finally:
            os.close(first)
            os.unlink(probe)


def _excludes(first: int, path: Path) -> bool:
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # none at all: trying to lock a blob says so
        return True
    second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    finally:
        os.close(second)
    return False


def writer_name(*, network: bool, locks: bool) -> str:
    """Return what must stand in the names of partial files so that no two writers ever share one.

    A lock that everybody is granted, or that other machines do not see, must not let one writer change what another has
    verified. On a local disk locks do what they should: nothing need be added, and whoever comes next can go on.

    Args:
        network: Other machines may write there. Their locks are not seen, so each machine has its own partial files.
        locks: They hold at least between processes of this machine; else each process has its own.
    """
    if not locks:
        return os.urandom(8).hex()
    if not network:
        return ""
    return hashlib.sha256(f"{socket.gethostname()} {boot_id() or ''}".encode()).hexdigest()[:16]
