"""Where the tensors of one stream are to go, and who brings them there: a feeder for CUDA, torch's own copy for the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from .deferred import deferred
from .device import check_fits, fed_device, free_bytes, parse_device, parse_dtype, rounded, to_device
from .errors import FastloadError
from .feeder import Feeder
from .settings import Settings
from .staging import feed_of, feedable
from .transfer import Transfer
from .weightfile import TensorSlice, WeightFile

if TYPE_CHECKING:
    import torch


#: Specified (safetensors): so long may a header be; the heads of other formats are as good as nothing.
_LONGEST_HEAD_BYTES = 100_000_000
#: Reasoned: a load may take 256 MiB of a device beyond the model; this, and what torch's allocator leaves unused.
_LEAD_BYTES = 192 << 20


class SuppliedSlice(TensorSlice):
    """One tensor that may still be arriving; as a whole it comes by another way than its parts.

    Args:
        finish: Makes of a part, on the CPU, what the reader gets.
        whole: Returns the whole tensor as the reader gets it.
    """

    __slots__ = ("_whole",)

    def __init__(
        self,
        file: WeightFile,
        name: str,
        finish: Callable[[torch.Tensor], torch.Tensor],
        whole: Callable[[WeightFile, str], torch.Tensor],
    ) -> None:
        super().__init__(file, name, finish)
        self._whole = whole

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._whole(self._file, self._name) if isinstance(index, EllipsisType) else super().__getitem__(index)


class Supply:
    """Brings tensors of weight files to devices. Thread-safe; close it.

    Nothing touches a device, not even to look for it, before the first tensor is asked for.

    Args:
        transfer: Where the bytes come from.
        device, dtype: As the user gave them.
        settings: Of the load; ``None``: the defaults.
    """

    def __init__(self, transfer: Transfer, device: Any, dtype: Any, settings: Settings | None = None) -> None:
        self._transfer = transfer
        self._given = (device, dtype)
        self._settings = settings or Settings()
        self._lock = threading.Lock()
        self._parsed: tuple[torch.device, torch.dtype | None] | None = None
        self._feeder: Feeder | None = None
        self._closed = False
        #: Files whose tensors were deferred, and whether they travel ahead.
        self._deferred: dict[WeightFile, bool] = {}
        #: Where all deferred tensors will be sent, if that is known.
        self._ahead: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where tensors go."""
        return self._parse()[0]

    @property
    def dtype(self) -> torch.dtype | None:
        """What floating tensors are cast to."""
        return self._parse()[1]

    def _parse(self) -> tuple[torch.device, torch.dtype | None]:
        if self._parsed is None:
            self._parsed = parse_device(self._given[0]), parse_dtype(self._given[1])
        return self._parsed

    # -- tensors -----------------------------------------------------------------------------------------------------

    def tensor(self, file: WeightFile, name: str) -> torch.Tensor:
        """Return tensor *name* of *file* as the user wants it."""
        device, dtype = self._parse()
        fed = self._fed(file, name, device)
        return self.finish(file.tensor(name)) if fed is None else self.feeder.take(file, name, fed, dtype)

    def finish(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return *tensor*, which is on the CPU, as the user wants it."""
        device, dtype = self._parse()
        tensor = to_device(tensor, device)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def slice(self, file: WeightFile, name: str) -> TensorSlice:
        """Return a stand-in for tensor *name* of *file*, which is as the user wants it once it is indexed."""
        return SuppliedSlice(file, name, self.finish, self.tensor)

    def expect(self, file: WeightFile) -> None:
        """Say that all tensors of *file* will be asked for: they travel ahead, as far as the slots are long."""
        device, dtype = self._parse()
        fed = fed_device(device)
        if fed is not None:
            self.feeder.expect(file, fed, dtype, self._settings.pinned_bytes)

    def bring(self, files: Iterable[WeightFile]) -> None:
        """Say that all tensors of all *files* will be asked for, where the device is fed; waits for nothing.

        Raises:
            DeviceError: They cannot fit, as far as that is known yet.
        """
        device, dtype = self._parse()
        fed = fed_device(device)
        if fed is not None:
            files = tuple(files)
            # Looking into all files takes a while.
            if dtype is not None or sum(file.view.size for file in files) > free_bytes(fed):
                check_fits(fed, sum(self._least_bytes(file, fed, dtype) for file in files), "the tensors")
            self.feeder.bring(files, fed, dtype)

    def _least_bytes(self, file: WeightFile, device: torch.device, dtype: torch.dtype | None) -> int:
        """Return what the tensors of *file* take of *device*; less, where its head is not there yet."""
        infos = file.landed_tensors(lambda span: file.view.ready)
        if infos is not None:
            return sum(rounded(feed_of(file, name, device, dtype).device_bytes) for name in infos)
        return 0 if dtype is not None else max(0, file.view.size - _LONGEST_HEAD_BYTES)

    def _fed(self, file: WeightFile, name: str, device: torch.device) -> torch.device | None:
        """Return *device* with its index, if it is fed and tensor *name* can be."""
        fed = fed_device(device)
        return fed if fed is not None and feedable(file.info(name)) else None

    # -- for safe_open's handles -------------------------------------------------------------------------------------

    def place(self, file: WeightFile, name: str, device: torch.device) -> torch.Tensor:
        """Return tensor *name* of *file* on *device*, with the type that it has in the file."""
        fed = self._fed(file, name, device)
        return to_device(file.tensor(name), device) if fed is None else self.feeder.take(file, name, fed)

    def defer(self, file: WeightFile, name: str) -> torch.Tensor:
        """Return a stand-in for tensor *name* of *file* on the CPU, that comes to a device by our way."""
        if not feedable(file.info(name)):
            return file.tensor(name)

        with self._lock:
            self._deferred.setdefault(file, False)

        def send(device: torch.device) -> torch.Tensor | None:
            ahead = self._ahead
            if device.index is None and ahead is not None and ahead.type == device.type:
                device = ahead  # not what is current in a thread of the framework's
            fed = fed_device(device)
            if fed is None:
                return None
            self._run_ahead(fed)
            return self.feeder.take(file, name, fed)

        return deferred(file.info(name), lambda: file.tensor(name), send)

    def send_ahead_to(self, device: Any) -> None:
        """Say that deferred tensors will all be sent to *device*; ``None``: nobody knows."""
        self._ahead = None if device is None else parse_device(device)

    def _run_ahead(self, device: torch.device) -> None:
        """Let the tensors of all files that are read travel ahead, if all go to *device*; begins with the first one sent.

        Not before: a framework allocates a model's memory in one piece just then, and counts what is there already.
        """
        if self._ahead is None or fed_device(self._ahead) != device:
            return
        with self._lock:
            fresh = [file for file, expected in self._deferred.items() if not expected]
            self._deferred.update(dict.fromkeys(fresh, True))
        for file in fresh:
            self.feeder.expect(file, device, None, _LEAD_BYTES)

    # -- the feeder --------------------------------------------------------------------------------------------------

    @property
    def feeder(self) -> Feeder:
        """What feeds CUDA devices; made with the first use."""
        with self._lock:
            if self._closed:
                raise FastloadError("the stream is closed", hint="read inside the `with fastload.stream(...)` block")
            if self._feeder is None:
                settings = self._settings
                self._feeder = Feeder(self._transfer, settings.pinned_bytes, verify=settings.verify_device)
            return self._feeder

    def settle(self) -> None:
        """Wait until every copy is over; see :meth:`Feeder.settle`."""
        if self._feeder is not None:
            self._feeder.settle()

    def close(self) -> None:
        """End all waits and give everything back. Harmless when repeated."""
        with self._lock:
            self._closed = True
        if self._feeder is not None:
            self._feeder.close()
