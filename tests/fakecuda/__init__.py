"""CUDA without a GPU: real copies in emulated streams, for the unmodified CUDA build of torch. See README.md.

import fakecuda
fakecuda.install()  # before torch is imported; build.py has built the libraries
import torch        # torch.cuda.is_available() is True now
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_library: Any = None


def library_folder() -> Path | None:
    """Return where ``build.py`` put the libraries (environment: FAKECUDA_LIB); ``None`` where it has not been run."""
    folder = os.environ.get("FAKECUDA_LIB")
    return Path(folder) if folder and list(Path(folder).glob("libcudart.so.*")) else None


def install(**values: Any) -> None:
    """Load the libraries, so that torch, imported later, links to them; change settings.

    It works because the dynamic linker takes a library of the same SONAME that is loaded before it searches the RPATH.
    """
    global _library
    if _library is None:
        if "torch._C" in sys.modules:
            raise RuntimeError("fakecuda.install() must come before the import of torch")
        folder = library_folder()
        if folder is None:
            raise RuntimeError("FAKECUDA_LIB names no folder with libraries of build.py")
        _library = ctypes.CDLL(str(next(folder.glob("libcudart.so.*"))), mode=ctypes.RTLD_GLOBAL)
        for path in folder.glob("lib*.so.*"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        _library.fakecuda_stat.restype = ctypes.c_longlong
        _library.fakecuda_peek.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    for name, value in values.items():
        set(name, value)


def installed() -> bool:
    """Tell whether this process runs on the emulated runtime."""
    return _library is not None


def set(name: str, value: Any) -> None:
    """Change a setting: ``set("gbps", 2)`` is FAKECUDA_GBPS=2."""
    if _library.fakecuda_set(name.upper().encode(), str(value).encode()):
        raise ValueError(f"no such setting, or a bad value: {name}={value}")


def get(name: str) -> str:
    """Return a setting, as :func:`set` takes it."""
    text = ctypes.create_string_buffer(64)
    if _library.fakecuda_get(name.upper().encode(), text, ctypes.c_size_t(64)):
        raise ValueError(f"no such setting: {name}")
    return text.value.decode()


@contextmanager
def settings(**values: Any) -> Iterator[None]:
    """Change settings for the length of the block."""
    before = {name: get(name) for name in values}
    try:
        for name, value in values.items():
            set(name, value)
        yield
    finally:
        for name, value in before.items():
            set(name, value)


@contextmanager
def hold() -> Iterator[None]:
    """Let no queued operation start inside the block. Whoever waits for the device in there ends the block's effect."""
    _library.fakecuda_hold(1)
    try:
        yield
    finally:
        _library.fakecuda_hold(0)


def stat(name: str) -> int:
    """Return a counter: h2d_bytes, launches, violations, registered, device_used … (``fakecuda_stat`` in runtime.c)."""
    return int(_library.fakecuda_stat(name.encode()))


def reset() -> None:
    """Wait for all work; forget sticky errors, violations and counters."""
    _library.fakecuda_reset()


def peek(tensor: Any) -> bytes:
    """Return the bytes of a contiguous tensor as they are on the device now, past all streams."""
    text = ctypes.create_string_buffer(tensor.nbytes)
    if _library.fakecuda_peek(tensor.data_ptr(), text, tensor.nbytes):
        raise ValueError("not device memory")
    return text.raw


def environment() -> dict[str, str]:
    """Return what a child process needs in its environment to run on the emulated runtime."""
    folder = library_folder()
    return {} if folder is None else {"LD_PRELOAD": ":".join(sorted(map(str, folder.glob("lib*.so.*"))))}
