"""Element types and devices: what a weight file calls a type, what torch calls it, and the way to a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import DeviceError, FormatError, PluginError, SettingsError

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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return *tensor* on *device*; itself where it is there already.

    Raises:
        DeviceError: The device is missing, or out of memory.
    """
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # torch raises all three for a missing backend
        raise DeviceError(f"cannot copy {tensor.nbytes} bytes to {device}: {_first_line(e)}") from e


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
