"""Indexes of sharded weights: ``*.index.json``, the table that says which file has which tensor."""

from __future__ import annotations

import json

from .errors import FormatError

#: Specified (transformers): how the index of pickled shards ends.
BIN_INDEX = ".bin.index.json"
_INDEXES = (".safetensors.index.json", BIN_INDEX)


def is_index(path: str) -> bool:
    """Tell by its name whether *path* is an index."""
    return path.endswith(_INDEXES)


def weight_map(path: str, data: bytes) -> dict[str, str]:
    """Return the table of the index *path*, whose bytes are *data*: name of the tensor → name of the file.

    Raises:
        FormatError: It is no index.
    """
    try:
        table = json.loads(data)["weight_map"]
        if not all(isinstance(shard, str) for shard in table.values()):
            raise ValueError("a file name is not a string")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FormatError(f"{path}: not an index of weight files: {type(e).__name__}: {e}") from e
    return dict(table)
