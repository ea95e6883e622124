"""A folder from which unchanged ``from_pretrained`` code can load while the weights still arrive."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .cache import in_flight_link
from .errors import CacheError, FastloadError
from .router import Inode, Route, routed
from .supply import Supply
from .transfer import Transfer
from .types import ByteRange, Snapshot
from .weightfile import WeightFile

#: A file system in memory on Linux; the default one's /tmp may be on a disk.
_MEMORY, _DEFAULT = Path("/dev/shm"), "/tmp"
#: Guessed: descriptors from here on are seldom taken, so that the same link in another process leads nowhere.
FIRST_FD = 900


@contextmanager
def served(
    transfer: Transfer, weights: Mapping[str, WeightFile], supply: Supply, *, defer: bool = False
) -> Iterator[Path]:
    """Yield the snapshot itself where it is complete, else a temporary folder that looks like it.

    In that folder every file is a link: to the verified file, or, for a safetensors file in flight, to a descriptor of
    this process, which ``safe_open`` knows for the length of the block. All other files are waited for first.

    Args:
        defer: Serve complete files through ``safe_open`` too, and give stand-ins of tensors that are read to the CPU.

    Raises:
        CacheError: The temporary folder cannot be made.
        FastloadError: The transfer failed.
    """
    snapshot = transfer.wait_manifest()
    streamed = [path for path in weights if path.endswith(".safetensors")]
    transfer.wait_files(path for path in transfer.files if path not in set(streamed))
    if all(transfer.files[path].ready for path in streamed):
        if not defer:
            yield snapshot.path
            return
        with routed({inode(weights[path].view.open()): Route(weights[path], supply, defer) for path in streamed}):
            yield snapshot.path
        return
    with ExitStack() as stack:
        folder, table = _laid_out(stack, transfer, weights, supply, defer)
        stack.enter_context(routed(table))
        for path in streamed:  # at once: frameworks read the heads of all files before the first tensor, one by one
            transfer.files[path].ask(ByteRange(0, 1))
        yield folder


def _laid_out(
    stack: ExitStack, transfer: Transfer, weights: Mapping[str, WeightFile], supply: Supply, defer: bool
) -> tuple[Path, dict[Inode, Route]]:
    """Make the folder of links; *stack* removes it. Return it, and what its files in flight are.

    In memory, unless temporary files go elsewhere than to /tmp: to remove links from a disk takes 3 to 22 ms beside a
    transfer that is being synced (measured, ext4), and the model waits. Where that memory is full: on the disk.
    """
    refusal: OSError | None = None
    for place in (_MEMORY, None) if tempfile.gettempdir() == _DEFAULT else (None,):
        with ExitStack() as attempt:
            try:
                root = Path(tempfile.mkdtemp(prefix="fastload-", dir=place))
                attempt.callback(shutil.rmtree, root, ignore_errors=True)
                folder = root / folder_name(transfer.wait_manifest())
                table = _fill(folder, attempt, transfer, weights, supply, defer)
            except FastloadError:
                raise
            except OSError as e:
                refusal = e
            else:
                stack.push(attempt.pop_all())
                return folder, table
    raise CacheError(f"cannot make a temporary folder to load from: {refusal}", hint="set TMPDIR") from refusal


def _fill(
    folder: Path,
    stack: ExitStack,
    transfer: Transfer,
    weights: Mapping[str, WeightFile],
    supply: Supply,
    defer: bool,
) -> dict[Inode, Route]:
    snapshot = transfer.wait_manifest()
    table: dict[Inode, Route] = {}
    for path, view in transfer.files.items():
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        streamed = path in weights and path.endswith(".safetensors")
        if streamed and not view.ready:
            table[_place(weights[path], link, stack)] = Route(weights[path], supply, defer)
        else:
            link.symlink_to(os.path.abspath(snapshot.path / path))
            if streamed and defer:
                table[inode(view.open())] = Route(weights[path], supply, defer)
    return table


def folder_name(snapshot: Snapshot) -> str:
    """Return the end of *snapshot*'s path in a Hugging Face cache, where frameworks look for the commit."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", snapshot.source.strip("/"))
    return f"models--{name}/snapshots/{snapshot.commit}"


def _place(file: WeightFile, link: Path, stack: ExitStack) -> Inode:
    """Put something at *link* that stands for *file*, and return what it is."""
    if file.view.known:
        fd = duplicate(file.view.open())
        stack.callback(os.close, fd)
        link.symlink_to(in_flight_link(fd))
    else:  # nothing has landed yet: zeros, so that a reader who goes round safe_open fails
        fd = os.open(link, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, fd)
        os.ftruncate(fd, file.view.size)
    return inode(fd)


def inode(fd: int) -> Inode:
    """Return what the file behind *fd* is."""
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


def duplicate(fd: int, first: int = FIRST_FD) -> int:
    """Return another descriptor of the same file, one that a link in another process is unlikely to mean.

    Args:
        first: The lowest number that it may have.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first)
    except OSError:  # the limit on descriptors is lower, or few are left up there
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
