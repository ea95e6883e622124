"""The public names: all there, sorted, fetched when first used, and ``fastload.profile`` a module that can be called."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

import pytest

import fastload
from fastload import asking, events, loader, profile, running, tensors, weightfile

HEAVY = {
    "torch", "numpy", "transformers", "safetensors", "huggingface_hub", "aiohttp", "aiofiles", "asyncio", "pluggy",
    "tenacity", "rich", "multiprocessing", "ssl", "importlib.metadata",
}  # fmt: skip


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_fastload_imports_nothing_else():
    """The first line of a program starts the download: it must not wait for libraries. (Under 50 ms by construction.)"""
    before, after = (set(run(f"import sys; {code}; print(*sys.modules)").split()) for code in ("0", "import fastload"))
    added = after - before
    assert not {name.partition(".")[0] for name in added} & HEAVY
    assert {name for name in added if name.startswith("fastload")} == {"fastload"}


@pytest.mark.parametrize("name", ["Settings", "Snapshot", "Event", "FastloadError", "profile", "Profile", "errors"])
def test_words_cost_no_library(name: str):
    loaded = run(f"import sys, fastload; fastload.{name}; print(*sys.modules)").split()
    assert not {module.partition(".")[0] for module in loaded} & HEAVY


def test_all_is_sorted_and_complete():
    assert fastload.__all__ == sorted(fastload.__all__)
    assert set(fastload.__all__) == {*fastload._HOME, "__version__"}
    assert set(fastload.__all__) <= set(dir(fastload))


@pytest.mark.parametrize("name", fastload.__all__)
def test_every_public_name_is_there(name: str):
    value = getattr(fastload, name)
    assert getattr(fastload, name) is value
    assert value.__doc__ or name == "__version__"


@pytest.mark.parametrize("name", fastload.__all__)
def test_every_public_name_can_be_imported_first(name: str):
    """In a process of its own, so that no other test has fetched it before."""
    assert run(f"from fastload import {name}; print('there')") == "there"


def test_star_import_gives_the_public_names():
    space: dict[str, object] = {}
    exec("from fastload import *", space)
    assert set(fastload.__all__) <= space.keys()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastload' has no attribute 'nothing'"):
        fastload.nothing  # noqa: B018
    assert not hasattr(fastload, "numpy")


@pytest.mark.parametrize(
    "before",
    [
        "import fastload",
        "import fastload.profile",
        "import fastload; fastload.profile; import fastload.profile",
        "import fastload; fastload.profile(); import fastload.profile",
        "import fastload.report",
        "from fastload.profile import Profile; import fastload",
        "import fastload, importlib; importlib.reload(importlib.import_module('fastload.profile'))",
        "from fastload import profile; import fastload; fastload.profile = profile",
    ],
)
def test_profile_can_be_called_however_it_was_imported(before: str):
    """The import system binds the submodule's name in the package; the module itself is callable."""
    assert run(f"{before}\nwith fastload.profile() as p: pass\nprint(p.loads)") == "[]"


def test_no_other_public_name_is_hidden_by_a_submodule():
    modules = {info.name for info in pkgutil.iter_modules(fastload.__path__)}
    clashes = {
        name for name in modules & set(fastload.__all__) if not isinstance(getattr(fastload, name), types.ModuleType)
    }
    assert not clashes


def test_every_module_says_what_it_is_for():
    for info in pkgutil.walk_packages(fastload.__path__, "fastload."):
        if not info.name.endswith("__main__"):
            assert (importlib.import_module(info.name).__doc__ or "").strip(), info.name


def functions_of(*classes: type) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield the methods, and the getters of properties, that the classes define."""
    for kind in classes:
        for name, value in vars(kind).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(function):
                yield f"{kind.__name__}.{name}", function


CALLS = {
    **{name: value for name, value in vars(loader).items() if getattr(value, "__module__", None) == loader.__name__},
    **{name: getattr(fastload, name) for name in ("accelerate", "on_start", "quiesce")},
    **dict(
        functions_of(
            tensors.TensorStream, tensors.AsyncTensorStream, tensors.AsyncTensorSlice, weightfile.TensorSlice,
            running.Running, profile.Profile, fastload.Snapshot, fastload.Settings,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_annotations_of_public_calls_can_be_evaluated(name: str):
    """In either way that tools, pydantic among them, take."""
    typing.get_type_hints(CALLS[name])
    inspect.signature(CALLS[name], eval_str=True)


def test_who_evaluates_annotations_gets_the_exact_types():
    import torch

    hints = typing.get_type_hints(fastload.load_tensors)
    assert hints["return"] == dict[str, torch.Tensor] == typing.get_type_hints(fastload.aload_tensors)["return"]
    assert hints["settings"] == asking.SettingsLike == fastload.Settings | Mapping[str, typing.Any] | None
    assert hints["lock"] == asking.LockLike
    assert hints["observers"] == Iterable[events.Observer]
    assert typing.get_type_hints(fastload.prefetch)["return"] is fastload.Snapshot
    assert typing.get_type_hints(fastload.start)["return"] is running.Running
    assert typing.get_type_hints(fastload.stream)["return"] == Iterator[tensors.TensorStream]
    assert typing.get_type_hints(fastload.astream)["return"] == AsyncIterator[tensors.AsyncTensorStream]


def test_annotations_cost_no_import_until_somebody_evaluates_them():
    """To look at the module, as help() and collectors of tests do, is not that."""
    look = "import sys, inspect, pydoc, copy, fastload.loader as m; pydoc.render_doc(m); inspect.signature(m.load)"
    wrapped = (
        "[(inspect.unwrap(value), copy.copy(value)) for value in vars(m).values() if type(value).__name__ == 'Late']"
    )
    assert not set(run(f"{look}; {wrapped}; print(*sys.modules)").split()) & {
        "torch",
        "fastload.tensors",
        "fastload.running",
    }
