"""Builds transformers models: their own ``from_pretrained`` runs while the weights still arrive.

What it returns is what ``from_pretrained("org/model")`` returns, bit for bit. It reads from a folder that is laid out
like a Hugging Face cache, by the model's own name, so that names, messages, remote code and adapters come out alike.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastload.errors import FastloadError, FormatError, PluginError, SettingsError, UnsupportedSourceError
from fastload.hookspecs import hookimpl
from fastload.types import ByteRange, Snapshot

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

#: What from_pretrained takes and fastload decides, and what to say instead.
_DECIDED = {
    "force_download": "fastload never loads a file whose digest does not match; delete the cached one if you must",
    "proxies": "set HTTPS_PROXY",
}

#: One build at a time: while transformers (or diffusers) builds a model it changes what torch does in the whole process.
building = threading.RLock()


@hookimpl
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Build the model that ``config.json`` names, or that ``auto_class=`` says.

    Declines other frameworks, and where none was named: diffusers' pipelines and repositories without ``architectures``.

    Raises:
        UnsupportedSourceError: transformers does not know the class.
        PluginError: transformers is not installed.
    """
    config = read_config(stream, str(options.get("subfolder") or ""))
    if framework is None:
        pipeline = "model_index.json" in snapshot.files and not options.get("subfolder")
        if pipeline or not config.get("architectures"):
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


def read_config(stream: TensorStream, subfolder: str, name: str = "config.json") -> dict[str, Any]:
    """Return ``config.json``, or another table; empty where there is none."""
    path = f"{subfolder.strip('/')}/{name}".lstrip("/")
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

    def build(path: Path) -> Any:
        place = place_of(path, snapshot, stream, config)
        if str(getattr(model_class, "__name__", "")).startswith("AutoModel") and place.get("local_files_only"):
            told = {**adapter_place(place), **(arguments.get("adapter_kwargs") or {})}
            return model_class.from_pretrained(**place, **{**arguments, "adapter_kwargs": told})
        return model_class.from_pretrained(**place, **arguments)

    with reading(stream, **onward(arguments)) as path:
        model = build(path)
    if path != snapshot.path and is_offloaded(model):
        # Offloaded weights are read later, from the path: it must be one that stays.
        stream.transfer.wait_files()
        del model
        with reading(stream) as path:
            model = build(path)
    stream.check_index()
    return model


def adapter_place(place: Mapping[str, Any]) -> dict[str, Any]:
    """Return where auto classes are to look for an adapter: with PEFT installed they ask the hub, unless told again."""
    return {name: place[name] for name in ("cache_dir", "local_files_only") if name in place}


@contextmanager
def reading(stream: TensorStream, **how: Any) -> Iterator[Path]:
    """Give a folder for a framework's own loading code; if that fails because of the files, our error tells it.

    Args:
        how: Arguments of :meth:`TensorStream.served`.
    """
    before = sys.exception()
    try:
        with stream.served(**how) as path, building:
            yield path
    except Exception as e:  # the framework may have wrapped our error in one of its own
        error = failure(stream, e, before)
        if error is not None and error is not e:
            raise error from e
        raise


def _streams(stream: TensorStream, arguments: Mapping[str, Any]) -> bool:
    """Tell whether from_pretrained will read the weights through ``safe_open``, and not again after it returned."""
    if arguments.get("disable_mmap") or arguments.get("gguf_file") or arguments.get("use_safetensors") is False:
        return False
    device_map = arguments.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        return False
    return any(path.endswith(".safetensors") for path in stream.files())


def onward(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return how tensors are to be served, given where from_pretrained will send each that it takes out of a file."""
    import torch

    device_map = arguments.get("device_map")
    if device_map is None or not torch.cuda.is_available():
        return {}
    if isinstance(device_map, dict):
        return {"defer": True, "ahead": device_map.get("") if len(device_map) == 1 else None}
    named = not isinstance(device_map, str) or device_map.partition(":")[0] in ("cpu", "cuda")
    return {"defer": True, "ahead": device_map if named else None}


def is_offloaded(result: Any) -> bool:
    """Tell whether the model, or the first of what from_pretrained returned, has weights that are read from disk later."""
    model = result[0] if isinstance(result, tuple) else result
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


def place_of(path: Path, snapshot: Snapshot, stream: TensorStream, config: Mapping[str, Any]) -> dict[str, Any]:
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


def failure(stream: TensorStream, raised: BaseException, before: BaseException | None) -> FastloadError | None:
    """Return our error behind *raised*: of the transfer, of one of its files, or one that the framework wrapped.

    Args:
        before: What was being handled when the framework was called; what lies behind it is no concern of ours.
    """
    views = stream.transfer.files.values()
    found = stream.transfer.error or next((view.error for view in views if view.error is not None), None)
    behind: BaseException | None = raised
    while found is None and behind is not None and behind is not before:
        if isinstance(behind, FastloadError):
            found = behind
        elif type(behind).__name__ == "SafetensorError":  # of a file that was complete: ours names it
            try:
                stream.metadata()
            except FormatError as e:
                found = e
        behind = behind.__cause__ or behind.__context__
    return found
