"""Builds diffusers pipelines and models: their own ``from_pretrained`` runs while the weights still arrive.

What it returns is what ``from_pretrained("org/model")`` returns, bit for bit. The weights of all components travel at once;
the framework takes one component after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastload_diffusers_files import find_part, load_lora, load_single_file
from fastload_transformers import building, failure, is_offloaded, onward, place_of, read_config

from fastload.errors import DeviceError, PluginError, SettingsError, UnsupportedSourceError
from fastload.hookspecs import hookimpl
from fastload.types import Snapshot

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

#: What from_pretrained takes and fastload decides, and what to say instead.
_DECIDED = {
    "force_download": "fastload never loads a file whose digest does not match; delete the cached one if you must",
    "proxies": "set HTTPS_PROXY",
}
_FRAMEWORKS = ("diffusers", "transformers", "torch")
#: Attributes of modules that hold thousands of things, none of which has a name of its own.
_WEIGHTS = ("_parameters", "_buffers")
#: Arguments with which from_pretrained reads whole files by ways of its own.
_BYPASSING = ("disable_mmap", "use_flashpack", "use_onnx")


@hookimpl
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Build the pipeline of ``model_index.json``, or the model whose ``config.json`` names a class of diffusers.

    Or what one file of the repository holds (``single_file=``), a scheduler or tokenizer (``subfolder=``), or put LoRA
    weights into a pipeline (``into=``). Declines other frameworks, and where none was named: folders that have none of these.

    Raises:
        UnsupportedSourceError: diffusers does not know the class.
        PluginError: diffusers is not installed.
    """
    if framework not in (None, "diffusers"):
        return None
    if options.get("into") is not None:
        return load_lora(snapshot, stream, options) if hasattr(options["into"], "load_lora_weights") else None
    subfolder = str(options.get("subfolder") or "")
    pipeline = "model_index.json" in snapshot.files and not subfolder.strip("/")
    single_file = options.get("single_file") is not None
    part = None if single_file else find_part(snapshot, stream, subfolder)
    config = {} if pipeline else read_config(stream, subfolder)
    named = pipeline or single_file or part is not None or isinstance(config.get("_class_name"), str)
    if framework is None and not named:
        return None
    for name in _DECIDED.keys() & options.keys():
        raise SettingsError(f"{name}= is for fastload to decide, not for from_pretrained", hint=_DECIDED[name])
    diffusers = _import_diffusers()
    rest = dict(options)
    if single_file and pipeline and rest.get("auto_class") is None:  # the repository says what it is
        config = read_config(stream, "", "model_index.json")
        rest.setdefault("config", snapshot.source)
    named_class = config.get("_class_name") if single_file or not pipeline else "DiffusionPipeline"
    chosen = rest.pop("auto_class", None) or part or named_class
    if chosen is None or isinstance(chosen, str):
        chosen = _class(diffusers, snapshot, chosen)
    device = rest.pop("device", None)
    if part is not None:
        rest.pop("dtype", None)
        return chosen.from_pretrained(**place_of(snapshot.path, snapshot, stream, config), **rest)  # type: ignore[no-any-return]
    _take_dtype(rest)
    if single_file:
        built = load_single_file(chosen, snapshot, stream, rest, _cache(snapshot))
        return built if device is None or str(device) == "cpu" else built.to(device)  # type: ignore[no-any-return]
    if device is None or str(device) == "cpu" or rest.get("device_map") is not None:
        return _load(chosen, snapshot, stream, config, rest, pipeline=pipeline)
    mappable = rest.get("low_cpu_mem_usage") is not False and not (pipeline and _connects(diffusers, stream, chosen))
    with _mapped(device, mappable, pipeline=pipeline) as more:
        built = _load(chosen, snapshot, stream, config, {**rest, **more}, pipeline=pipeline)
    whole: Any = built[0] if isinstance(built, tuple) else built  # with output_loading_info
    whole.to(device)  # components that the caller brought, and all of it where it could not be mapped
    return built


@contextmanager
def _mapped(device: Any, mappable: bool, *, pipeline: bool) -> Iterator[dict[str, Any]]:
    """Give the arguments with which from_pretrained puts every weight on *device* as it reads it; none where it cannot."""
    import torch

    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise DeviceError(f"device={device!r} is not a torch device: {e}", hint='"cpu" or "cuda"') from e
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type == "cuda" and (target.index or 0) >= count:
        raise DeviceError(
            f"there is no device {target}: torch sees {count} of that kind", hint="torch.cuda.is_available()"
        )
    if target.type != "cuda" or not mappable:
        yield {}
    elif not pipeline:
        yield {"device_map": {"": target}}
    else:  # which knows devices by their kind alone, and takes the current one of it
        with torch.cuda.device(target):
            yield {"device_map": "cuda"}


def _connects(diffusers: Any, stream: TensorStream, chosen: Any) -> bool:
    """Tell whether the pipeline brings others along, which from_pretrained refuses to do with a device map."""
    named = str(read_config(stream, "", "model_index.json").get("_class_name"))
    return any(getattr(c, "_load_connected_pipes", False) for c in (chosen, getattr(diffusers, named, None)))


def _import_diffusers() -> Any:
    try:
        import diffusers
        import torch  # noqa: F401  (diffusers can be imported without it, and then has no models)
    except ImportError as e:
        raise PluginError(
            f"building this model needs torch and diffusers: {e}",
            plugin="diffusers",
            hint='pip install "fastload-weights[diffusers]"',
        ) from e
    return diffusers


def _class(diffusers: Any, snapshot: Snapshot, name: str | None) -> Any:
    """Return the class of diffusers that is called *name*."""
    found = getattr(diffusers, name, None) if name else None
    if found is not None and hasattr(found, "from_pretrained"):
        return found
    if not name:
        raise UnsupportedSourceError(
            f"{snapshot.source}: config.json names no class of diffusers",
            hint='pass auto_class="UNet2DConditionModel" or another class, or framework="transformers"',
        )
    raise UnsupportedSourceError(
        f"{snapshot.source}: diffusers {diffusers.__version__} has no class {name!r}", hint="upgrade diffusers"
    )


def _take_dtype(options: dict[str, Any]) -> None:
    """Let ``dtype`` be what from_pretrained takes: types of torch, one or a table of them; ``torch_dtype`` goes before it."""
    import torch

    def parse(dtype: Any) -> Any:
        found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        return found if isinstance(found, torch.dtype) else dtype  # diffusers has its own words for others

    dtype = options.pop("dtype", None)
    if dtype is not None and options.get("torch_dtype") is None:
        options["dtype"] = {k: parse(v) for k, v in dtype.items()} if isinstance(dtype, dict) else parse(dtype)


def _load(
    chosen: Any,
    snapshot: Snapshot,
    stream: TensorStream,
    config: Mapping[str, Any],
    arguments: dict[str, Any],
    *,
    pipeline: bool,
) -> object:
    def build(path: Path) -> Any:
        # A pipeline's components are named by their folders in any case, so it is loaded from a folder at once.
        place = _folder(path, snapshot) if pipeline else place_of(path, snapshot, stream, config)
        return chosen.from_pretrained(place.pop("pretrained_model_name_or_path"), **place, **arguments)

    onto = onward(arguments)
    if pipeline and arguments.get("device_map") == "cuda":
        onto["ahead"] = _current_device()
    stream.check_shards()
    if not _streams(stream, arguments):
        stream.transfer.wait_files()
    before = sys.exception()
    try:
        with stream.served(**onto) as path, building:
            built = build(path)
        if path != snapshot.path and any(map(is_offloaded, _models(built))):
            # Offloaded weights are read later, from the path: it must be one that stays.
            stream.transfer.wait_files()
            del built
            path = snapshot.path
            with building:
                built = build(path)
    except Exception as e:  # the framework may have wrapped our error in one of its own
        error = failure(stream, e, before)
        if error is not None and error is not e:
            raise error from e
        raise
    stream.check_index()
    if pipeline:
        _rename(built, str(path), snapshot)
    return built


def _current_device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _streams(stream: TensorStream, arguments: Mapping[str, Any]) -> bool:
    """Tell whether from_pretrained will read the weights through ``safe_open``, and not again after it returned."""
    if arguments.get("use_safetensors") is False or any(arguments.get(name) for name in _BYPASSING):
        return False
    device_map = arguments.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        return False
    return any(path.endswith(".safetensors") for path in stream.files())


def _folder(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Return the arguments that make a pipeline come from *path*, and other repositories from the cache of *snapshot*."""
    return {"pretrained_model_name_or_path": str(path), **_cache(snapshot)}


def _cache(snapshot: Snapshot) -> dict[str, Any]:
    """Return the argument that names the cache of *snapshot*, if it is in one."""
    in_cache = snapshot.path.parts[-2:] == ("snapshots", snapshot.commit)
    return {"cache_dir": snapshot.path.parents[2]} if in_cache else {}


def _models(built: Any) -> list[Any]:
    return list(getattr(built, "components", {"": built}).values())


# -- names of folders ----------------------------------------------------------------------------------------------


def _rename(pipeline: Any, served: str, snapshot: Snapshot) -> None:
    """Put the pipeline's name, and the snapshot's path, where from_pretrained left that of the folder it read from."""
    from_hub = snapshot.path.parts[-2:] == ("snapshots", snapshot.commit)
    pipeline.register_to_config(_name_or_path=snapshot.source if from_hub else str(snapshot.path))
    if served == str(snapshot.path):
        return
    for part in _parts(list(pipeline.components.values())):
        if isinstance(part, dict):
            part.update(_renamed(part, served, snapshot))
        else:
            vars(part).update(_renamed(vars(part), served, snapshot))
            if hasattr(type(part), "register_to_config"):  # frozen
                part.register_to_config(**_renamed(part.config, served, snapshot))


def _renamed(names: Mapping[Any, Any], served: str, snapshot: Snapshot) -> dict[Any, Any]:
    paths = {key: value for key, value in names.items() if isinstance(value, str) and value.startswith(served)}
    return {key: f"{snapshot.path}{value[len(served) :]}" for key, value in paths.items()}


def _parts(roots: list[Any]) -> Iterator[Any]:
    """Yield all objects and dicts of the frameworks that hang on *roots*, without the weights."""
    seen: set[int] = set()
    theirs: dict[type, bool] = {}
    left = list(roots)
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, list | tuple):
            left += part
        elif type(part) is dict:
            left += part.values()
            if part:
                yield part
        elif not isinstance(part, type) and hasattr(part, "__dict__") and _is_theirs(type(part), theirs):
            left += [value for name, value in vars(part).items() if name not in _WEIGHTS]
            if not isinstance(part, dict):
                yield part


def _is_theirs(kind: type, known: dict[type, bool]) -> bool:
    """Tell whether *kind* is a framework's class, or derived from one."""
    if kind not in known:
        known[kind] = any(base.__module__.partition(".")[0] in _FRAMEWORKS for base in kind.__mro__)
    return known[kind]
