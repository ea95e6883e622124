"""What one public call asks for: arguments, settings, platform, plugins and lock resolved, before any network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import NotFoundError
from .events import Observer
from .lock import Lock
from .plugins import call_hook, manager, resolve_settings
from .settings import Settings
from .types import Manifest, Request

SettingsLike = Settings | Mapping[str, Any] | None
LockLike = str | os.PathLike[str] | Lock | None

#: Keyword arguments of ``from_pretrained`` that say here what a setting says.
_AS_SETTINGS = {"token": "token", "cache_dir": "cache_dir", "local_files_only": "offline"}
#: Those of the framework's keyword arguments that choose files.
_CHOOSING = ("variant", "subfolder", "use_safetensors", "use_onnx", "gguf_file", "single_file", "weight_name",
             "use_flashpack")  # fmt: skip
#: Frameworks that read other files of a repository than those which its layout suggests.
_CHOOSING_FRAMEWORKS = ("open_clip",)


@dataclass(frozen=True, slots=True)
class Asked:
    """What one call asks for, with everything resolved that can be without I/O.

    Attributes:
        pm: The plugin manager.
        options: The framework's keyword arguments, without those that say here what a setting says.
        lock: As it was given; what it holds for this source is in the request.
    """

    request: Request
    settings: Settings
    pm: Any
    observers: tuple[Observer, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    lock: LockLike = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What two calls must share so that one transfer serves both."""
        return self._key(self.request.options)

    @property
    def key_of_more(self) -> tuple[Any, ...]:
        """The key of a transfer that serves this call too: of one that brings all components of a pipeline."""
        return self._key({k: v for k, v in self.request.options.items() if k != "components"})

    def _key(self, choosing: Mapping[str, Any]) -> tuple[Any, ...]:
        r, s = self.request, self.settings
        options = tuple(sorted((k, str(v)) for k, v in choosing.items()))
        return (
            os.getpid(),
            r.source,
            r.revision,
            r.patterns,
            r.everything,
            options,
            r.locked,
            s.cache_dir,
            s.endpoint,
            s.token,
        )


def ask(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    files: str | Sequence[str] | None = None,
    mirrors: str | Sequence[str] | None = None,
    settings: SettingsLike = None,
    observers: Iterable[Observer] = (),
    lock: LockLike = None,
    options: Mapping[str, Any] | None = None,
    framework: str | None = None,
    everything: bool = False,
) -> Asked:
    """Resolve the arguments that all public calls share. No network.

    Raises:
        SettingsError: A setting is wrong.
        NotFoundError: The lock does not hold the source.
    """
    options = dict(options or {})
    resolved = resolve_settings(
        settings, mirrors=(mirrors,) if isinstance(mirrors, str) else mirrors, **_taken_as_settings(options)
    )
    pm = manager(resolved)
    uri = os.fspath(source)
    request = Request(
        source=uri,
        revision=revision,
        patterns=(files,) if isinstance(files, str) else None if files is None else tuple(files),
        everything=everything,
        options=_choosing(options, framework),
        locked=None if lock is None else _locked(lock, uri, revision, resolved, pm),
    )
    return Asked(request, resolved, pm, (*observers, *_plugin_observers(uri, resolved, pm)), options, lock)


def _taken_as_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of *options* what code that was written for ``from_pretrained`` passes and a setting says here."""
    taken = {setting: options.pop(name) for name, setting in _AS_SETTINGS.items() if name in options}
    if isinstance(taken.get("token"), bool):  # True: the one that is stored; False: none
        taken["token"] = None if taken["token"] else ""
    return taken


def _choosing(options: Mapping[str, Any], framework: str | None) -> dict[str, Any]:
    """Return what decides which files travel."""
    chosen = {name: options[name] for name in _CHOOSING if options.get(name) is not None} | _components(options)
    return chosen | ({"framework": framework} if framework in _CHOOSING_FRAMEWORKS else {})


def _components(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be components of a pipeline that the caller brings (or does without): no weights travel for them."""
    names = sorted(k for k, v in options.items() if k not in _CHOOSING and (v is None or hasattr(v, "from_pretrained")))
    return {"components": names} if names else {}


def _plugin_observers(uri: str, settings: Settings, pm: Any) -> list[Observer]:
    return [o for o in call_hook(pm, "fastload_observer", source=uri, settings=settings) if o is not None]


def _locked(lock: LockLike, uri: str, revision: str | None, settings: Settings, pm: Any) -> Manifest:
    """Return what the lock holds for *uri*; nothing else will be accepted."""
    table = lock if isinstance(lock, Lock) else Lock.read(lock or "")
    source = call_hook(pm, "fastload_source", uri=uri, revision=revision, settings=settings)
    name = uri if source is None else source.name
    asked = revision or (source.revision if source is not None and "@" in uri else None)
    manifest = table.manifest(name, asked, endpoint=settings.endpoint)
    if manifest is None:
        raise NotFoundError(
            f"the lock holds no {name}" + (f" at {asked}" if asked else ""), hint=f"`fastload lock {uri}` adds it"
        )
    return manifest
