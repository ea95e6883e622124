"""The link between hub and rivals: loopback, in a network namespace of its own where the system lets us have one.

There the congestion control paces nothing (some machines run BBR, which holds loopback back to a third), and a token
bucket (tbf) caps what all connections together get. Without the right or the kernel for it, loopback is the
machine's own and only nginx limits, connection by connection.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000  # specified: linux/sched.h
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_UNPACED = ("cubic", "reno")  # Linux' default; and what a namespace may always have
# Guessed: a queue of 50 ms is what routers have; 2 MB of burst is 8 ms at 250 MB/s, so that the timer's grain costs nothing.
_QUEUE, _BURST_BYTES = "50ms", 2 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """What a run's bytes go through.

    Attributes:
        own: Whether it is a network namespace of this case.
        congestion: TCP's congestion control.
        rate_bytes_per_s: The cap on all connections together; ``None``: none.
        lacking: Why there is no namespace or no cap where one was asked for, in words.
    """

    own: bool
    congestion: str
    rate_bytes_per_s: int | None
    lacking: str | None


@contextmanager
def opened(rate_bytes_per_s: int | None) -> Iterator[Link]:
    """Run the block, and all processes that it starts, on a loopback of their own; this thread alone moves there.

    Args:
        rate_bytes_per_s: What all connections together may get; ``None``: as much as loopback carries.
    """
    with open("/proc/self/ns/net", "rb") as outside:
        lacking = _enter()
        own, limited = lacking is None, False
        try:
            if own and rate_bytes_per_s is not None:
                lacking = _limit(rate_bytes_per_s)
                limited = lacking is None
            yield Link(own, _congestion(), rate_bytes_per_s if limited else None, lacking)
        finally:
            _libc("setns", outside.fileno(), _CLONE_NEWNET)


def _enter() -> str | None:
    """Move this thread into a new network namespace with loopback up; return why not, in words."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    if error := _libc("unshare", _CLONE_NEWNET):
        return f"no network namespace: {os.strerror(error)} (needs root)"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    allowed = _CONGESTION.with_name("tcp_allowed_congestion_control").read_text().split()
    for name in _UNPACED:
        if name in allowed:
            _CONGESTION.write_text(name)
            break
    return None


def _limit(rate_bytes_per_s: int) -> str | None:
    shaping = f"rate {rate_bytes_per_s * 8}bit burst {_BURST_BYTES} latency {_QUEUE}".split()
    command = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", *shaping]
    if shutil.which("tc") is None:
        return "tc (iproute2) is not installed"
    done = subprocess.run(command, capture_output=True, text=True)
    return f"tc has no tbf: {done.stderr.strip()}" if done.returncode else None


def _congestion() -> str:
    return _CONGESTION.read_text().strip()


def _libc(function: str, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if getattr(libc, function)(*arguments) else 0
