"""What this machine does in a second, stage by stage, measured in a few seconds with a few hundred MB at most."""

from __future__ import annotations

import hashlib
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from . import limits

MIB = 1 << 20
BLOCK_BYTES = 8 * MIB  # as a range of a transfer
# Guessed: enough to tell a slow disk from a fast one, and 0.1 s each on this project's machine (2 cores).
HASH_BYTES, MEMORY_BYTES, FILE_BYTES, WIRE_BYTES, DEVICE_BYTES = 96 * MIB, 192 * MIB, 128 * MIB, 256 * MIB, 256 * MIB
#: Guessed: a disk that needs longer for FILE_BYTES has been judged with what it got until then.
WRITE_S = 2.0
#: Where a device that is fed through page-locked memory would show: NVIDIA, ROCm, NVIDIA under WSL.
DEVICE_NODES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
_MADV_POPULATE_WRITE = 23  # specified: linux/mman.h, Linux 5.14


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage takes.

    Attributes:
        bytes_per_s: By the clock, one thread unless said otherwise.
        cpu_s_per_gb: Processor seconds for 10^9 bytes.
    """

    bytes_per_s: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """A device that takes bytes from page-locked memory.

    Attributes:
        pin: Page-locking memory, which happens once a load for the ring alone.
        copy_bytes_per_s: From page-locked memory to the device.
    """

    name: str
    pin: Cost
    copy_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does. Those of the disk are ``None`` where the folder cannot be written.

    Attributes:
        cores: That this process may keep busy.
        sha256: On one core.
        sha256_bytes_per_s: On all cores together.
        receive: From a socket of loopback into memory.
        new_pages: Memory that nobody had: what the kernel, or a virtual machine's host, takes to supply it.
        write: A new file, into the page cache.
        disk_write_bytes_per_s: Until the disk has it.
        disk_read_bytes_per_s: What the page cache does not hold, in order, one thread.
        child_start_s: From nothing until a transfer process has its imports.
        device: ``None`` without one.
    """

    cores: float
    sha256: Cost
    sha256_bytes_per_s: float
    receive: Cost
    new_pages: Cost
    write: Cost | None
    disk_write_bytes_per_s: float | None
    disk_read_bytes_per_s: float | None
    child_start_s: float
    device: DeviceRates | None


def measure(folder: Path) -> Rates:
    """Measure this machine; blocks for a few seconds, leaves nothing behind.

    Args:
        folder: On the disk that matters; it is there.
    """
    cores = limits.cores()
    block = memoryview(bytearray(os.urandom(MIB)) * (BLOCK_BYTES // MIB))
    written, disk_write, disk_read = _disk(folder, block)
    return Rates(
        cores=cores,
        sha256=_timed(lambda: _hash(block), HASH_BYTES),
        sha256_bytes_per_s=_hash_together(block, max(1, round(cores))),
        receive=_receive(block),
        new_pages=_new_pages(),
        write=written,
        disk_write_bytes_per_s=disk_write,
        disk_read_bytes_per_s=disk_read,
        child_start_s=_child_start_s(),
        device=_device() if any(node.exists() for node in DEVICE_NODES) else None,
    )


def _timed(work: Callable[[], Any], size: int) -> Cost:
    used_s, started_s = time.thread_time(), time.perf_counter()
    work()
    return _cost(size, time.perf_counter() - started_s, time.thread_time() - used_s)


def _cost(size: int, seconds: float, cpu_s: float) -> Cost:
    return Cost(size / max(seconds, 1e-9), cpu_s / (size / 1e9))


def _hash(block: memoryview) -> None:
    state = hashlib.sha256()
    for _ in range(0, HASH_BYTES, BLOCK_BYTES):
        state.update(block)


def _hash_together(block: memoryview, threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        started_s = time.perf_counter()
        for _ in pool.map(_hash, [block] * threads):
            pass
        return threads * HASH_BYTES / (time.perf_counter() - started_s)


def _receive(block: memoryview) -> Cost:
    """Receive from a thread of our own; its sending is not counted."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sender = threading.Thread(target=_send, args=(listening.getsockname()[:2], block), daemon=True)
        sender.start()
        receiving, _ = listening.accept()
    with receiving:
        target = memoryview(bytearray(block))

        def receive() -> None:
            left = WIRE_BYTES
            while left and (read := receiving.recv_into(target, min(left, BLOCK_BYTES), socket.MSG_WAITALL)):
                left -= read

        cost = _timed(receive, WIRE_BYTES)
    sender.join()
    return cost


def _send(address: tuple[str, int], block: memoryview) -> None:
    with suppress(OSError), socket.create_connection(address) as sending:
        for _ in range(0, WIRE_BYTES, BLOCK_BYTES):
            sending.sendall(block)


def _new_pages() -> Cost:
    with mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:

        def populate() -> None:
            try:
                memory.madvise(_MADV_POPULATE_WRITE)
            except OSError:  # an older kernel
                for start in range(0, MEMORY_BYTES, mmap.PAGESIZE):
                    memory[start] = 1

        return _timed(populate, MEMORY_BYTES)


def _disk(folder: Path, block: memoryview) -> tuple[Cost | None, float | None, float | None]:
    """Write a new file without a name, bring it to the disk, read it from there."""
    try:
        with TemporaryFile(dir=folder, prefix=".fastload-doctor-", buffering=0) as file:
            return _disk_rates(file.fileno(), block)
    except OSError:  # the checks say what is wrong with the folder
        return None, None, None


def _disk_rates(descriptor: int, block: memoryview) -> tuple[Cost, float, float]:
    used_s, started_s = time.thread_time(), time.perf_counter()
    size = 0
    while size < FILE_BYTES and time.perf_counter() - started_s < WRITE_S:
        size += os.pwrite(descriptor, block, size)
    written = _cost(size, time.perf_counter() - started_s, time.thread_time() - used_s)
    os.fsync(descriptor)
    synced_s = time.perf_counter() - started_s
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    target, at, read_from_s = memoryview(bytearray(block)), 0, time.perf_counter()
    while at < size and (read := os.preadv(descriptor, [target], at)):
        at += read
    return written, size / synced_s, size / max(time.perf_counter() - read_from_s, 1e-9)


def _child_start_s() -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import fastload.engine"], capture_output=True, check=False)
    return time.perf_counter() - started_s


def _device() -> DeviceRates | None:
    from ..device import device_errors, fed_device, import_torch
    from ..errors import FastloadError

    try:
        torch = import_torch()
        device = fed_device(torch.device("cuda"))
        if device is None:
            return None
        with device_errors():
            return _device_rates(torch, device)
    except FastloadError:  # no torch, or a device that refuses: nothing here that a load would use
        return None


def _device_rates(torch: Any, device: Any) -> DeviceRates:
    from ..pinned import PinnedSlots

    torch.empty(1, device=device)  # the device's own start is not the price of pinning
    used_s, started_s = time.thread_time(), time.perf_counter()
    slots = PinnedSlots(DEVICE_BYTES // BLOCK_BYTES, BLOCK_BYTES, device)
    pin = _cost(DEVICE_BYTES, time.perf_counter() - started_s, time.thread_time() - used_s)
    try:
        target = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=device)
        target.copy_(slots.tensor(0))
        torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        for index in range(DEVICE_BYTES // BLOCK_BYTES):
            target.copy_(slots.tensor(index), non_blocking=True)
        torch.cuda.synchronize(device)
        copy_s = time.perf_counter() - started_s
    finally:
        slots.close()
    return DeviceRates(torch.cuda.get_device_name(device), pin, DEVICE_BYTES / copy_s)
