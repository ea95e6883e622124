"""What differs between two models, down to strides and ties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

#: Attributes that hold what is compared in another way, or that are the same question asked twice.
_COMPARED_ELSEWHERE = {"_parameters", "_buffers", "_modules", "config", "generation_config"}


def diff_models(a: Any, b: Any) -> list[str]:
    """Return every difference of two transformers models as a line; an empty list means bit-identical."""
    return list(_differences(a, b))


def diff_pipelines(a: Any, b: Any) -> list[str]:
    """Return every difference of two diffusers pipelines as a line: their configs, and each component down to its bits."""
    found = [] if type(a) is type(b) else [f"class: {type(a)} / {type(b)}"]
    found += _diff_configs("pipeline", a.config, b.config)
    found += _diff_keys("components", a.components, b.components)
    for name in a.components.keys() & b.components.keys():
        x, y = a.components[name], b.components[name]
        found += [f"{name}: {line}" for line in (_differences(x, y) if hasattr(x, "state_dict") else _diff_plain(x, y))]
    return found


def _diff_plain(a: Any, b: Any) -> Iterator[str]:
    """Compare schedulers, tokenizers and processors: what they are and all that they know in plain values."""
    if type(a) is not type(b):
        yield f"class: {type(a)} / {type(b)}"
    elif a is not None:
        of_a, of_b = vars(a), vars(b)
        yield from _diff_keys("attributes", of_a, of_b)
        yield from (f"{key}: {of_a[key]!r} / {of_b[key]!r}" for key in of_a if not _alike(of_a[key], of_b.get(key)))
        if hasattr(a, "get_vocab") and a.get_vocab() != b.get_vocab():
            yield "vocabulary"


def _differences(a: Any, b: Any) -> Iterator[str]:
    if type(a) is not type(b):
        yield f"class: {type(a)} / {type(b)}"
    for kind in ("named_parameters", "named_buffers"):
        of_a = dict(getattr(a, kind)(remove_duplicate=False))
        of_b = dict(getattr(b, kind)(remove_duplicate=False))
        yield from _diff_keys(kind, of_a, of_b)
        for name in of_a.keys() & of_b.keys():
            yield from _diff_tensors(f"{kind} {name}", of_a[name], of_b[name])
        if _ties(of_a) != _ties(of_b):
            yield f"{kind} that are one: {_ties(of_a)} / {_ties(of_b)}"
    yield from _diff_keys("state_dict", a.state_dict(), b.state_dict())
    yield from _diff_modules(dict(a.named_modules()), dict(b.named_modules()))
    yield from _diff_configs("config", getattr(a, "config", None), getattr(b, "config", None))
    yield from _diff_configs("generation_config", getattr(a, "generation_config", None),
                             getattr(b, "generation_config", None))  # fmt: skip
    if getattr(a, "name_or_path", None) != getattr(b, "name_or_path", None):
        yield f"name_or_path: {a.name_or_path!r} / {b.name_or_path!r}"


def _diff_keys(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    if a.keys() != b.keys():
        yield f"{what}: only in one: {sorted(a.keys() ^ b.keys())}"
    elif list(a) != list(b):
        yield f"{what}: another order"


def _diff_tensors(what: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[str]:
    for attribute in ("dtype", "device", "shape", "requires_grad", "is_leaf"):
        if getattr(a, attribute) != getattr(b, attribute):
            yield f"{what}.{attribute}: {getattr(a, attribute)} / {getattr(b, attribute)}"
    if type(a) is not type(b):
        yield f"{what}: {type(a)} / {type(b)}"
        return
    of_a, of_b = _parts(a), _parts(b)
    yield from _diff_keys(f"parts of {what}", of_a, of_b)
    for name in of_a.keys() & of_b.keys():
        x, y = of_a[name], of_b[name]
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            yield from _diff_tensors(f"{what}.{name}", x, y)
        elif not _alike(x, y):
            yield f"{what}.{name}: {x!r} / {y!r}"
    if hasattr(a, "__tensor_flatten__"):
        return  # without memory of its own
    if a.stride() != b.stride():
        yield f"{what}.stride: {a.stride()} / {b.stride()}"
    if a.untyped_storage().nbytes() != b.untyped_storage().nbytes():
        yield f"{what}: a storage of {a.untyped_storage().nbytes()} / {b.untyped_storage().nbytes()} bytes"
    if a.shape == b.shape and a.dtype == b.dtype and _bits(a) != _bits(b):
        yield f"{what}: other values"


def _parts(tensor: Any) -> dict[str, Any]:
    """Return what a quantised tensor holds beside its own memory, or instead of it; empty for a plain one."""
    parts: dict[str, Any] = {}
    if hasattr(tensor, "__tensor_flatten__"):
        parts = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    for name, value in vars(tensor).items():
        parts |= (
            {f"{name}.{key}": v for key, v in value.as_dict().items()} if hasattr(value, "as_dict") else {name: value}
        )
    return parts


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _ties(named: Mapping[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in named.items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def _diff_modules(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    yield from _diff_keys("modules", a, b)
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if _class(x) != _class(y):
            yield f"module {name!r}: {type(x)} / {type(y)}"
        if x.training != y.training:
            yield f"module {name!r}.training: {x.training} / {y.training}"
        of_x, of_y = vars(x), vars(y)
        if of_x.keys() != of_y.keys():
            yield f"module {name!r}: attributes only in one: {sorted(of_x.keys() ^ of_y.keys())}"
        for key in (of_x.keys() & of_y.keys()) - _COMPARED_ELSEWHERE:
            if key.endswith("_hooks"):
                if _hooks(of_x[key]) != _hooks(of_y[key]):
                    yield f"module {name!r}.{key}: {_hooks(of_x[key])} / {_hooks(of_y[key])}"
            elif not _alike(of_x[key], of_y[key]):
                yield f"module {name!r}.{key}: {of_x[key]!r} / {of_y[key]!r}"


def _class(module: Any) -> list[Any]:
    """Return what identifies the class of *module*; each parametrised module has one of its own."""
    kind = type(module)
    return [kind.__qualname__, *kind.__mro__[1:]] if hasattr(module, "parametrizations") else [kind]


def _hooks(hooks: Any) -> list[str]:
    """Return what the hooks are; the numbers under which they are kept count up in the whole process."""
    found = [getattr(hook, "hook", hook) for hook in getattr(hooks, "values", lambda: ())()]
    return [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in found]


def _alike(a: Any, b: Any) -> bool:
    """Compare plain values; of other objects only the class."""
    if isinstance(a, str | int | float | bytes | None | torch.dtype | torch.device | torch.Size):
        return type(a) is type(b) and (a == b or a != a)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(map(str, a)) == list(map(str, b)) and all(
            _alike(x, y) for x, y in zip(a.values(), b.values(), strict=True)
        )  # fmt: skip
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, set | frozenset):
        return type(a) is type(b) and set(map(str, a)) == set(map(str, b))
    return type(a) is type(b)


def _diff_configs(what: str, a: Any, b: Any) -> Iterator[str]:
    if type(a) is not type(b):
        yield f"{what}: {type(a)} / {type(b)}"
        return
    if a is None:
        return
    of_a, of_b = vars(a), vars(b)
    for key in sorted(of_a.keys() | of_b.keys()):
        x, y = of_a.get(key, "(none)"), of_b.get(key, "(none)")
        if hasattr(x, "to_dict") and hasattr(y, "to_dict"):
            yield from _diff_configs(f"{what}.{key}", x, y)
        elif not _alike(x, y):
            yield f"{what}.{key}: {x!r} / {y!r}"
