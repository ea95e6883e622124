"""A stand-in for a tensor that still arrives: a CPU tensor without memory, whose ``.to("cuda")`` copies by our own way.

``from_pretrained`` takes a tensor out of its file on the CPU and sends it to the device that its map says, often within
one line. Between the two nothing needs to be read; so what it takes out is this. Casts are put off too (diffusers casts
first and sends then). Whatever else is done with it first waits for the bytes and then happens to the plain tensor, which it
is from then on: nobody ever sees memory that is not filled, and nothing that was done to a tensor is lost on its way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from .device import import_torch, torch_dtype
from .types import TensorInfo

if TYPE_CHECKING:
    import torch


def deferred(
    info: TensorInfo, read: Callable[[], torch.Tensor], send: Callable[[torch.device], torch.Tensor | None]
) -> torch.Tensor:
    """Return a stand-in for the tensor that *info* describes.

    Args:
        read: Waits for the bytes and returns the tensor on the CPU.
        send: Returns the tensor on another device, or ``None`` to leave that to torch.
    """
    stand_in: torch.Tensor = _class()(info.shape, torch_dtype(info.dtype), read, send)
    return stand_in


def landed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor behind *tensor*, waiting for it; itself where it is plain."""
    if not isinstance(tensor, _class()):
        return tensor
    standing_in: Any = tensor
    if standing_in._plain is None:
        for made in standing_in._casts:  # what happens to this one must not happen to those
            if (cast := made()) is not None:
                landed(cast)
        standing_in._plain = standing_in._read()
    plain: torch.Tensor = standing_in._plain
    return plain


@cache
def _class() -> Any:
    """Return the class, which needs torch."""
    torch = import_torch()
    # What a tensor can tell of itself without its bytes.
    properties = (
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "nbytes",
        "itemsize",
        "is_cuda",
        "is_meta",
        "requires_grad",
    )
    told = {getattr(torch.Tensor, name).__get__ for name in properties}
    methods = ("size", "dim", "numel", "is_floating_point", "element_size", "stride", "is_contiguous")
    told |= {getattr(torch.Tensor, name) for name in methods} | {torch.is_floating_point}

    class Deferred(torch.Tensor):  # type: ignore[misc, name-defined]
        @staticmethod
        def __new__(cls: Any, shape: Any, dtype: Any, read: Any, send: Any) -> Any:
            made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
            made._read, made._send = read, send
            made._plain, made._casts = None, []
            return made

        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if function in told:
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **kwargs)
            if function is torch.Tensor.to and isinstance(args[0], cls):
                sent = _sent(args[0], args[1:], kwargs)
                if sent is not None:
                    return sent
            if function is torch.Tensor.contiguous and len(args) == 1 and not kwargs:
                return args[0]
            args, kwargs = _plain((args, kwargs))
            return function(*args, **kwargs)

        @classmethod
        def __torch_dispatch__(
            cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            """Serve what goes round :meth:`__torch_function__`."""
            args, kwargs = _plain((args, dict(kwargs or {})))
            return function(*args, **kwargs)

    return Deferred


def _sent(tensor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what ``tensor.to(*args, **kwargs)`` gives, if it names a device that is ours to copy to, or a type alone."""
    torch = import_torch()
    if tensor._plain is not None:  # who knows what was done to it
        return None
    # Neither changes the result: what comes from here is a copy, and contiguous.
    where = {name: value for name, value in kwargs.items() if name not in ("copy", "memory_format")}
    try:
        device, dtype, _, _ = torch._C._nn._parse_to(*_plain(args), **where)
    except (TypeError, RuntimeError):  # not as it may be called, or a rarer form: torch's own knows
        return None
    if device is None:
        return None if dtype is None or kwargs.get("copy") else _cast(tensor, dtype)
    sent = tensor._send(device)
    return sent if sent is None or dtype is None else sent.to(dtype)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Return a stand-in for *tensor* cast to *dtype*; itself where it has that type."""
    if tensor.dtype == dtype:
        return tensor
    read, send = tensor._read, tensor._send

    def send_cast(device: torch.device) -> torch.Tensor | None:
        sent = send(device)
        return None if sent is None else sent.to(dtype)

    made = _class()(tensor.shape, dtype, lambda: read().to(dtype), send_cast)
    tensor._casts.append(weakref.ref(made))
    return made


def _plain(value: Any) -> Any:
    """Return *value* with landed tensors in place of stand-ins, however deep they are."""
    if isinstance(value, _class()):
        return landed(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value
