"""How much of what a load returned was never copied: tensors that are views of the weight files' own mappings.

A tensor counts as zero-copy when its storage begins inside a mapping of one of the files, whoever mapped it: this package,
or safetensors where the file was complete. What the framework cast, merged or made anew does not.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

#: Specified (proc(5)): address, permissions, offset, device, inode, path of every mapping.
_MAPS = "/proc/self/maps"


def zero_copy_bytes(
    result: Any, files: Iterable[tuple[int, str]], known: Iterable[tuple[int, int]] = ()
) -> tuple[int, int] | None:
    """Return the bytes of the weights of *result* that are views of *files*, and all of them, each storage counted once.

    Only memory of the host counts: on a device everything is a copy. Blocks for two microseconds a tensor, and for two to
    five milliseconds where not all of them are in *known* mappings.

    Args:
        result: A module, a pipeline, a tensor, or containers of those.
        files: Inode and path of each.
        known: Mappings of them that somebody remembers, as addresses (half-open).

    Returns:
        ``None`` where there is nothing to tell: no tensor on the host, or no list of mappings on this system.
    """
    storages: dict[int, int] = {}
    for tensor in _tensors(result):
        try:
            if tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):  # a kind of tensor that has no storage
            continue
    total = sum(storages.values())
    if not total:
        return None
    viewed = _within(sorted(known), storages)
    if viewed < total:
        try:
            viewed = _within(_mapped_spans(tuple(files)), storages)
        except OSError:
            return None
    return viewed, total


def _within(spans: Sequence[tuple[int, int]], storages: Mapping[int, int]) -> int:
    """Return the bytes of those *storages* (address to size) that begin in one of *spans*, which are sorted."""
    starts = [start for start, _ in spans]
    viewed = 0
    for address, count in storages.items():
        at = bisect_right(starts, address) - 1
        if at >= 0 and address < spans[at][1]:
            viewed += count
    return viewed


def _mapped_spans(files: tuple[tuple[int, str], ...]) -> list[tuple[int, int]]:
    """Return where *files* are mapped in this process, as addresses (half-open), sorted."""
    # By inode or path: on layered file systems the one, after a rename by another process the other may differ.
    inodes, paths = {str(inode) for inode, _ in files}, {path for _, path in files}
    found = []
    with open(_MAPS, encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and (fields[4] in inodes or fields[5] in paths):
                start, _, stop = fields[0].partition("-")
                found.append((int(start, 16), int(stop, 16)))
    return sorted(found)


def _tensors(result: Any) -> Iterator[Any]:
    """Yield the tensors of *result*; those inside quantised ones in place of these."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    seen: set[int] = set()
    left = [(result, 0)]
    while left:
        item, depth = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if hasattr(item, "__tensor_flatten__"):
                left += [(getattr(item, name), depth) for name in item.__tensor_flatten__()[0]]
            else:
                yield item
        elif isinstance(item, torch.nn.Module):
            left += [(tensor, depth) for module in item.modules() for tensor in _weights(module)]
        elif isinstance(item, Mapping):
            left += [(value, depth) for value in item.values()]
        elif isinstance(item, list | tuple):
            left += [(value, depth) for value in item]
        elif depth == 0 and hasattr(item, "__dict__") and not isinstance(item, type):
            left += [(value, 1) for value in vars(item).values()]  # a pipeline and its components


def _weights(module: Any) -> Iterator[Any]:
    """Yield what a checkpoint may hold of *module* itself: other buffers are made anew by every load."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield buffer
