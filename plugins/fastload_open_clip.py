"""Builds OpenCLIP models: ``open_clip.create_model_from_pretrained`` runs while the weights still arrive.

What it returns is what ``create_model_from_pretrained("hf-hub:org/model")`` returns, the model and its preprocessing
(``return_transform=False``: the model alone), bit for bit. OpenCLIP copies each weight into a model that it made before, so
that they are in memory twice for a moment, here as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastload_transformers import reading

from fastload.errors import PluginError, SettingsError
from fastload.hookspecs import hookimpl
from fastload.types import Snapshot

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

_CONFIG = "open_clip_config.json"
#: What create_model_from_pretrained takes and fastload decides, and what to say instead.
_DECIDED = {
    "pretrained": "leave it out: the repository's own weights are what is loaded",
    "model_name": f"the repository's {_CONFIG} describes the model",
    "dtype": 'pass precision="fp16" or another of OpenCLIP\'s',
}


@hookimpl(trylast=True)  # such a repository may be transformers' or timm's too, and is theirs unless asked for
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Build the model that ``open_clip_config.json`` describes.

    Declines other frameworks, and where none was named: repositories without that file.

    Raises:
        PluginError: OpenCLIP is not installed.
    """
    if framework not in (None, "open_clip"):
        return None
    if framework is None and (_CONFIG not in stream.transfer.files or options.get("subfolder")):
        return None
    given = {name: value for name, value in options.items() if value is not None}
    for name in _DECIDED.keys() & given.keys():
        raise SettingsError(f"{name}= is for fastload to decide, not for open_clip", hint=_DECIDED[name])
    open_clip = _import_open_clip()
    if not any(path.endswith(".safetensors") for path in stream.files()):
        stream.transfer.wait_files()
    with reading(stream) as path:
        built: object = open_clip.create_model_from_pretrained(f"local-dir:{path}", **given)
    return built


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as e:
        raise PluginError(
            f"building this model needs open_clip: {e}",
            plugin="open_clip",
            hint='pip install "fastload-weights[open-clip]"',
        ) from e
    return open_clip
