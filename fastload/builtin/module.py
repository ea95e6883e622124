"""Fills a module that the caller made: ``fastload.load("org/model", into=module)``.

Names and shapes are compared as soon as the heads of the files are there; then each tensor is copied into its parameter or
buffer as it lands. Modules with a loading of their own (hooks, batch norms …) get all tensors at once, through
``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import FormatError, SettingsError
from ..hookspecs import hookimpl
from ..types import Snapshot

#: Of fastload.load's options: those that have a meaning here, or had one when the files were chosen.
_KNOWN = frozenset({"into", "strict", "assign", "device", "dtype", "variant", "subfolder", "use_safetensors"})
_NAMED = 8  # guessed: how many names of a kind an error lists


@hookimpl(tryfirst=True)
def fastload_build_model(
    framework: str | None, snapshot: Snapshot, stream: Any, options: Mapping[str, Any]
) -> object | None:
    """Return ``into=``, filled; declines where there is none.

    Raises:
        FormatError: Names or shapes do not fit. With ``strict=False`` only shapes matter.
        SettingsError: An option means nothing here, or *framework* is torch and there is no module.
    """
    module = options.get("into")
    if module is None:
        if framework == "torch":
            raise SettingsError("framework='torch' needs a module to fill", hint="pass into=module")
        return None
    if hasattr(module, "load_lora_weights") and framework != "torch":
        return None  # a pipeline, which its own plugin fills
    if framework not in (None, "torch"):
        raise SettingsError(
            f"into= is for plain modules, not for framework={framework!r}", hint="leave one of them out"
        )
    if not hasattr(module, "load_state_dict") or not hasattr(module, "named_modules"):
        raise SettingsError(f"into={type(module).__name__} is not a torch.nn.Module")
    for name in options.keys() - _KNOWN:
        raise SettingsError(f"{name}= means nothing with into=", hint="strict= and assign= do")
    _fill(module, snapshot.source, stream, strict=options.get("strict", True), assign=options.get("assign"))
    return module  # type: ignore[no-any-return]


def _fill(module: Any, source: str, stream: Any, *, strict: bool, assign: bool | None) -> None:
    state = module.state_dict(keep_vars=True)
    on_meta = any(getattr(target, "is_meta", False) for target in state.values())
    if assign or on_meta or _loads_its_own_way(module):
        _load_all(module, source, stream, strict=strict, assign=on_meta if assign is None else assign)
        return
    infos = {name: stream.info(name) for name in stream.keys()}  # noqa: SIM118  (no dict: keys() waits)
    given = {id(state[name]) for name in infos.keys() & state.keys()}
    missing = [name for name, target in state.items() if id(target) not in given]  # one of several tied names will do
    shapes = {
        name: f"{list(info.shape)} in the file, {list(state[name].shape)} in the module"
        for name, info in infos.items()
        if name in state and tuple(info.shape) != tuple(state[name].shape)
    }
    _check(source, missing if strict else (), infos.keys() - state.keys() if strict else (), shapes)
    for name, tensor in stream:
        if name in state:
            state[name].detach().copy_(tensor)


def _loads_its_own_way(module: Any) -> bool:
    """Tell whether anything but copying name by name happens when *module* takes a state dict in."""
    import torch

    plain = torch.nn.Module
    return any(
        type(part)._load_from_state_dict is not plain._load_from_state_dict
        or type(part).set_extra_state is not plain.set_extra_state
        or type(part).load_state_dict is not plain.load_state_dict
        or part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        for part in module.modules()
    )


def _load_all(module: Any, source: str, stream: Any, *, strict: bool, assign: bool) -> None:
    tensors = dict(iter(stream))
    try:
        result = module.load_state_dict(tensors, strict=False, assign=assign)
    except RuntimeError as e:  # torch's word for shapes that differ
        raise FormatError(f"{source} does not fit the module: {e}") from e
    if strict and result is not None:
        state = module.state_dict(keep_vars=True)
        given = {id(target) for name, target in state.items() if name in tensors}
        missing = [name for name in result.missing_keys if id(state.get(name)) not in given]
        _check(source, missing, result.unexpected_keys, {})


def _check(source: str, missing: Iterable[str], unexpected: Iterable[str], shapes: Mapping[str, str]) -> None:
    """Raise if there is anything to complain about."""
    wrong = [
        f"{len(names)} {what}: {', '.join(names[:_NAMED])}{' …' if names[_NAMED:] else ''}"
        for what, names in (
            ("missing in the files", sorted(missing)),
            ("unknown to the module", sorted(unexpected)),
            ("of another shape", [f"{name} ({how})" for name, how in sorted(shapes.items())]),
        )
        if names
    ]
    if wrong:
        hint = None if shapes else "strict=False leaves the one as they are, and the other out"
        raise FormatError(f"{source} does not fit the module: {'; '.join(wrong)}", hint=hint)
