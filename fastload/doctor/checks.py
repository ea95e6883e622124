"""What commonly breaks a load, looked for one by one. Each check leaves everything as it was."""

from __future__ import annotations

import fcntl
import shutil
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from urllib.request import getproxies

from .. import plugins
from ..access import Access
from ..errors import SettingsError
from ..resolve import read_token
from ..settings import Settings
from ..standby import executable
from . import limits
from .bounds import size

#: Filesystems that a network stands behind: every stat takes a round trip, and locks may not reach other machines.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "glusterfs", "9p", "afs", "beegfs", "virtiofs"}
_IN_MEMORY = {"tmpfs", "ramfs"}
_CONTAINER = {"overlay", "aufs"}
# Reasoned: connections, one file and journal a shard, pipes and libraries, twice over.
_FILES = 256
# Reasoned: the ring, the engine's process and the buffers of sockets.
_BESIDE_BYTES = 512 << 20
_DISTRIBUTIONS = ("fastload-weights", "aiohttp", "huggingface_hub", "safetensors", "torch", "transformers", "diffusers")
_NEEDED = _DISTRIBUTIONS[:4]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at and found.

    Attributes:
        state: ``ok``, ``note`` (works, with a loss that may be meant) or ``broken``.
        hint: What to do about it; "" where nothing is to be done.
    """

    name: str
    state: str
    text: str
    hint: str = ""


def on_this_machine(settings: Settings, missing_bytes: int) -> Iterator[Check]:
    """Yield the checks that need no network.

    Args:
        missing_bytes: What a load would add to the cache.
    """
    yield versions()
    yield child(settings)
    yield from cache(settings, missing_bytes)
    yield memory(missing_bytes)
    yield open_files()
    yield from plugin_states(settings)
    yield token(settings)
    yield from network_settings(settings)


def versions() -> Check:
    """Look at what is installed."""
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    python = ".".join(map(str, sys.version_info[:3]))
    text = ", ".join([f"Python {python}", *(f"{name} {version}" for name, version in found.items())])
    lacking = [name for name in _NEEDED[1:] if name not in found]
    if lacking:
        return Check("versions", "broken", f"{text}; missing: {', '.join(lacking)}", "install fastload again")
    if "torch" not in found:
        return Check("versions", "note", f"{text}; no torch", "prefetch needs none; load and load_tensors do")
    return Check("versions", "ok", text)


def child(settings: Settings) -> Check:
    """Look whether a transfer can run in a process of its own."""
    if not settings.process:
        origin = settings.origins.get("process", "default")
        hint = "beside a busy Python program a thread gets a fraction of the link"
        return Check("transfer process", "note", f"off (process=False, {origin}): transfers run in a thread", hint)
    if executable() is None:
        return Check("transfer process", "note", f"{sys.executable!r} cannot be run: transfers run in a thread")
    return Check("transfer process", "ok", "a child of this Python")


# -- the cache --------------------------------------------------------------------------------------------------------


def cache(settings: Settings, missing_bytes: int) -> Iterator[Check]:
    """Look at the cache folder and what its filesystem can do; a folder that is missing is not made."""
    root = settings.cache_dir
    there = nearest(root)
    origin = settings.origins.get("cache_dir", "default")
    text = f"{root} ({origin})" + ("" if there == root else f", to be made in {there}")
    elsewhere = "choose another cache_dir (FASTLOAD_CACHE_DIR or HF_HUB_CACHE); until then loads use a temporary folder"
    try:
        with TemporaryDirectory(dir=there, prefix=".fastload-doctor-") as name:
            abilities = list(_abilities(Path(name), settings))
    except OSError as e:
        yield Check("cache folder", "broken", f"{text}: {e.strerror or e}", elsewhere)
        return
    yield Check("cache folder", "ok", f"{text}: can be written")
    yield _space(there, missing_bytes)
    yield _filesystem(there)
    yield from abilities


def nearest(folder: Path) -> Path:
    """Return *folder*, or the nearest path above it that is there."""
    return next(f for f in (folder, *folder.absolute().parents) if f.exists())


def _space(folder: Path, missing_bytes: int) -> Check:
    free = shutil.disk_usage(folder).free
    text = f"{size(free)} free"
    if missing_bytes > free:
        hint = "free some, or choose another cache_dir; what has landed by then is kept"
        return Check("free space", "broken", f"{text}, {size(missing_bytes)} needed", hint)
    return Check("free space", "ok", text + (f", {size(missing_bytes)} needed" if missing_bytes else ""))


def _filesystem(folder: Path) -> Check:
    kind = filesystem(folder, Path("/proc/mounts").read_text())
    if kind in _NETWORK or kind.startswith("fuse"):
        hint = "a cache_dir on a disk of this machine is faster, and single flight needs locks that all can see"
        return Check("filesystem", "note", f"{kind}: over a network", hint)
    if kind in _IN_MEMORY:
        return Check("filesystem", "note", f"{kind}: in memory", "the cache takes as much memory as the models in it")
    if kind in _CONTAINER:
        hint = "it goes with the container: mount a volume there, or fetch the model when the image is built"
        return Check("filesystem", "note", f"{kind}: the container's own layer", hint)
    return Check("filesystem", "ok", kind or "unknown")


def filesystem(folder: Path, mounts: str) -> str:
    """Return the type of the filesystem that *folder* is on; "" where *mounts* (/proc/mounts) does not tell."""
    resolved, found = folder.resolve(), ("", "")
    for line in mounts.splitlines():
        point, kind = line.split()[1:3]
        point = point.replace("\\040", " ")
        if resolved.is_relative_to(point) and len(point) >= len(found[0]):
            found = point, kind
    return found[1]


def _abilities(folder: Path, settings: Settings) -> Iterator[Check]:
    """Try in *folder*, which is new and ours, what the cache does."""
    yield _locks(folder / "lock")
    if not settings.symlinks:
        origin = settings.origins.get("symlinks", "default")
        yield Check("symbolic links", "note", f"off ({origin}): files of two commits are stored twice")
        return
    try:
        (folder / "link").symlink_to("lock")
        yield Check("symbolic links", "ok", "work")
    except OSError as e:
        yield Check(
            "symbolic links", "note", f"{e.strerror}: files are moved into the snapshot", "nothing is lost by it"
        )


def _locks(path: Path) -> Check:
    with open(path, "wb") as one, open(path, "rb") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            hint = "processes on one machine would each download; choose another cache_dir"
            return Check("locks", "broken", f"flock: {e.strerror}", hint)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Check("locks", "ok", "work")
    hint = "two processes would write the same file; choose another cache_dir"
    return Check("locks", "broken", "flock lets two holders in", hint)


# -- this process -----------------------------------------------------------------------------------------------------


def memory(missing_bytes: int) -> Check:
    """Look whether the files, the ring and the page cache between them fit."""
    limit, available = limits.memory_limit_bytes(), limits.available_bytes()
    text = f"{size(available)} available" + (f", a cgroup allows {size(limit)}" if limit is not None else "")
    least = min(available, limit if limit is not None else available)
    if least < _BESIDE_BYTES:
        return Check("memory", "broken", text, f"a transfer needs {size(_BESIDE_BYTES)}: raise the container's limit")
    if missing_bytes + _BESIDE_BYTES > least:
        hint = f"the files take {size(missing_bytes)}: they will be read from the disk again, piece by piece"
        return Check("memory", "note", text, hint)
    return Check("memory", "ok", text)


def open_files() -> Check:
    """Look at the limit on open files."""
    limit = limits.open_files()
    if limit < _FILES:
        return Check("open files", "broken", f"{limit} allowed", f"raise it: ulimit -n {_FILES * 4}")
    return Check("open files", "ok", f"{limit} allowed")


def plugin_states(settings: Settings) -> Iterator[Check]:
    """Look for plugins that could not be loaded."""
    records = plugins.report(settings)
    broken = [record for record in records if record.error]
    for record in broken:
        yield Check("plugin", "broken", f"{record.name} ({record.distribution}): {record.error}", "`fastload plugins`")
    if not broken:
        yield Check("plugins", "ok", ", ".join(record.name for record in records))


# -- the network, without using it ----------------------------------------------------------------------------------


def token(settings: Settings) -> Check:
    """Look whether there is a token; it is not shown."""
    if settings.token:
        return Check("token", "ok", f"from {settings.origins.get('token', 'an argument')}")
    if settings.token is not None:
        return Check("token", "note", "turned off", "gated and private models need one")
    if read_token(settings):
        return Check("token", "ok", f"from {settings.token_path}")
    return Check("token", "note", "none", "gated and private models need one: HF_TOKEN, or `hf auth login`")


def network_settings(settings: Settings) -> Iterator[Check]:
    """Look at endpoint, proxy and certificates as they are set."""
    if settings.offline:
        origin = settings.origins.get("offline", "default")
        yield Check("network", "note", f"off ({origin}): only what is in the cache loads")
    try:
        proxy = Access(settings, settings.endpoint, None).proxy(settings.endpoint)
    except SettingsError as e:
        yield Check("proxy", "broken", e.message, e.hint or "")
    else:
        host = urlsplit(settings.endpoint).hostname
        elsewhere = sorted(set(getproxies()) - {"no"})
        unused = f"none for {host}" + (f" (there are some for {', '.join(elsewhere)})" if elsewhere else "")
        yield Check("proxy", "ok", proxy.url if proxy else unused)
    if settings.ca_file is not None:
        yield _certificates(settings.ca_file, settings.origins.get("ca_file", "default"))


def _certificates(path: Path, origin: str) -> Check:
    try:
        count = len(ssl.create_default_context(cafile=str(path)).get_ca_certs())
    except (OSError, ssl.SSLError) as e:
        return Check("certificates", "broken", f"{path} ({origin}): {e}", "name a PEM file that can be read, or none")
    return Check("certificates", "ok", f"{count} authorities in {path} ({origin})")
