"""Builds PEFT models: adapter and base model both load while their weights still arrive.

What it returns is what ``AutoPeftModelForCausalLM.from_pretrained("org/adapter")`` returns (or the class for the adapter's
task), bit for bit. The base model is another repository: it is loaded by fastload too, under the same settings and lock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastload_transformers import reading

import fastload
from fastload.errors import FormatError, PluginError, UnsupportedSourceError
from fastload.hookspecs import hookimpl
from fastload.types import ByteRange, Snapshot

if TYPE_CHECKING:
    from fastload.tensors import TensorStream

_CONFIG = "adapter_config.json"
#: Specified (peft.auto): the class of the base model for each task.
_BASES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
#: What concerns the adapter alone; everything else is for the base model.
_OF_ADAPTER = ("adapter_name", "is_trainable", "config", "autocast_adapter_dtype", "ephemeral_gpu_offload",
               "low_cpu_mem_usage", "torch_device")  # fmt: skip


@hookimpl
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: TensorStream, options: Mapping[str, Any]
) -> object | None:
    """Build the adapter's base model and put the adapter on it; ``auto_class=`` overrides the class of the base model.

    Declines other frameworks, and where none was named: repositories without ``adapter_config.json``, or with a
    ``config.json`` beside it.

    Raises:
        UnsupportedSourceError: The adapter does not say what it belongs to.
        PluginError: PEFT is not installed.
    """
    if framework not in (None, "peft"):
        return None
    if framework is None and (_CONFIG not in stream.transfer.files or "config.json" in stream.transfer.files):
        return None
    peft = _import_peft()
    rest = dict(options)
    of_adapter = {name: rest.pop(name) for name in _OF_ADAPTER if name in rest}
    config = _read_config(stream, snapshot)
    rest.setdefault("auto_class", _base_class(config, snapshot))
    base = fastload.load(
        config["base_model_name_or_path"],
        revision=config.get("revision"),
        framework="transformers",
        settings=stream.settings,
        lock=stream.lock,
        **rest,
    )
    _resize(base, stream, snapshot, trusted=bool(rest.get("trust_remote_code")))
    if not any(path.endswith(".safetensors") for path in stream.files()):
        stream.transfer.wait_files()
    with reading(stream) as path:
        adapted: object = peft.PeftModel.from_pretrained(base, str(path), **of_adapter)
    return adapted


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as e:
        raise PluginError(
            f"building this model needs peft: {e}", plugin="peft", hint='pip install "fastload-weights[peft]"'
        ) from e
    return peft


def _read_config(stream: TensorStream, snapshot: Snapshot) -> dict[str, Any]:
    """Return the adapter's config, which names a base model."""
    view = stream.transfer.files.get(_CONFIG)
    try:
        config = json.loads(view.read(ByteRange(0, view.size))) if view is not None else {}
    except ValueError as e:
        raise FormatError(f"{_CONFIG}: not JSON: {e}") from e
    if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
        raise UnsupportedSourceError(
            f"{snapshot.source}: no {_CONFIG} names a base model",
            hint="load the base model first and put the adapter on it with PEFT's own calls",
        )
    return config


def _base_class(config: Mapping[str, Any], snapshot: Snapshot) -> str:
    """Return the name of transformers' class that builds the base model."""
    known = _BASES.get(str(config.get("task_type")))
    mapping = config.get("auto_mapping") or {}
    if known is None and str(mapping.get("parent_library", "")).partition(".")[0] == "transformers":
        known = mapping.get("base_model_class")
    if known is None:
        raise UnsupportedSourceError(
            f"{snapshot.source}: {_CONFIG} names neither a task nor a class of transformers",
            hint='pass auto_class="AutoModelForCausalLM" or another class of the base model',
        )
    return str(known)


def _resize(base: Any, stream: TensorStream, snapshot: Snapshot, *, trusted: bool) -> None:
    """Give *base* room for the tokens that the adapter's tokenizer adds, as PEFT's auto classes do."""
    if "tokenizer_config.json" not in stream.transfer.files or not hasattr(base, "get_input_embeddings"):
        return
    import transformers

    tokens = len(transformers.AutoTokenizer.from_pretrained(snapshot.path, trust_remote_code=trusted))
    if tokens > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(tokens)
