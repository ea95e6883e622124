"""Every sync function has an asyncio twin with the same parameters."""

from __future__ import annotations

import inspect

import pytest

import fastload
from fastload import cli

PAIRS = {"load": "aload", "load_tensors": "aload_tensors", "stream": "astream", "prefetch": "aprefetch"}


@pytest.mark.parametrize(("name", "twin"), PAIRS.items())
def test_twins_take_the_same_parameters(name: str, twin: str):
    sync, other = (inspect.signature(getattr(fastload, n)) for n in (name, twin))
    rows = [[(p.name, p.kind, p.default, p.annotation) for p in s.parameters.values()] for s in (sync, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("name", "twin"), [(n, t) for n, t in PAIRS.items() if n != "stream"])
def test_twins_return_the_same(name: str, twin: str):
    sync, other = (inspect.signature(getattr(fastload, n)).return_annotation for n in (name, twin))
    assert sync == other


@pytest.mark.parametrize("twin", PAIRS.values())
def test_twins_are_coroutine_functions_or_async_context_managers(twin: str):
    function = inspect.unwrap(getattr(fastload, twin))
    assert inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


@pytest.mark.parametrize("name", [*PAIRS, *PAIRS.values(), "start"])
def test_every_load_takes_the_common_parameters_by_keyword(name: str):
    parameters = inspect.signature(getattr(fastload, name)).parameters
    first, *rest = parameters.values()
    assert first.name == "source"
    common = {"revision", "files", "mirrors", "settings", "observers", "lock"}
    assert common <= {p.name for p in rest}
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in rest)


def test_every_public_function_with_a_twin_is_listed_here():
    twins = {name for name in fastload.__all__ if name.startswith("a") and name[1:] in fastload.__all__}
    assert twins == set(PAIRS.values())


def test_the_command_line_offers_what_the_functions_take():
    """--mirror and --locked are repeatable or files; everything else has the parameter's name."""
    words = cli._parser().parse_args(["load", "org/model"])
    names = {"mirrors": "mirror", "lock": "locked", "settings": "set", "observers": "quiet"}
    parameters = inspect.signature(fastload.load).parameters
    wanted = {names.get(p.name, p.name) for p in parameters.values() if p.kind is not p.VAR_KEYWORD}
    assert wanted <= vars(words).keys()
