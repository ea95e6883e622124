"""Plugins come in by one door; a broken one is told about and left out."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastload import plugins
from fastload.errors import FormatError, PluginError
from fastload.settings import Settings

Install = Callable[..., None]

GOOD = """
from fastload.hookspecs import hookimpl

@hookimpl
def fastload_format(filename, head):
    if filename == "bad":
        raise KeyError("its own fault")
    if filename == "refused":
        from fastload.errors import FormatError
        raise FormatError("on purpose")
    return None

@hookimpl
def fastload_build_model(framework):
    raise OSError("no such model")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of one module into a folder on the path."""
    monkeypatch.setattr(plugins, "_made", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def install(name: str, code: str, version: str = "3.1") -> None:
        module = f"fastload_test_{name}"
        made.append(module)
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[fastload]\n{name} = {module}\n")

    yield install
    for module in made:
        sys.modules.pop(module, None)


def record(name: str, settings: Settings | None = None) -> plugins.PluginRecord | None:
    """Return what the report says about plugin *name*."""
    return next((r for r in plugins.report(settings or Settings()) if r.name == name), None)


def test_builtin_parts_are_plugins_too() -> None:
    for name in ("hub", "local", "safetensors"):
        found = record(name)
        assert found is not None
        assert (found.distribution, found.error) == ("fastload-weights", None)
        assert found.hooks


def test_importing_builtin_plugins_imports_nothing_heavy() -> None:
    program = (
        "import sys; from fastload import plugins; from fastload.settings import Settings; plugins.report(Settings());"
        "print(sorted({'torch', 'aiohttp', 'huggingface_hub', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_installed_plugin_is_found_with_its_distribution_and_hooks(install: Install) -> None:
    install("good", GOOD)
    assert record("good") == plugins.PluginRecord(
        "good", "plugin-good", "3.1", ("fastload_build_model", "fastload_format")
    )


HOOKS_OF_ALL_KINDS = """
from fastload.hookspecs import hookimpl

class Formats:
    @hookimpl
    def fastload_format(self, filename, head):
        return None

fastload_format = Formats().fastload_format

@hookimpl(specname="fastload_build_model")
def build(framework):
    return None
"""


def test_hooks_are_found_whatever_their_name_and_whatever_kind_of_function_they_are(install: Install) -> None:
    install("kinds", HOOKS_OF_ALL_KINDS)
    assert record("kinds") == plugins.PluginRecord(
        "kinds", "plugin-kinds", "3.1", ("fastload_build_model", "fastload_format")
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("def broken(:", "SyntaxError"),
        ("from fastload.hookspecs import hookimpl\n@hookimpl\ndef fastload_fromat(filename): ...", "fastload_fromat"),
        ("from fastload.hookspecs import hookimpl\n@hookimpl\ndef fastload_format(file): ...", "file"),
    ],
)
def test_broken_plugin_is_a_warning_and_a_record_and_the_others_work(
    install: Install, caplog: pytest.LogCaptureFixture, code: str, reason: str
) -> None:
    install("broken", code)
    install("good", GOOD)
    with caplog.at_level(logging.WARNING, "fastload"):
        found = record("broken")
    assert found is not None
    assert found.error is not None
    assert reason in found.error
    assert "plugin broken is not in use" in caplog.text
    working, builtin = record("good"), record("safetensors")
    assert working is not None and working.error is None
    assert builtin is not None and builtin.error is None
    assert not plugins.manager(Settings()).has_plugin("broken")


def test_allow_list_decides_which_installed_plugins_load(install: Install) -> None:
    install("good", GOOD)
    install("other", GOOD)
    allowed = Settings(plugins=("good",))
    assert record("good", allowed) is not None
    assert record("other", allowed) is None
    assert record("other", Settings(plugins=())) is None
    assert record("safetensors", Settings(plugins=())) is not None
    missing = record("goood", Settings(plugins=("goood",)))
    assert missing is not None and missing.error is not None


def test_manager_is_made_once_for_each_allow_list(install: Install) -> None:
    assert plugins.manager(Settings()) is plugins.manager(Settings())
    assert plugins.manager(Settings()) is not plugins.manager(Settings(plugins=()))


def test_error_of_a_hook_names_the_plugin(install: Install) -> None:
    install("good", GOOD)
    pm = plugins.manager(Settings())
    with pytest.raises(
        PluginError, match=r"plugin good failed in fastload_format: KeyError: 'its own fault'"
    ) as caught:
        plugins.call_hook(pm, "fastload_format", filename="bad", head=b"")
    assert caught.value.plugin == "good"
    assert isinstance(caught.value.__cause__, KeyError)


def test_error_that_a_plugin_means_passes_through(install: Install) -> None:
    install("good", GOOD)
    with pytest.raises(FormatError, match="on purpose"):
        plugins.call_hook(plugins.manager(Settings()), "fastload_format", filename="refused", head=b"")


def test_frameworks_own_error_reaches_the_user_as_it_is(install: Install) -> None:
    install("good", GOOD)
    pm = plugins.manager(Settings(plugins=("good",)))
    with pytest.raises(OSError, match="no such model"):
        plugins.call_hook(pm, "fastload_build_model", framework=None, snapshot=None, stream=None, options={})


def test_error_of_an_object_from_a_plugin_names_the_plugin() -> None:
    def parse(head: bytes) -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(PluginError, match="plugin hello failed in parse: ZeroDivisionError: oops"):
        plugins.call_plugin("hello", parse, b"")
