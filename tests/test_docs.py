"""The documents say what the code says: every hook, every setting, every error, every command."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from fastload import cli, errors, hookspecs
from fastload.errors import FastloadError
from fastload.settings import Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def cells(text: str) -> list[list[str]]:
    """Rows of the Markdown table whose first cell is code."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# -- hooks ------------------------------------------------------------------------------------------------------------

HOOKS = {name: value for name, value in vars(hookspecs).items() if name.startswith("fastload_")}
SECTIONS = dict(
    zip(
        re.findall(r"^## `(fastload_\w+)\(", (DOCS / "hooks.md").read_text(), re.M),
        (DOCS / "hooks.md").read_text().split("\n## `fastload_")[1:],
        strict=True,
    )
)


def test_hooks_page_lists_every_hook_and_no_other():
    assert SECTIONS.keys() == HOOKS.keys()


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_page_gives_the_exact_arguments(name: str):
    arguments = list(inspect.signature(HOOKS[name]).parameters)
    assert SECTIONS[name].startswith(f"{name.removeprefix('fastload_')}({', '.join(arguments)})`\n")
    assert re.findall(r"^- `(\w+)`: ", SECTIONS[name], re.M) == arguments


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_page_says_how_results_are_joined(name: str):
    first = HOOKS[name].fastload_spec["firstresult"]
    body = SECTIONS[name].split("\n\n", 1)[1]
    assert body.startswith("First result." if first else "All results")


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_describe_their_result(name: str):
    assert "Returns:" in (HOOKS[name].__doc__ or "")


# -- settings ---------------------------------------------------------------------------------------------------------

SETTINGS = {row[0].strip("`"): row for row in cells((DOCS / "settings.md").read_text())}
FIELDS = {f.name: f for f in dataclasses.fields(Settings) if f.name != "origins"}


def test_settings_page_lists_every_setting_in_order():
    assert list(SETTINGS) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_settings_page_gives_variables_and_default(name: str):
    _, environment, default, meaning = SETTINGS[name]
    assert code(environment) == list(FIELDS[name].metadata["env"])
    if default:
        [text] = code(default)
        assert getattr(Settings.resolve({name: text}, environ={}), name) == getattr(Settings.resolve(environ={}), name)
    else:
        assert FIELDS[name].default in (None, ())
    assert meaning


def test_every_setting_has_a_variable_and_a_help():
    for name, field in FIELDS.items():
        assert field.metadata["env"], name
        assert field.metadata["help"], name


# -- errors -----------------------------------------------------------------------------------------------------------

ERRORS = {row[0].strip("`"): row for row in cells((DOCS / "errors.md").read_text())}
CLASSES = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, FastloadError)}


def test_errors_page_lists_every_error_in_order():
    assert list(ERRORS) == list(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_errors_page_gives_bases_and_fields(name: str):
    _, bases, fields, meaning = ERRORS[name]
    assert code(bases) == [base.__name__ for base in CLASSES[name].__bases__]
    assert code(fields) == list(CLASSES[name].fields)
    assert meaning


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_every_event_that_is_emitted_stands_in_the_table():
    from fastload import events

    listed = set(re.findall(r"``([a-z]+\.[a-z]+)``", events.Event.__doc__ or ""))
    emitted = set()
    for path in (ROOT / "fastload").rglob("*.py"):
        emitted |= set(re.findall(r"(?:\.emit|\.span)\(\s*\"([a-z]+\.[a-z]+)\"", path.read_text()))
    assert emitted <= listed


def test_plugins_page_lists_every_plugin_with_its_hooks():
    listed = {row[0].strip("`"): code(row[2]) for row in cells((ROOT / "plugins" / "README.md").read_text())}
    there = {path.name: path for path in (ROOT / "plugins").glob("fastload_*.py")}
    there |= {f"{path.parent.name}/": path for path in (ROOT / "plugins").glob("fastload_*/__init__.py")}
    assert listed.keys() == there.keys()
    for name, hooks in listed.items():
        assert set(re.findall(r"^def (fastload_\w+)\(", there[name].read_text(), re.M)) == set(hooks)


def test_changelog_keeps_an_unreleased_section_and_names_every_command():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "\n## [Unreleased]\n" in text
    actions = cli._parser()._subparsers._group_actions  # type: ignore[union-attr]
    commands = list(actions[0].choices)  # type: ignore[arg-type]
    [line] = [line for line in text.splitlines() if line.startswith("- The command `fastload` has")]
    assert set(code(line)) >= {*commands, "--json"}


def test_license_is_the_whole_apache_license():
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
