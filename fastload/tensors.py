"""All tensors of one transfer, by name, while their bytes still arrive."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import FastloadError, FormatError, NotFoundError
from .late import Late
from .profile import Profile
from .served import served
from .settings import Settings
from .shardindex import BIN_INDEX, is_index, weight_map
from .supply import Supply
from .transfer import Transfer
from .types import ByteRange, TensorInfo
from .weightfile import TensorSlice, WeightFile, nearest

if TYPE_CHECKING:
    import pluggy
    import torch
else:
    pluggy, torch = Late("pluggy"), Late("torch")

Result = TypeVar("Result")


class TensorStream:
    """The weights of one transfer under ``safe_open``'s names. Thread-safe; methods block until their bytes landed.

    What it hands out may not be verified yet: the block that opened it ends (or raises) when all is.

    Args:
        transfer: Where the bytes come from; stays the caller's.
        pm: Plugins, asked for the formats of the files.
        device: Where tensors go: ``"cpu"``, ``"cuda:0"``, an index, a ``torch.device``.
        dtype: Floating tensors are cast to it; ``None``: as the files have them.
        settings: Of the load; ``None``: the defaults.

    Attributes:
        profile: Of the load, set by the loader.
        settings, lock: Of the load, for plugins that load further sources with it.
    """

    def __init__(
        self,
        transfer: Transfer,
        pm: pluggy.PluginManager,
        *,
        device: Any = "cpu",
        dtype: Any = None,
        settings: Settings | None = None,
        lock: Any = None,
    ) -> None:
        self.transfer = transfer
        self.profile: Profile | None = None
        self.settings, self.lock = settings or Settings(), lock
        self._pm = pm
        self._supply = Supply(transfer, device, dtype, settings)
        self._lock = threading.Lock()
        self._owners: dict[str, WeightFile] = {}
        self._closed = False
        self._checked = False

    # -- names -------------------------------------------------------------------------------------------------------

    def files(self) -> tuple[str, ...]:
        """Return the paths of the weight files, in the order of delivery."""
        return tuple(self._files)

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the order of their bytes; waits for the heads of all files."""
        self.check()
        return [name for file in self._files.values() for name in file.tensors()]

    def metadata(self) -> dict[str, str]:
        """Return the free-form metadata of all files; where two disagree, the first one's."""
        found: dict[str, str] = {}
        for file in self._files.values():
            found = {**file.metadata(), **found}
        return found

    def info(self, name: str) -> TensorInfo:
        """Return what the file of tensor *name* says about it.

        Raises:
            NotFoundError: No file has it.
        """
        return self._find(name).info(name)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return tensor *name*, once it has landed.

        On the CPU, without a cast, it is a view of the file's private mapping: nothing is copied.

        Raises:
            NotFoundError: No file has it.
            FastloadError: The transfer failed.
        """
        return self._supply.tensor(self._find(name), name)

    def __getitem__(self, name: str) -> torch.Tensor:
        """As :meth:`get_tensor`; so ``dict(stream)`` works."""
        return self.get_tensor(name)

    def get_slice(self, name: str) -> TensorSlice:
        """Return a stand-in for tensor *name*: ``get_shape()``, ``get_dtype()``, ``[...]``; waits only when indexed."""
        return self._supply.slice(self._find(name), name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` in the order of delivery: weight files in order, their tensors by offset."""
        for file in self._files.values():
            self._adopt(file)
            self._supply.expect(file)
            for name in file.tensors():
                self._check_open()
                yield name, self._supply.tensor(file, name)
        self.check()

    def collect(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name, in the order of delivery.

        Raises:
            DeviceError: They do not fit on the device, or a copy failed.
        """
        self._supply.bring(self._files.values())
        collected = {
            name: self._supply.tensor(file, name) for file in self._files.values() for name in self._adopt(file)
        }
        self.check()
        self.settle()
        return collected

    def settle(self) -> None:
        """Wait until everything that was handed out is on its device; raise DeviceError if something is not."""
        self._supply.settle()

    # -- files -------------------------------------------------------------------------------------------------------

    @cached_property
    def _files(self) -> dict[str, WeightFile]:
        self.transfer.wait_manifest()
        return {path: WeightFile(self.transfer, path, self._pm) for path in self.transfer.weights}

    def _check_open(self) -> None:
        if self._closed:
            raise FastloadError("the stream is closed", hint="read inside the `with fastload.stream(...)` block")

    def _adopt(self, file: WeightFile) -> Iterable[str]:
        """Take the names of *file* in and return them; a name that another file has too is an error."""
        names = file.tensors()
        with self._lock:
            for name in names:
                other = self._owners.setdefault(name, file)
                if other is not file:
                    raise FormatError(
                        f"{file.path}: tensor {name!r} is in {other.path} too",
                        hint="choose the files of one variant with files= (or subfolder=)",
                    )
        return names

    def _find(self, name: str) -> WeightFile:
        self._check_open()
        if name in self._owners:
            return self._owners[name]
        for file in self._files.values():
            self._adopt(file)
            if name in self._owners:
                return self._owners[name]
        raise NotFoundError(f"no weight file has a tensor {name!r}", hint=nearest(name, self._owners))

    def check(self) -> None:
        """Check all files against each other and against the index; waits for the heads of all files.

        Raises:
            FormatError: A file is not sound, two files have a tensor of the same name, or an index names a tensor or
                a file that is not there.
        """
        self._check_open()
        if self._checked:
            return
        for file in self._files.values():
            self._adopt(file)
        self.check_index(whole=True)
        self._checked = True

    def check_index(self, *, whole: bool = False) -> None:
        """Check the heads of the weight files against every ``*.index.json`` that speaks of them.

        Unlike :meth:`check` this lets files of different folders have tensors of the same name, and (unless *whole*) reads
        no ``.bin`` files, which have no heads.
        """
        for path, table, shards in self._indexes():
            if path.endswith(BIN_INDEX) and not whole:
                continue
            held = {name for file in shards.values() for name in file.tensors()}
            for name, shard in table.items():
                if name not in held:
                    raise FormatError(f"{path}: tensor {name!r} should be in {shard}, but no weight file has it")

    def check_shards(self) -> None:
        """Check that every file that an index names is among the weight files; waits for no head.

        Raises:
            FormatError: One is missing, or an index cannot be read.
        """
        for _ in self._indexes():
            pass

    def _indexes(self) -> Iterator[tuple[str, dict[str, str], dict[str, WeightFile]]]:
        """Yield path, table and weight files of each index."""
        for path in filter(is_index, self.transfer.files):
            view = self.transfer.files[path]
            table = weight_map(path, view.read(ByteRange(0, view.size)))
            folder = PurePosixPath(path).parent
            wanted = {shard: str(folder / shard) for shard in dict.fromkeys(table.values())}
            shards = {place: self._files[place] for place in wanted.values() if place in self._files}
            for name, shard in table.items():
                # No file of it is there: the index of a variant that was not chosen.
                if shards and wanted[shard] not in shards:
                    raise FormatError(
                        f"{path}: tensor {name!r} should be in {shard}, which is not among the files",
                        hint="the repository, or files=, lacks it",
                    )
            if shards:
                yield path, table, shards

    def served(self, *, defer: bool = False, ahead: Any = None) -> AbstractContextManager[Path]:
        """Give unchanged ``from_pretrained`` code a folder that it can load from at once.

        Inside the block ``safetensors.safe_open`` waits for bytes that still arrive. Files that are no safetensors
        files are waited for first. The folder goes away with the block; nothing is waited for at its end.

        Args:
            defer: Give stand-ins to a reader that takes tensors to the CPU and at once sends them on with ``.to(device)``:
                then they go straight to a CUDA device. Complete files are served so, too.
            ahead: Where it will send all of them, if that is known.
        """
        self._supply.send_ahead_to(ahead)
        return served(self.transfer, self._files, self._supply, defer=defer)

    def close(self) -> None:
        """End reading: later calls raise. Tensors that were handed out stay."""
        self._closed = True
        self._supply.close()


class AsyncTensorStream:
    """As :class:`TensorStream`, for a running event loop: what may wait is awaited, and waits in threads of its own."""

    #: Guessed: readers that wait at once; further ones queue. Not the loop's own pool, which the transfer needs.
    _THREADS = 8

    def __init__(self, stream: TensorStream) -> None:
        self._stream = stream
        self._pool = ThreadPoolExecutor(self._THREADS, thread_name_prefix="fastload-read")

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *arguments))

    @property
    def profile(self) -> Profile | None:
        """The profile of the load."""
        return self._stream.profile

    @property
    def transfer(self) -> Transfer:
        """Where the bytes come from."""
        return self._stream.transfer

    async def files(self) -> tuple[str, ...]:
        """As :meth:`TensorStream.files`."""
        return await self._call(self._stream.files)

    async def keys(self) -> list[str]:
        """As :meth:`TensorStream.keys`."""
        return await self._call(self._stream.keys)

    async def metadata(self) -> dict[str, str]:
        """As :meth:`TensorStream.metadata`."""
        return await self._call(self._stream.metadata)

    async def info(self, name: str) -> TensorInfo:
        """As :meth:`TensorStream.info`."""
        return await self._call(self._stream.info, name)

    async def check(self) -> None:
        """As :meth:`TensorStream.check`."""
        await self._call(self._stream.check)

    async def get_tensor(self, name: str) -> torch.Tensor:
        """As :meth:`TensorStream.get_tensor`."""
        return await self._call(self._stream.get_tensor, name)

    async def get_slice(self, name: str) -> AsyncTensorSlice:
        """As :meth:`TensorStream.get_slice`; what it returns is indexed with ``await part[2:4]``."""
        return AsyncTensorSlice(await self._call(self._stream.get_slice, name), self._call)

    async def __aiter__(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """As ``iter`` of :class:`TensorStream`."""
        tensors = iter(self._stream)
        end = object()
        while (item := await self._call(next, tensors, end)) is not end:
            yield item

    def close(self) -> None:
        """As :meth:`TensorStream.close`; threads that still wait end with the transfer."""
        self._stream.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class AsyncTensorSlice:
    """As :class:`TensorSlice`; ``await part[2:4]`` waits for the rows."""

    __slots__ = ("_call", "_part")

    def __init__(self, part: TensorSlice, call: Callable[..., Any]) -> None:
        self._part = part
        self._call = call

    def get_shape(self) -> list[int]:
        """As :meth:`TensorSlice.get_shape`."""
        return self._part.get_shape()

    def get_dtype(self) -> str:
        """As :meth:`TensorSlice.get_dtype`."""
        return self._part.get_dtype()

    async def __getitem__(self, index: Any) -> torch.Tensor:
        return await self._call(self._part.__getitem__, index)
