"""On volumes whose locks are seen by nobody, or granted to everybody, no writer touches what another has verified."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import held, program, run, until
from transfers import expected_bytes, tensor_bytes, write_weights

import fastload
from fastload.cache import RepoCache
from fastload.cache.filesystem import check_files, is_network, writer_name
from fastload.errors import CacheError
from fastload.testing import Fault, Hub
from fastload.types import Digest

DIGEST = Digest("sha256", "5e" * 32)
MOUNTS = """
22 1 252:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
40 22 0:40 / /volume rw - nfs4 server:/export rw,vers=4.2
41 22 0:41 / /mnt/bucket\\040one rw - fuse.gcsfuse bucket rw
42 22 0:42 / /mnt/usb rw - fuseblk /dev/sdb1 rw
43 22 0:43 / /share rw - virtiofs share rw
44 40 252:1 / /volume/local rw - xfs /dev/vdb rw
45 22 0:45 / /twice rw - nfs server:/a rw
46 22 0:46 / /twice rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    "path, network",
    [
        ("/home/me/.cache", False),
        ("/volume", True),
        ("/volume/models/hub", True),
        ("/volumes/models", False),
        ("/volume/local/hub", False),
        ("/mnt/bucket one/hub", True),
        ("/mnt/usb/hub", False),
        ("/share/hub", True),
        ("/twice/hub", False),  # what was mounted last is seen
    ],
)
def test_network_filesystems_are_known_by_their_type(path: str, network: bool):
    assert is_network(Path(path), MOUNTS) == network


def test_where_nothing_tells_the_filesystem_is_local(tmp_path: Path):
    assert not is_network(tmp_path, "")
    assert not is_network(tmp_path, "garbage\n1 2 3 - \n")


def test_locks_of_this_filesystem_keep_others_out_and_nothing_is_left(tmp_path: Path):
    assert check_files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_locks_that_everybody_is_granted_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fcntl.flock", lambda fd, operation: None)
    assert not check_files(tmp_path)


def test_a_filesystem_without_shared_mappings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*arguments: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("mmap.mmap", refused)
    with pytest.raises(CacheError, match="No such device"):
        check_files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_partial_files_are_shared_only_as_far_as_locks_hold():
    assert writer_name(network=False, locks=True) == ""
    machine = writer_name(network=True, locks=True)
    assert machine == writer_name(network=True, locks=True) != ""  # so that whoever comes next here goes on
    assert writer_name(network=True, locks=False) != writer_name(network=True, locks=False)
    assert writer_name(network=False, locks=False) not in ("", machine)


def test_partial_files_of_this_machine_are_its_own_on_a_network_cache(tmp_path: Path):
    local, network = RepoCache(tmp_path, "org/m", network=False), RepoCache(tmp_path, "org/m", network=True)
    local.prepare()
    network.prepare()
    assert local.partial_path(DIGEST).name == f"{DIGEST.value}.fastload.incomplete"
    assert network.partial_path(DIGEST) != local.partial_path(DIGEST)
    assert network.journal_path(DIGEST) != local.journal_path(DIGEST)
    assert network.blob_path(DIGEST) == local.blob_path(DIGEST)  # what is verified is everybody's


#: A program on a filesystem where every lock is granted.
LYING = """
import fcntl, sys
fcntl.flock = lambda fd, operation: None
import fastload
from transfers import tensor_bytes
tensors = fastload.load_tensors("org/m")
import hashlib
print(hashlib.sha256(b"".join(tensor_bytes(tensors).values())).hexdigest())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    write_weights(tmp_path / "served" / "model.safetensors")
    (tmp_path / "served" / "config.json").write_text("{}")
    return tmp_path / "served"


def test_two_that_were_both_granted_the_lock_do_not_disturb_each_other(
    folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
):
    hub = make_hub({"org/m": folder})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    environ = {"FASTLOAD_PROCESS": "0", "FASTLOAD_STALL_S": "60", "FASTLOAD_RANGE_BYTES": "65536"}
    hub.script(Fault("hold", path="model.safetensors", offset=500_000, times=1))
    cache = Path(os.environ["HF_HOME"]) / "hub"
    with program(LYING, environ=environ) as first:
        held(hub)
        second = run(LYING, environ=environ)
        partial = until(lambda: list(cache.glob("models--*/blobs/*.fastload.incomplete")))
        assert len(partial) == 1  # the first one's, beside the second one's finished file
        hub.release()
        out, err = first.communicate(timeout=60)
        assert first.returncode == 0, err
    assert out == second
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected_bytes(folder / "model.safetensors")


def test_on_a_network_cache_a_killed_transfer_goes_on(
    folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
):
    hub = make_hub({"org/m": folder})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    environ = {"FASTLOAD_NETWORK_CACHE": "1", "FASTLOAD_STALL_S": "60", "FASTLOAD_RANGE_BYTES": "65536"}
    hub.script(Fault("hold", path="model.safetensors", offset=800_000))
    with program("import fastload; fastload.prefetch('org/m')", environ=environ) as killed:
        held(hub)
        killed.kill()
    hub.script()
    mark = len(hub.requests)
    run("import fastload; fastload.prefetch('org/m')", environ=environ)
    size = (folder / "model.safetensors").stat().st_size
    again = sum(r.bytes_sent for r in hub.requests[mark:] if r.file == "model.safetensors" and r.status in (200, 206))
    assert 0 < again < size
