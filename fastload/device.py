"""Element types and devices: what a weight file calls a type, what torch calls it, and the way to a device."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import DeviceError, FormatError, PluginError, SettingsError
from .events import log

if TYPE_CHECKING:
    import torch

#: Specified (safetensors): code of an element type → bits an element, and torch's name of it ("" where torch has none).
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}

#: Specified (torch's caching allocator): sizes are rounded up to this; up to that size, blocks come from a pool of their own.
_ROUNDING_BYTES, _SMALL_BYTES = 512, 1 << 20
_OOM_HINT = "a smaller dtype=, several devices (device_map=), or end what else uses the device"
_FAILED_HINT = "after some failures a device refuses everything: if it happens again, restart the program"


def import_torch() -> Any:
    """Return the torch module.

    Raises:
        PluginError: It is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise PluginError(
            f"tensors need torch, which cannot be imported: {e}", hint='pip install "fastload-weights[torch]"'
        ) from e
    return torch


def torch_dtype(code: str) -> torch.dtype:
    """Return torch's dtype for *code*, safetensors' spelling.

    Raises:
        FormatError: The installed torch has no such type.
    """
    torch = import_torch()
    name = DTYPES.get(code, (0, ""))[1]
    dtype = getattr(torch, name, None) if name else None
    if dtype is None:
        raise FormatError(
            f"torch {torch.__version__} has no type for elements of {code}", hint="a newer torch may have one"
        )
    return dtype


def dtype_code(dtype: torch.dtype) -> str:
    """Return safetensors' spelling of *dtype*; torch's own name in capitals where there is none."""
    name = str(dtype).removeprefix("torch.")
    return next((code for code, (_, known) in DTYPES.items() if known == name), name.upper())


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a user named (``torch.bfloat16``, ``"bfloat16"``, ``"torch.bfloat16"``); ``None`` stays.

    Raises:
        SettingsError: It is none.
    """
    if dtype is None:
        return None
    torch = import_torch()
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise SettingsError(f"dtype={dtype!r} is not a torch dtype", hint='for example torch.bfloat16, or "bfloat16"')
    return found


def parse_device(device: Any) -> torch.device:
    """Return the device that a user named: ``"cpu"``, ``"cuda:1"``, ``0`` or a ``torch.device``.

    Raises:
        DeviceError: There is no such kind of device.
    """
    torch = import_torch()
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise DeviceError(f"device={device!r} is not a torch device: {_first_line(e)}", hint='"cpu" or "cuda"') from e


def fed_device(device: torch.device) -> torch.device | None:
    """Return *device* with its index where it is fed from page-locked memory (CUDA, and ROCm, which goes by its name).

    ``None`` for all others (cpu, mps, xpu, npu, meta …), which torch's own copies serve, and for one that is missing.
    """
    if device.type != "cuda":
        return None
    torch = import_torch()
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index) if index < torch.cuda.device_count() else None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return *tensor* on *device*; itself where it is there already.

    Raises:
        DeviceError: The device is missing, or out of memory.
    """
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # torch raises all three for a missing backend
        raise DeviceError(f"cannot copy {tensor.nbytes} bytes to {device}: {_first_line(e)}") from e


def rounded(size: int) -> int:
    """Return what torch takes of a device for a tensor of *size* bytes."""
    return -(-size // _ROUNDING_BYTES) * _ROUNDING_BYTES


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of *device* nobody uses, those that torch's allocator has to spare included."""
    torch = import_torch()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(unused)


def check_fits(device: torch.device, needed: int, what: str) -> None:
    """Check that *device* has room for *needed* more bytes.

    Raises:
        DeviceError: It has not; *what* names those who need them.
    """
    free = free_bytes(device)
    if needed > free:
        raise DeviceError(
            f"{device} is out of memory: {what} need {needed} bytes, {free} bytes are free", hint=_OOM_HINT
        )


def reserve(device: torch.device, sizes: Iterable[int]) -> None:
    """Let torch take from *device*, in one piece, what tensors of *sizes* (bytes) need.

    They are carved out of it if they are allocated next. Without it each of them may cost a call of the driver, and those
    wait for the device.
    """
    torch = import_torch()
    whole = sum(size for size in map(rounded, sizes) if size > _SMALL_BYTES)
    if whole <= torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device):
        return
    try:
        torch.empty(whole, dtype=torch.uint8, device=device)  # given back at once: to torch, not to the device
    except torch.OutOfMemoryError:
        log.debug("%s has no piece of %d bytes; tensors are allocated one by one", device, whole)


def device_error(error: BaseException, device: torch.device | None, doing: str) -> DeviceError:
    """Return *error*, which torch raised while *doing* something with *device*, as ours."""
    torch = import_torch()
    where = device or "the device"
    if not isinstance(error, torch.OutOfMemoryError):
        return DeviceError(f"{where} failed while {doing}: {_first_line(error)}", hint=_FAILED_HINT)
    try:
        free = f"{torch.cuda.mem_get_info(device)[0]} bytes are free"
    except (RuntimeError, AssertionError):  # another kind of accelerator
        free = _first_line(error)
    return DeviceError(f"{where} is out of memory while {doing}; {free}", hint=_OOM_HINT)


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise what torch raises in the block because a device is full or failed as ours; nothing that it held lives on.

    Raises:
        DeviceError: Instead of torch's errors.
    """
    try:
        yield
    except Exception as e:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(
            e, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", DeviceError))
        ):
            if isinstance(e, DeviceError):
                traceback.clear_frames(e.__traceback__)
            raise
        # The frames hold half a model; whoever keeps the error would keep that.
        traceback.clear_frames(e.__traceback__)
        raise device_error(e, None, "the framework built the model") from e


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
