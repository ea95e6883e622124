"""What diffusers loads from other places than a folder of ``from_pretrained``: single files, LoRA weights, small parts.

    fastload.load("org/model", single_file="v1-5.safetensors", auto_class="StableDiffusionPipeline", config="org/model")
    fastload.load("org/style", into=pipeline)                      # load_lora_weights
    fastload.load("org/model", subfolder="scheduler")              # or tokenizer, feature_extractor …

Each runs diffusers' own call on the files of the snapshot.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastload_transformers import building, failure, read_config

from fastload.errors import NotFoundError, SettingsError, UnsupportedSourceError
from fastload.types import Snapshot

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

_SAFETENSORS = ".safetensors"
#: Specified (diffusers): the name that load_lora_weights looks for first.
_LORA = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
#: Specified (diffusers, load_lora_weights): what in a file's name says that it is none.
_NO_LORA = ("scheduler", "optimizer", "checkpoint")


def load_single_file(
    chosen: Any, snapshot: Snapshot, stream: TensorStream, arguments: Mapping[str, Any], cache: Mapping[str, Any]
) -> Any:
    """Return what ``chosen.from_single_file`` makes of one file of the snapshot, which is read while it arrives.

    Args:
        chosen: A class of diffusers.
        arguments: Those of ``from_single_file``, with ``single_file``, the path of the file.
        cache: Where diffusers looks for further repositories.

    Raises:
        NotFoundError: The repository has no such file.
        UnsupportedSourceError: The class does not load single files.
    """
    rest = dict(arguments)
    name = str(rest.pop("single_file"))
    if name not in snapshot.files:
        raise NotFoundError(
            f"{snapshot.source} has no file {name}", hint="single_file= is a path within the repository"
        )
    if not hasattr(chosen, "from_single_file"):
        raise UnsupportedSourceError(
            f"{chosen.__name__} cannot be loaded from a single file",
            hint='auto_class= names the class, for example auto_class="StableDiffusionPipeline"',
        )
    if rest.get("config") == snapshot.source:  # its configuration is here already
        rest["config"] = str(snapshot.path)
    if rest.get("config") is not None:
        rest["config"] = str(rest["config"])
    streams = name.endswith(_SAFETENSORS) and not rest.get("disable_mmap")
    with _served(stream, streams=streams) as path:
        return chosen.from_single_file(str(path / name), **cache, **rest)


def load_lora(snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]) -> object:
    """Return the pipeline ``into=``, which has taken the LoRA weights of the snapshot in.

    The file is complete and verified before: what was once put into a pipeline could not be taken back.

    Raises:
        SettingsError: An option means nothing here, or it is not clear which of several files is meant.
    """
    rest = dict(options)
    pipeline = rest.pop("into")
    rest.pop("device", None)
    if rest.pop("dtype", None) is not None:
        raise SettingsError("dtype= means nothing with into= a pipeline", hint="LoRA weights take that of their layers")
    folder = str(rest.get("subfolder") or "").strip("/")
    if rest.get("weight_name") is None:
        names = [PurePosixPath(p).name for p in stream.files() if str(PurePosixPath(p).parent) == (folder or ".")]
        found = sorted(n for n in names if not any(word in n for word in _NO_LORA))
        if len(found) > 1 and not set(found) & set(_LORA):
            raise SettingsError(
                f"{snapshot.source} holds {len(found)} files of weights: {', '.join(found[:8])}",
                hint=f"choose one with weight_name={found[0]!r}",
            )
    stream.transfer.wait_files()
    with building:
        pipeline.load_lora_weights(str(snapshot.path), **rest)
    return pipeline


def find_part(snapshot: Snapshot, stream: TensorStream, subfolder: str) -> Any:
    """Return the class that ``model_index.json`` names for the part in *subfolder*, or ``None``.

    Only for parts without a ``config.json``: schedulers, tokenizers, processors.

    Raises:
        UnsupportedSourceError: The library does not know the class, or is not installed.
    """
    name = subfolder.strip("/")
    if not name or f"{name}/config.json" in snapshot.files:
        return None
    entry = read_config(stream, "", "model_index.json").get(name)
    if not isinstance(entry, list) or len(entry) != 2:
        return None
    library, kind = entry
    if not isinstance(library, str) or not isinstance(kind, str) or library not in ("diffusers", "transformers"):
        return None
    try:
        return getattr(importlib.import_module(library), kind)
    except (ImportError, AttributeError) as e:
        raise UnsupportedSourceError(
            f"{snapshot.source}: {name} is a {kind} of {library}: {e}", hint=f"install {library}, or a newer one"
        ) from e


@contextmanager
def _served(stream: TensorStream, *, streams: bool) -> Iterator[Path]:
    """Give the folder to load from; an error within is ours where it came from the files."""
    if not streams:
        stream.transfer.wait_files()
    before = sys.exception()
    try:
        with stream.served() as path, building:
            yield path
    except Exception as e:  # the framework may have wrapped our error in one of its own
        error = failure(stream, e, before)
        if error is not None and error is not e:
            raise error from e
        raise
