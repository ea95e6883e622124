"""What a weight format promises, checked: for the tests of whoever writes a plugin.

def test_hello_keeps_all_promises():
    print(check_format(fastload_hello, [Sample("weights.hello", data, tensors)], broken={"overlap": bad}))
"""

from __future__ import annotations

import ctypes
import importlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from .. import plugins
from ..errors import FastloadError, PluginError, SettingsError
from ..settings import Settings
from .samples import Sample

if TYPE_CHECKING:
    import pluggy

#: Guessed: a whole promise, hundreds of files, takes well under a second.
_LIMIT_S = 60.0
#: How long a check that was told to end may take to do so.
_LEAVE_S = 5.0


class Broken(Exception):
    """A promise is broken; args: how."""


class Unproven(Exception):
    """A promise cannot be judged; args: why, and what it takes."""


class _TooLong(BaseException):
    """Raised in a check that does not end. No ``except Exception`` of a plugin may catch it."""


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        module: The plugin: a module or an object with hooks.
        pm: Has the built-in plugins and this one.
        settings: With which a load finds the plugin.
        samples: All of them.
        broken: Contents that must be refused, by what is wrong with them.
        folder: An empty one; goes away with the check.
    """

    name: str
    module: Any
    pm: pluggy.PluginManager
    settings: Settings
    samples: tuple[Sample, ...]
    broken: Mapping[str, bytes | Path]
    folder: Path

    def recognise(self, filename: str, head: bytes) -> Any:
        """Return what this plugin, and no other, makes of a file."""
        others = [p for p in self.pm.get_plugins() if p is not self.module]
        return self.pm.subset_hook_caller("fastload_format", others)(filename=filename, head=head)

    def new_folder(self) -> Path:
        """Return an empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))


#: A check raises Broken or Unproven, or whatever the plugin makes it raise, which is broken too.
Check = Callable[[Subject, Sample], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one promise fared with one sample.

    Attributes:
        promise: Its name, one of :data:`PROMISES`.
        sample: Name of the file.
        reason: How it is broken, or why it could not be judged.
    """

    promise: str
    sample: str
    outcome: Literal["kept", "broken", "unproven"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:<9} {self.promise} ({self.sample}){': ' if self.reason else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts about one plugin; as text, one a line."""

    plugin: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.verdicts))

    def of(self, outcome: Literal["kept", "broken", "unproven"]) -> tuple[Verdict, ...]:
        """Return the verdicts with *outcome*."""
        return tuple(verdict for verdict in self.verdicts if verdict.outcome == outcome)


#: Name of a promise → module and function that check it, in the order in which they are checked.
_CHECKS = {
    "imports_light": "reading:imports_light",
    "recognises_its_files": "reading:recognises_its_files",
    "leaves_other_files_alone": "reading:leaves_other_files_alone",
    "answers_alike": "reading:answers_alike",
    "asks_for_what_it_needs": "reading:asks_for_what_it_needs",
    "reads_every_tensor": "reading:reads_every_tensor",
    "refuses_truncated_files": "reading:refuses_truncated_files",
    "refuses_broken_files": "reading:refuses_broken_files",
    "survives_damage": "reading:survives_damage",
    "loads_from_a_hub": "arriving:loads_from_a_hub",
    "streams_while_bytes_arrive": "arriving:streams_while_bytes_arrive",
    "goes_on_after_a_cut": "arriving:goes_on_after_a_cut",
    "gives_no_wrong_bytes": "arriving:gives_no_wrong_bytes",
}
#: What :func:`check_format` checks, by name.
PROMISES = tuple(_CHECKS)


def check_format(
    plugin: Any,
    samples: Iterable[Sample],
    *,
    broken: Mapping[str, bytes | Path] | None = None,
    only: Iterable[str] = PROMISES,
    limit_s: float = _LIMIT_S,
) -> Report:
    """Check everything that a weight format promises to fastload and its users; needs torch for what loads from a hub.

    Args:
        plugin: The module (or object) with the hook ``fastload_format``, or the name of an installed plugin, as
            ``fastload plugins`` lists it: then its entry point is checked too.
        samples: Sound files with what is in them. With one of more than 128 KiB and several tensors it can be proven
            that tensors come while the file still arrives; with one whose head is above 64 KiB, that the format asks
            for the rest.
        broken: Files that must be refused, by what is wrong with them: tensors that overlap, lie outside of the file …
        only: Names of promises, to check these alone (for a test a promise).
        limit_s: A check that takes longer is broken: something waits for ever.

    Returns:
        A verdict for every promise and sample; ``str()`` of it is a table.

    Raises:
        PluginError: A promise is broken; the message names each, the sample and the reason. Or there is no such plugin.
        SettingsError: No samples were given, or a promise of that name does not exist.
    """
    __tracebackhide__ = True  # pytest then shows the caller's line and the message
    chosen, files = tuple(only), tuple(samples)
    for promise in chosen:
        if promise not in _CHECKS:
            raise SettingsError(f"no promise {promise!r}", hint=f"one of {', '.join(PROMISES)}")
    if not files:
        raise SettingsError(
            "a format is checked by its files: samples is empty", hint="pass [Sample(name, content, tensors)]"
        )
    with _registered(plugin) as (name, module, pm, settings), tempfile.TemporaryDirectory(prefix="fastload-") as folder:
        subject = Subject(name, module, pm, settings, files, dict(broken or {}), Path(folder))
        verdicts = tuple(
            _judge(promise, subject, sample, limit_s)
            for promise in chosen
            for sample in (files if promise not in _OF_THE_PLUGIN else files[:1])
        )
    report = Report(name, verdicts)
    if failed := report.of("broken"):
        kept = f"{name} breaks {len({v.promise for v in failed})} of {len(chosen)} promises of a weight format"
        raise PluginError(
            "\n  ".join([f"{kept}:", *map(str, failed)]), plugin=name, hint="docs/plugins.md says what each one means"
        )
    return report


#: Promises that have nothing to do with the single sample.
_OF_THE_PLUGIN = frozenset({"imports_light"})


@contextmanager
def _registered(plugin: Any) -> Iterator[tuple[str, Any, pluggy.PluginManager, Settings]]:
    """Give name, plugin, the manager that has it beside the built-in ones, and the settings that lead to that manager."""
    if isinstance(plugin, str):
        settings = Settings(plugins=(plugin,))
        pm = plugins.manager(settings)
        record = next(r for r in plugins.report(settings) if r.name == plugin)
        if record.error is not None:
            raise PluginError(f"plugin {plugin} is not in use: {record.error}", plugin=plugin, hint="is it installed?")
        yield plugin, pm.get_plugin(plugin), pm, settings
        return
    settings = Settings(plugins=())
    pm = plugins.manager(settings)
    known = pm.get_name(plugin)
    name = known or (plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__)
    if known is None:
        pm.register(plugin, name=name)
    try:
        yield name, plugin, pm, settings
    finally:
        if known is None:
            pm.unregister(plugin)


def _judge(promise: str, subject: Subject, sample: Sample, limit_s: float) -> Verdict:
    module, _, function = _CHECKS[promise].partition(":")
    check: Check = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    try:
        within(limit_s, partial(check, subject, sample))
    except Unproven as e:
        return Verdict(promise, sample.name, "unproven", str(e))
    except Broken as e:
        return Verdict(promise, sample.name, "broken", str(e))
    except FastloadError as e:
        return Verdict(promise, sample.name, "broken", f"{type(e).__name__}: {e.message}")
    except Exception as e:  # a stranger's code may raise anything
        return Verdict(promise, sample.name, "broken", f"raises {type(e).__name__}: {e}")
    return Verdict(promise, sample.name, "kept")


def within(limit_s: float, call: Callable[[], object], *, release: Callable[[], object] = lambda: None) -> None:
    """Run *call* in a thread; pass on what it raises.

    Args:
        release: Called when the time is over, to let go on what waits.

    Raises:
        Broken: It took more than *limit_s*. It is told to end, and does so if it runs Python code.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=run, name="fastload.testing.check_format", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        release()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TooLong))
        thread.join(_LEAVE_S)
        raise Broken(f"did not end within {limit_s:g} s")
    if raised:
        raise raised[0]
