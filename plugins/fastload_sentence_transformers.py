"""Builds Sentence Transformers models: their own classes load while the weights still arrive.

What it returns is what ``SentenceTransformer("org/model")`` returns (or ``SparseEncoder``, ``CrossEncoder``: the class that
wrote the model), bit for bit: for ``framework="sentence_transformers"``, for one of their classes as ``auto_class``, and for
repositories with a ``modules.json`` that are no transformers model too (most are, and give that where nothing is named).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastload_transformers import adapter_place, place_of, reading

from fastload.errors import FormatError, PluginError, UnsupportedSourceError
from fastload.hookspecs import hookimpl
from fastload.types import ByteRange, Snapshot

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

_NAME = "sentence_transformers"
_MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"


@hookimpl(tryfirst=True)  # one of their classes decides before what the files look like
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Build the model that ``modules.json`` describes; ``auto_class=`` overrides its class.

    Declines other frameworks, and where none was named: repositories without ``modules.json``, those that are a
    transformers model, and an ``auto_class`` that is not one of Sentence Transformers'.

    Raises:
        UnsupportedSourceError: Sentence Transformers does not know the class.
        PluginError: It is not installed.
    """
    if framework not in (None, _NAME):
        return None
    rest = dict(options)
    chosen = rest.pop("auto_class", None)
    if framework is None and (_MODULES not in stream.transfer.files or rest.get("subfolder")):
        return None
    if framework is None and not ("config.json" not in stream.transfer.files if chosen is None else _is_theirs(chosen)):
        return None
    library = _import_sentence_transformers()
    if chosen is None or isinstance(chosen, str):
        chosen = _class(library, snapshot, chosen or _written_by(stream))
    if not any(path.endswith(".safetensors") for path in stream.files()):
        stream.transfer.wait_files()
    with reading(stream) as path:
        place = place_of(path, snapshot, stream, {})
        model: object = chosen(**_named(place), **_arguments(rest, place))
    _name_base(model, snapshot)
    return model


def _is_theirs(chosen: Any) -> bool:
    if not isinstance(chosen, str):
        return str(getattr(chosen, "__module__", "")).partition(".")[0] == _NAME
    return hasattr(_import_sentence_transformers(), chosen)


def _import_sentence_transformers() -> Any:
    try:
        import sentence_transformers
    except ImportError as e:
        raise PluginError(
            f"building this model needs sentence-transformers: {e}",
            plugin=_NAME,
            hint='pip install "fastload-weights[sentence-transformers]"; framework="transformers" gives its first module alone',
        ) from e
    return sentence_transformers


def _written_by(stream: TensorStream) -> str:
    """Return the name of the class that saved the model."""
    view = stream.transfer.files.get(_SETTINGS)
    if view is None:
        return "SentenceTransformer"
    try:
        return str(json.loads(view.read(ByteRange(0, view.size))).get("model_type") or "SentenceTransformer")
    except (ValueError, AttributeError) as e:
        raise FormatError(f"{_SETTINGS}: not a JSON object: {e}") from e


def _class(library: Any, snapshot: Snapshot, name: str) -> Any:
    found = getattr(library, name, None)
    if isinstance(found, type):
        return found
    raise UnsupportedSourceError(
        f"{snapshot.source}: sentence-transformers {library.__version__} has no class {name!r}",
        hint="upgrade sentence-transformers",
    )


def _named(place: Mapping[str, Any]) -> dict[str, Any]:
    """Return *place* in the words of Sentence Transformers."""
    words = {"pretrained_model_name_or_path": "model_name_or_path", "cache_dir": "cache_folder"}
    return {words.get(name, name): str(value) if name in words else value for name, value in place.items()}


def _arguments(options: dict[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the class gets: *options*, with ``dtype`` among the model's own."""
    dtype = options.pop("dtype", None)
    of_model = {} if dtype is None else {"dtype": dtype}
    if place.get("local_files_only"):
        of_model["adapter_kwargs"] = adapter_place(place)
    if of_model:
        options["model_kwargs"] = {**of_model, **(options.get("model_kwargs") or {})}
    device = options.pop("device", None)
    if "device_map" not in (options.get("model_kwargs") or {}):
        options["device"] = None if device is None else str(device)
    return options


def _name_base(model: Any, snapshot: Snapshot) -> None:
    """Put into the model's card what its class asks the hub for: name and commit, which are known here."""
    card = getattr(model, "model_card_data", None)
    if card is None or snapshot.path.parts[-2:] != ("snapshots", snapshot.commit):
        return
    card.local_files_only = False
    card.base_model = snapshot.source
    card.base_model_revision = snapshot.commit if snapshot.revision == "main" else snapshot.revision
