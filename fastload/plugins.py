"""Finds plugins and calls their hooks. A broken plugin is a warning and a record, never a failed start.

Built-in parts are plugins too, listed by module name; others come from the entry-point group ``fastload``. Plugins that
were registered later are asked first, so an installed one goes before the built-in ones.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from types import FunctionType, ModuleType, TracebackType
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .errors import FastloadError, PluginError
from .settings import Settings

Result = TypeVar("Result")

log = logging.getLogger("fastload")

#: Modules of this distribution that are plugins. Importing them must stay cheap: no torch, aiohttp, huggingface_hub.
BUILTIN = (
    "fastload.builtin.history",
    "fastload.builtin.hub",
    "fastload.builtin.local",
    "fastload.builtin.log",
    "fastload.builtin.module",
    "fastload.builtin.opentelemetry",
    "fastload.builtin.pickled",
    "fastload.builtin.safetensors",
    "fastload.builtin.supervised",
)

#: What these raise is the framework's own and reaches the user as ``from_pretrained`` would raise it.
_PASSED_ON = frozenset({"fastload_build_model"})


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One plugin, working or not.

    Attributes:
        name: Of the entry point, or of the built-in module.
        distribution: The installed package that brings it; empty where unknown.
        hooks: Names of the hooks that it fills, sorted.
        error: Why it is not in use, or ``None``.
    """

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """As :class:`PluginRecord`, before anybody has read the distributions' metadata, which takes most of the time."""

    name: str
    dist: metadata.Distribution | None
    hooks: tuple[str, ...] = ()
    error: str | None = None
    is_ours: bool = False

    def record(self) -> PluginRecord:
        distribution, version = _own_distribution() if self.is_ours else ("", "")
        if self.dist is not None:
            distribution, version = self.dist.name, self.dist.version
        return PluginRecord(self.name, distribution, version, self.hooks, self.error)


class _Manager(pluggy.PluginManager):
    """Passes over what no hook can be; pluggy looks at everything that a module holds (measured: 1 of 10 ms)."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        value = vars(plugin).get(name) if isinstance(plugin, ModuleType) else None
        unmarked = isinstance(value, FunctionType) and not vars(value)  # the mark is an attribute
        if unmarked or isinstance(value, (str, type, ModuleType)):
            return None
        return super().parse_hookimpl_opts(plugin, name)


_lock = threading.Lock()
_made: dict[tuple[str, ...] | None, tuple[pluggy.PluginManager, tuple[_Found, ...]]] = {}


def manager(settings: Settings) -> pluggy.PluginManager:
    """Return the plugin manager for *settings*, made once per allow list (``settings.plugins``). Thread-safe."""
    return _load(settings)[0]


def report(settings: Settings) -> list[PluginRecord]:
    """Return one record a plugin, built-in ones first, those that could not be loaded included."""
    return [found.record() for found in _load(settings)[1]]


def resolve_settings(settings: Settings | Mapping[str, Any] | None = None, **arguments: Any) -> Settings:
    """As :meth:`Settings.resolve`, with the defaults of the platform that a plugin recognises.

    Raises:
        SettingsError: A setting is wrong.
        PluginError: A plugin failed in its platform hook.
    """
    resolved = Settings.resolve(settings, **arguments)
    if isinstance(settings, Settings):
        return resolved
    platform = call_hook(manager(resolved), "fastload_platform", environ=dict(os.environ))
    if platform is None:
        return resolved
    return Settings.resolve(settings, platform=platform.settings, platform_name=platform.name, **arguments)


def call_hook(pm: pluggy.PluginManager, hook: str, /, **arguments: Any) -> Any:
    """Call *hook* of all plugins and return what pluggy returns: the first result, or a list.

    Raises:
        FastloadError: A plugin raised it on purpose.
        PluginError: A plugin raised anything else; names the plugin. Errors of ``fastload_build_model`` are not
            translated: they are the framework's, and programs expect them as they are.
    """
    caller = getattr(pm.hook, hook)
    try:
        return caller(**arguments)
    except FastloadError:
        raise
    except Exception as e:  # a stranger's code may raise anything
        if hook in _PASSED_ON:
            raise
        name = _culprit(caller, e.__traceback__)
        raise PluginError(
            f"plugin {name or '(unknown)'} failed in {hook}: {type(e).__name__}: {e}",
            plugin=name,
            hint="`fastload plugins` lists them; leave it out with FASTLOAD_PLUGINS, or report it to its authors",
        ) from e


def call_plugin(name: str, function: Callable[..., Result], /, *arguments: Any) -> Result:
    """Call *function*, a method of an object that the plugin's hook returned.

    Raises:
        FastloadError: It raised it on purpose.
        PluginError: It raised anything else; names *name*.
    """
    try:
        return function(*arguments)
    except FastloadError:
        raise
    except Exception as e:  # a stranger's code may raise anything
        what = getattr(function, "__name__", "a call")
        raise PluginError(f"plugin {name} failed in {what}: {type(e).__name__}: {e}", plugin=name) from e


def _culprit(caller: pluggy.HookCaller, traceback: TracebackType | None) -> str | None:
    """Return the name of the plugin whose implementation of the hook is on the traceback."""
    names = {getattr(impl.function, "__code__", None): impl.plugin_name for impl in caller.get_hookimpls()}
    while traceback is not None:
        name = names.get(traceback.tb_frame.f_code)
        if name is not None:
            return name
        traceback = traceback.tb_next
    return None


def _load(settings: Settings) -> tuple[pluggy.PluginManager, tuple[_Found, ...]]:
    allowed = settings.plugins
    with _lock:
        if allowed not in _made:
            pm = _Manager(hookspecs.GROUP)
            pm.add_hookspecs(hookspecs)
            _made[allowed] = (pm, (*_load_builtin(pm), *_load_installed(pm, allowed)))
        return _made[allowed]


def _load_builtin(pm: pluggy.PluginManager) -> Iterator[_Found]:
    for module in BUILTIN:
        found = _Found(module.rpartition(".")[2], None, is_ours=True)
        yield _register(pm, found, lambda module=module: importlib.import_module(module))


def _load_installed(pm: pluggy.PluginManager, allowed: tuple[str, ...] | None) -> Iterator[_Found]:
    seen = set()
    for entry in sorted(metadata.entry_points(group=hookspecs.GROUP), key=lambda e: e.name):
        seen.add(entry.name)
        if allowed is None or entry.name in allowed:
            yield _register(pm, _Found(entry.name, entry.dist), entry.load)
    for name in allowed or ():
        if name not in seen:
            yield _broken(_Found(name, None), "no installed package has a plugin of this name (setting: plugins)")


def _register(pm: pluggy.PluginManager, found: _Found, load: Any) -> _Found:
    try:
        plugin = load()
        pm.register(plugin, name=found.name)
    except Exception as e:  # a stranger's module may raise anything while it is imported
        return _broken(found, f"{type(e).__name__}: {e}")
    try:
        pm.check_pending()
    except pluggy.PluginValidationError as e:
        pm.unregister(plugin)
        return _broken(found, str(e))
    return replace(found, hooks=tuple(sorted(caller.name for caller in pm.get_hookcallers(plugin) or ())))


def _broken(found: _Found, error: str) -> _Found:
    log.warning("plugin %s is not in use: %s", found.name, error)
    return replace(found, error=error)


def _own_distribution() -> tuple[str, str]:
    try:
        return "fastload-weights", metadata.version("fastload-weights")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "fastload-weights", ""
