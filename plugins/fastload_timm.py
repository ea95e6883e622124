"""Builds timm models: ``timm.create_model`` runs while the weights still arrive.

What it returns is what ``timm.create_model("hf-hub:org/model", pretrained=True)`` returns, bit for bit. timm copies each
weight into a model that it made before, so that they are in memory twice for a moment, here as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastload_transformers import read_config, reading

from fastload.errors import PluginError, SettingsError
from fastload.hookspecs import hookimpl
from fastload.types import Snapshot

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

#: What create_model takes and fastload decides, and what to say instead.
_DECIDED = {
    "pretrained": "leave it out: weights are what is loaded",
    "model_name": "the repository's config.json names the model",
    "checkpoint_path": "load other weights into the model afterwards",
}


@hookimpl
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Build the model whose ``architecture`` the ``config.json`` names.

    Declines other frameworks, and where none was named: repositories whose ``config.json`` is not timm's.

    Raises:
        PluginError: timm is not installed.
    """
    if framework not in (None, "timm"):
        return None
    if framework is None:
        config = read_config(stream, "")
        if "architectures" in config or not isinstance(config.get("architecture"), str) or options.get("subfolder"):
            return None
    for name in _DECIDED.keys() & options.keys():
        raise SettingsError(f"{name}= is for fastload to decide, not for create_model", hint=_DECIDED[name])
    timm = _import_timm()
    rest = dict(options)
    device, dtype = rest.pop("device", None), rest.pop("dtype", None)
    if not any(path.endswith(".safetensors") for path in stream.files()):
        stream.transfer.wait_files()
    with reading(stream) as path:
        model = timm.create_model(f"local-dir:{path}", pretrained=True, **rest)
    _name(model, snapshot)
    sent: object = _sent(model, device, dtype)
    return sent


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as e:
        raise PluginError(
            f"building this model needs timm: {e}", plugin="timm", hint='pip install "fastload-weights[timm]"'
        ) from e
    return timm


def _name(model: Any, snapshot: Snapshot) -> None:
    """Put where the model comes from in place of the folder that it was read from."""
    revision = "" if snapshot.revision in ("main", "") else f"@{snapshot.revision}"
    place = {"file": ("hf_hub_id", snapshot.source + revision), "source": ("source", "hf-hub")}
    if snapshot.path.parts[-2:] != ("snapshots", snapshot.commit):
        place = {"file": ("file", str(snapshot.path))}
    for module in model.modules():  # wrappers, for features alone, have the same table or a copy
        for known in (vars(module).get("pretrained_cfg"), vars(module).get("default_cfg")):
            if isinstance(known, dict) and "file" in known:
                named = dict(place.get(key, (key, value)) for key, value in known.items())
                known.clear()
                known.update(named)


def _sent(model: Any, device: Any, dtype: Any) -> Any:
    """Return *model* on *device*, as *dtype*."""
    import torch

    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if device is not None and str(device) != "cpu":
        model = model.to(device)
    return model if dtype is None else model.to(dtype)
