"""The house: imports only go up, each dependency has one door, plugins use public names, nothing imports torch unasked."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastload

ROOT = Path(fastload.__file__).parent
PLUGINS = Path(__file__).parents[1] / "plugins"  # of the checkout: an installed fastload has them beside itself

#: A module may import what stands before it. This is the order in which to read the package.
ORDER = """
    errors types settings events
    plan runtimes mirrors flights concurrency retry refusals answers access disk digest phases interception garbage
    importing late measured coldstart profile lock hookspecs
    priority apart sink http cache standby readahead carrier ahead journal ring whole device pinned lane plugins pools
    view transfer known resolve download athand fetch schedule landing delivery engine worker sync asking rendezvous running
    inloop listing shardindex weightfile staging copies feeder deferred supply router served plainway inflight tensors
    unawaited zerocopy loading opening loader lifecycle launch readers ondemand settled dropin starting
    report trace timeline waterfall metrics history profiling observed doctor testing builtin serving arguments cli __main__
""".split()

DOORS = {
    "aiohttp": {"http", "testing", "serving"},  # serving: the supervisor's server, and its way to the app
    "aiofiles": {"cache"},
    "torch": {"device", "tensors", "router", "builtin.pickled", "builtin.module"},  # torch's pickles and modules
    "safetensors": {"builtin.safetensors", "router"},
    "huggingface_hub": {"builtin.hub", "cache"},
    "tenacity": {"retry"},
    "pluggy": {"hookspecs", "plugins"},
    "rich": {"builtin.progress", "cli"},
    "opentelemetry": {"builtin.opentelemetry"},
}
#: What is public, for plugins of strangers and for ours.
PUBLIC = {
    "fastload", "fastload.errors", "fastload.events", "fastload.hookspecs", "fastload.settings", "fastload.tensors",
    "fastload.testing", "fastload.types",
}  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Packages inside the package count as one module, but for the built-in plugins, which know nothing of each other."""
    return module.partition(".")[0]


MODULES = {
    module_of(path): path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.name != "__init__.py"
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, package: str, *, inside_functions: bool = True) -> Iterator[tuple[str, int]]:
    """Yield (absolute module, line) of each import that runs; those under TYPE_CHECKING do not."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from . import report` names a module, `from .report import render` a name of one.
            yield from (
                (f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base, node.lineno)
                for alias in node.names
            )
        yield from imports(node, package, inside_functions=inside_functions)


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return name.startswith("fastload.") and (path.with_suffix(".py").exists() or (path / "__init__.py").exists())


def imports_of(module: str, **options: bool) -> list[tuple[str, int]]:
    path = MODULES[module]
    package = f"fastload.{module}" if path.name == "__init__.py" else f"fastload.{module}".rpartition(".")[0]
    return list(imports(ast.parse(path.read_text()), package, **options))


def test_the_order_lists_every_module():
    assert sorted(ORDER) == sorted({room_of(module) for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_stands_above_them(module: str):
    room = room_of(module)
    for name, line in imports_of(module):
        package, _, inner = name.partition(".")
        if package != "fastload" or not inner or room_of(inner) == room:
            continue
        assert ORDER.index(room_of(inner)) < ORDER.index(room), f"{MODULES[module]}:{line} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_each_dependency_has_its_door(module: str):
    for name, line in imports_of(module):
        allowed = DOORS.get(name.partition(".")[0])
        if allowed is not None:
            assert {module, room_of(module)} & allowed, f"{MODULES[module]}:{line} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_only_known_dependencies_are_imported(module: str):
    foreign = {name.partition(".")[0] for name, _ in imports_of(module)} - set(sys.stdlib_module_names) - {"fastload"}
    assert foreign <= DOORS.keys() | (
        {"yarl", "multidict"} if room_of(module) in ("http", "testing", "serving") else set()
    )


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_in_functions_alone(module: str):
    at_import = {name.partition(".")[0] for name, _ in imports_of(module, inside_functions=False)}
    assert not at_import & {"torch", "transformers", "diffusers", "numpy"}


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda p: p.name)
def test_plugins_import_public_names_only(path: Path):
    for name, line in imports(ast.parse(path.read_text()), ""):
        if name.partition(".")[0] == "fastload":
            assert name in PUBLIC, f"{path}:{line} imports {name}"


def test_built_in_plugins_do_not_know_each_other():
    for module in MODULES:
        if room_of(module) == "builtin" and module != "builtin":
            others = {name for name, _ in imports_of(module) if name.startswith("fastload.builtin.")}
            assert others <= {f"fastload.{module}"}


def test_no_module_is_longer_than_350_lines():
    long = {m: n for m, p in MODULES.items() if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def test_no_function_is_longer_than_60_lines():
    long = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node, clean=False)
                length = (node.end_lineno or 0) - node.lineno - (doc.count("\n") + 1 if doc else 0)
                if length > 60:
                    long.append(f"{module}.{node.name}")
    assert not long


def loaded_by(code: str) -> set[str]:
    answer = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in answer.stdout.splitlines()[-1].split()}


def test_no_module_of_ours_imports_torch():
    names = [f"fastload.{m}" for m in MODULES if not m.endswith("__main__")]
    assert not loaded_by(f"import {', '.join(names)}") & {"torch", "transformers", "numpy"}


def test_the_transfer_process_has_neither_torch_nor_a_framework():
    assert not loaded_by("import fastload.worker, fastload.engine") & {"torch", "transformers", "numpy", "rich"}


def test_the_command_line_starts_light():
    light = loaded_by("import fastload.cli; fastload.cli._parser().parse_args(['prefetch', 'org/model'])")
    assert not light & {"torch", "transformers", "aiohttp", "huggingface_hub", "pluggy", "rich", "asyncio"}
