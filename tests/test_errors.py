"""Errors: one tree, values that travel between processes, text that says what, where, how much and what to do."""

from __future__ import annotations

import inspect
import json
import pickle
import re

import pytest

from fastload import errors
from fastload.errors import Attempt, FastloadError, from_record, to_record

CLASSES = sorted(
    (c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, FastloadError)), key=lambda c: c.__name__
)
ATTEMPTS = (Attempt("https://a.example", 1.25, "503"), Attempt("https://b.example", 12.0, "no byte for 10 s"))
VALUES = {
    "file": "model.safetensors",
    "span": (0, 8),
    "attempts": ATTEMPTS,
    "mirror": "https://a.example",
    "retryable": False,
    "status": 503,
    "retry_after_s": 2.0,
    "code": "RepoNotFound",
    "expected": "sha256:aa",
    "actual": "sha256:bb",
    "plugin": "gguf",
}


def example(kind: type[FastloadError]) -> FastloadError:
    return kind(
        "model.safetensors: what, where, how much", hint="do this", **{name: VALUES[name] for name in kind.fields}
    )


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_error_crosses_from_one_process_to_another(kind: type[FastloadError]):
    error = example(kind)
    again = from_record(json.loads(json.dumps(to_record(error))))
    assert type(again) is kind
    assert str(again) == str(error)
    for name in kind.fields:
        assert getattr(again, name) == getattr(error, name)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_error_says_message_attempts_hint_in_this_order(kind: type[FastloadError]):
    lines = str(example(kind)).splitlines()
    assert lines[0] == "model.safetensors: what, where, how much"
    assert lines[-1] == "hint: do this"
    expected = ["  https://a.example: 503 (after 1.2 s)", "  https://b.example: no byte for 10 s (after 12.0 s)"]
    assert lines[1:-1] == (expected if "attempts" in kind.fields else [])


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_error_survives_pickle(kind: type[FastloadError]):
    """Process pools and Ray hand exceptions on that way."""
    error = example(kind)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))
    assert all(getattr(again, name) == getattr(error, name) for name in kind.fields)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_no_error_comes_from_a_library_that_we_use(kind: type[FastloadError]):
    assert {c.__module__ for c in kind.__mro__} <= {"fastload.errors", "builtins"}
    assert kind.__name__.endswith("Error")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SettingsError, ValueError),
        (errors.NotFoundError, FileNotFoundError),
        (errors.MirrorTimeoutError, TimeoutError),
        (errors.CacheError, OSError),
    ],
)
def test_code_that_knows_only_python_can_catch(kind: type[FastloadError], builtin: type[Exception]):
    with pytest.raises(builtin):
        raise kind("x")


def test_the_tree_in_the_docstring_is_the_tree():
    tree = re.findall(r"^ {4}([ │├└─]*)(\w+Error)\b", errors.__doc__ or "", re.M)
    parents: list[str] = []
    drawn = {}
    for indent, name in tree:
        depth = len(indent) // 3
        parents[depth:] = [name]
        drawn[name] = parents[depth - 1] if depth else None
    assert drawn == {c.__name__: (c.__bases__[0].__name__ if c is not FastloadError else None) for c in CLASSES}


def test_an_error_of_a_newer_fastload_is_still_an_error():
    error = from_record({"type": "FutureError", "message": "m", "hint": "h", "new_field": 1})
    assert (type(error), str(error)) == (FastloadError, "m\nhint: h")
