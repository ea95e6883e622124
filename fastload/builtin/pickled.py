"""PyTorch's own formats: what ``torch.save`` wrote, as a zip archive or, before torch 1.6, as a row of pickles.

Only tensors and plain values are ever unpickled (``weights_only``): a file that wants to run code is refused. The directory
of such a file stands at its end, so it is read once it is whole and verified; a zip archive is then mapped, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, UnsupportedSourceError
from ..hookspecs import hookimpl
from ..types import Format, NeedBytes, TensorInfo

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: Specified (zip; pickle protocols 2 to 5): how the file starts. What else is called .bin is somebody else's.
_ZIP = b"PK\x03\x04"
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_SAVE_SAFELY = "where you trust it, torch.load it there and save its tensors with safetensors.torch.save_file"


@hookimpl
def fastload_format(filename: str, head: bytes) -> Format | None:
    """Recognise ``.bin``, ``.pt``, ``.pth`` and ``.ckpt`` files that torch may have written."""
    if filename.lower().endswith(_SUFFIXES) and head.startswith((_ZIP, *_PICKLES)):
        return Pickled(filename, is_zip=head.startswith(_ZIP))
    return None


class Pickled:
    """One file of ``torch.save``.

    Attributes:
        name: Of the format.
    """

    name = "pickled"

    def __init__(self, filename: str, *, is_zip: bool) -> None:
        self.filename = filename
        self._is_zip = is_zip
        self._metadata: dict[str, str] = {}

    def parse(self, head: bytes) -> list[TensorInfo] | NeedBytes:
        """Raise: the head does not tell; :meth:`load` does."""
        raise FormatError(f"{self.filename}: can be read only as a whole")

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of the verified file at *path*; those that are one in the file are one here.

        A dict of tensors keeps its names. Where the tensors are one level deeper, a single such dict (``state_dict``,
        ``model`` …) keeps its names too; of several, each name is put before those within.

        Raises:
            FormatError: The file is damaged, wants to run code, or holds no tensors.
            UnsupportedSourceError: It is a program.
        """
        tensors, self._metadata = self._flatten(self._unpickle(path))
        return tensors

    def metadata(self, head: bytes) -> dict[str, str]:
        """Return the numbers and texts that stand beside the tensors (``epoch`` …)."""
        return self._metadata

    def _unpickle(self, path: Path) -> Any:
        import pickle

        import torch

        try:
            return torch.load(path, map_location="cpu", mmap=self._is_zip, weights_only=True)
        except Exception as e:  # what the bytes of a stranger make the unpickler raise may be anything
            reason, hint = f"torch cannot read it: {_reason(e)}", "tell the owner of the repository"
            if isinstance(e, pickle.UnpicklingError) and "GLOBAL" in str(e):
                reason, hint = f"it holds more than tensors and plain values: {_reason(e)}", _SAVE_SAFELY
            elif "TorchScript" in str(e):  # whoever knows where it comes from says how to run it
                raise UnsupportedSourceError(f"{self.filename}: it is a TorchScript program") from e
        raise FormatError(f"{self.filename}: {reason}", hint=hint)

    def _flatten(self, content: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if not isinstance(content, Mapping):
            raise FormatError(
                f"{self.filename}: holds a {type(content).__name__}, not a dict of tensors", hint=_SAVE_SAFELY
            )
        tensors = _tensors_of(content)
        nested = {str(name): _tensors_of(value) for name, value in content.items() if isinstance(value, Mapping)}
        nested = {name: inner for name, inner in nested.items() if inner}
        if not tensors and len(nested) == 1:
            [tensors] = nested.values()
        else:
            tensors |= {f"{name}.{key}": value for name, inner in nested.items() for key, value in inner.items()}
        if not tensors:
            raise FormatError(f"{self.filename}: holds no tensors", hint=_SAVE_SAFELY)
        plain = {str(k): str(v) for k, v in content.items() if isinstance(v, str | int | float)}
        return _without_graph(tensors), plain


def _tensors_of(content: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    import torch

    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _without_graph(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parameters as plain tensors; what is one object stays one."""
    plain = {id(tensor): tensor.detach() if tensor.requires_grad else tensor for tensor in tensors.values()}
    return {name: plain[id(tensor)] for name, tensor in tensors.items()}


def _reason(error: BaseException) -> str:
    """Return what torch says, without its advice to switch its guard off."""
    lines = [line.strip().removeprefix("WeightsUnpickler error: ") for line in str(error).splitlines()]
    said = [line for line in lines if "GLOBAL" in line or "Unsupported" in line] or [line for line in lines if line]
    return said[0].partition(". ")[0].rstrip(".") if said else type(error).__name__
