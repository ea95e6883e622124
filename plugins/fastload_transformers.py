"""Builds transformers models: their own ``from_pretrained`` runs while the weights still arrive.

What it returns is what ``from_pretrained("org/model")`` returns, bit for bit. It reads from a folder that is laid out
like a Hugging Face cache, by the model's own name, so that names, messages, remote code and adapters come out alike.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastload.errors import FastloadError, FormatError, PluginError, SettingsError, UnsupportedSourceError
from fastload.hookspecs import hookimpl
from fastload.tensors import TensorStream
from fastload.types import ByteRange, Snapshot

#: What from_pretrained takes and fastload decides, and what to say instead.
_DECIDED = {
    "force_download": "fastload never loads a file whose digest does not match; delete the cached one if you must",
    "proxies": "set HTTPS_PROXY",
}

#: One build at a time: while transformers builds a model it changes what torch does in the whole process.
_building = threading.RLock()


@hookimpl
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Build the model that ``config.json`` names, or that ``auto_class=`` says.

    Declines other frameworks, and where none was named: diffusers' layouts and repositories without ``architectures``.

    Raises:
        UnsupportedSourceError: transformers does not know the class.
        PluginError: transformers is not installed.
    """
    config = _config(stream, str(options.get("subfolder") or ""))
    if framework is None:
        if "model_index.json" in snapshot.files or not config.get("architectures"):
            return None
    elif framework != "transformers":
        return None
    for name in _DECIDED.keys() & options.keys():
        raise SettingsError(f"{name}= is for fastload to decide, not for from_pretrained", hint=_DECIDED[name])
    rest = dict(options)
    source = _import_transformers()
    model_class = _model_class(source, snapshot, config, rest)
    return _load(model_class, snapshot, stream, config, _arguments(rest))


def _import_transformers() -> Any:
    try:
        import torch  # noqa: F401  (transformers can be imported without it, and then has no models)
        import transformers
    except ImportError as e:
        raise PluginError(
            f"building this model needs torch and transformers: {e}",
            plugin="transformers",
            hint='pip install "fastload-weights[transformers]"',
        ) from e
    return transformers


def _config(stream: TensorStream, subfolder: str) -> dict[str, Any]:
    """Return ``config.json``; empty where there is none."""
    path = f"{subfolder.strip('/')}/config.json".lstrip("/")
    view = stream.transfer.files.get(path)
    if view is None:
        return {}
    try:
        config = json.loads(view.read(ByteRange(0, view.size)))
    except ValueError as e:
        raise FormatError(f"{path}: not JSON: {e}") from e
    if not isinstance(config, dict):
        raise FormatError(f"{path}: a JSON {type(config).__name__}, not an object")
    return config


def _model_class(transformers: Any, snapshot: Snapshot, config: Mapping[str, Any], options: dict[str, Any]) -> Any:
    """Return the class whose ``from_pretrained`` builds the model; takes ``auto_class`` out of *options*."""
    chosen = options.pop("auto_class", None)
    if chosen is not None and not isinstance(chosen, str):
        return chosen
    architecture = str((config.get("architectures") or [""])[0])
    remote = _remote_class(config, architecture)
    name = chosen or (remote if options.get("trust_remote_code") and remote else architecture)
    found = getattr(transformers, name, None) if name else None
    if found is not None and hasattr(found, "from_pretrained"):
        return found
    if not name:
        raise UnsupportedSourceError(
            f"{snapshot.source}: config.json names no architecture", hint='pass auto_class="AutoModel" or another class'
        )
    hint = 'upgrade transformers, or pass auto_class="AutoModel…"'
    if remote and not chosen:
        hint = "the repository brings its own code: read it, then pass trust_remote_code=True"
    raise UnsupportedSourceError(
        f"{snapshot.source}: transformers {transformers.__version__} has no class {name!r}", hint=hint
    )


def _remote_class(config: Mapping[str, Any], architecture: str) -> str:
    """Return the name of the ``AutoModel…`` class under which the repository's own code has *architecture*."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        return ""
    models = {str(auto): str(ref) for auto, ref in auto_map.items() if str(auto).startswith("AutoModel")}
    matching = [auto for auto, ref in models.items() if ref.rpartition(".")[2] == architecture]
    return next(iter([*matching, *(models if not architecture else ())]), "")


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return what from_pretrained gets: *options*, with ``device`` as a device map."""
    device = options.pop("device", None)
    if options.get("dtype") is None:
        options.pop("dtype", None)
    if device is not None and str(device) != "cpu" and options.get("device_map") is None:
        options["device_map"] = {"": device}
    return options


def _load(
    model_class: Any, snapshot: Snapshot, stream: TensorStream, config: Mapping[str, Any], arguments: dict[str, Any]
) -> object:
    stream.check_shards()
    if not _streams(stream, arguments):
        stream.transfer.wait_files()
    try:
        with stream.served() as path, _building:
            model = model_class.from_pretrained(**_place(path, snapshot, stream, config), **arguments)
            whole = path == snapshot.path
        if not whole and _offloaded(model):
            # Offloaded weights are read later, from the path: it must be one that stays.
            stream.transfer.wait_files()
            del model
            with _building:
                place = _place(snapshot.path, snapshot, stream, config)
                model = model_class.from_pretrained(**place, **arguments)
    except Exception as e:  # the framework may have wrapped our error in one of its own
        error = _failure(stream)
        if error is not None and error is not e:
            raise error from e
        raise
    stream.check_index()
    return model


def _streams(stream: TensorStream, arguments: Mapping[str, Any]) -> bool:
    """Tell whether from_pretrained will read the weights through ``safe_open``, and not again after it returned."""
    if arguments.get("disable_mmap") or arguments.get("gguf_file") or arguments.get("use_safetensors") is False:
        return False
    device_map = arguments.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        return False
    return any(path.endswith(".safetensors") for path in stream.files())


def _offloaded(result: Any) -> bool:
    model = result[0] if isinstance(result, tuple) else result
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


def _place(path: Path, snapshot: Snapshot, stream: TensorStream, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that make from_pretrained read from *path*, by the model's name where that is possible."""
    if path.parts[-3:] != ("models--" + snapshot.source.replace("/", "--"), "snapshots", snapshot.commit):
        return {"pretrained_model_name_or_path": path}
    if "adapter_config.json" in stream.transfer.files:
        return {"pretrained_model_name_or_path": path}  # its base model is another repository, in the real cache
    refs = [str(ref) for ref in (config.get("auto_map") or {}).values()]
    elsewhere = any("--" in ref and ref.partition("--")[0] != snapshot.source for ref in refs)
    return {
        "pretrained_model_name_or_path": snapshot.source,
        "cache_dir": path.parents[2],
        "revision": snapshot.commit,
        "local_files_only": not elsewhere,
    }


def _failure(stream: TensorStream) -> FastloadError | None:
    """Return the error of the transfer, or of one of its files."""
    views = stream.transfer.files.values()
    return stream.transfer.error or next((view.error for view in views if view.error is not None), None)
