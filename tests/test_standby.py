"""The first call's child comes up while the call finds out what it is asked for; no call leaves one behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import ENVIRON, alive, program, run, until
from transfers import LARGE, write_weights

from fastload.settings import Settings
from fastload.standby import Standby, standing_by, started
from fastload.testing import Fault, Hub

#: Counts the processes that are started, and tells whether the caller knew by then what it was asked for.
COUNT = """
import json, os, sys
from pathlib import Path
import fastload
knew = []
sys.addaudithook(lambda event, _: event == "subprocess.Popen" and knew.append("fastload.asking" in sys.modules))
def left():
    found = []
    for thread in Path('/proc/self/task').iterdir():
        try:
            found += (thread / 'children').read_text().split()
        except OSError:  # it has ended
            pass
    return found
"""


@pytest.fixture
def hub(tmp_path: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    weights = write_weights(tmp_path / LARGE).read_bytes()
    made = make_hub({"org/m": {"config.json": b"{}", LARGE: weights}})
    for name, value in {**ENVIRON, "HF_ENDPOINT": made.endpoint}.items():
        monkeypatch.setenv(name, value)
    return made


def told(code: str, **environ: str) -> Any:
    return json.loads(run(COUNT + code, environ=environ).splitlines()[-1])


@pytest.mark.parametrize(
    "call",
    [
        "fastload.load_tensors('org/m')",
        "fastload.start('org/m').wait()",
        "fastload.load_tensors('hf://org/m@main', settings={'connections': 2})",
        "exec('with fastload.stream(\"org/m\") as weights: dict(weights)')",
    ],
)
def test_the_first_call_starts_its_child_before_anything_else_and_no_other_one(call: str, hub: Hub):
    assert told(f"{call}; fastload.quiesce(); print(json.dumps([knew, left()]))") == [[False], []]


def test_later_calls_start_their_child_with_its_orders(hub: Hub):
    code = "fastload.load_tensors('org/m'); fastload.load_tensors('org/m'); print(json.dumps(knew))"
    assert told(code, FASTLOAD_PROCESS="1") == [False, True]


def test_a_call_that_needs_nobody_starts_nobody(hub: Hub, tmp_path: Path):
    pinned = f"org/m@{hub.commit('org/m')}"
    load = f"fastload.load_tensors({pinned!r}); print(json.dumps(len(knew)))"
    assert told(load, FASTLOAD_PROCESS="0") == 0
    assert told(load) == 0  # it is in the cache now
    assert told(load, HF_HUB_OFFLINE="1") == 0
    (tmp_path / "own").mkdir()
    write_weights(tmp_path / "own" / LARGE)
    # Nothing travels, so there is no hurry; a child reads ahead.
    assert told(f"fastload.load_tensors({str(tmp_path / 'own')!r}); print(json.dumps(all(knew)))")


def test_a_pinned_call_whose_cache_is_empty_starts_its_child_first(hub: Hub):
    code = f"fastload.load_tensors('org/m', revision='{hub.commit('org/m')}'); print(json.dumps(knew))"
    assert told(code) == [False]


@pytest.mark.parametrize(
    "call",
    [
        "fastload.load_tensors('org/m', mirrors='nonsense')",
        "fastload.load_tensors('no plugin knows this')",
        "fastload.load_tensors('org/m', lock='/nowhere/fastload.lock')",
    ],
)
def test_a_call_that_fails_before_its_transfer_leaves_no_child(call: str, hub: Hub):
    code = f"""
try:
    {call}
except fastload.FastloadError:
    print(json.dumps([knew, left()]))
"""
    assert told(code) == [[False], []]


def test_a_child_that_was_started_too_early_is_replaced(hub: Hub, tmp_path: Path):
    """A plugin that is found changes what children must find, too."""
    (tmp_path / "widening.py").write_text("import sys\nsys.path.append('/nowhere')\n")
    info = tmp_path / "widening-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: widening\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fastload]\nwidening = widening\n")
    code = "fastload.load_tensors('org/m'); fastload.quiesce(); print(json.dumps([knew, left()]))"
    assert told(code, PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{tmp_path}") == [[False, True], []]


def test_a_child_that_nobody_takes_ends_with_its_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastload.standby._is_first", True)
    with standing_by("org/m", Settings()) as standby:
        assert standby is not None and standby.fits
    assert standby._process.returncode is not None
    assert not standby.fits
    standby.dismiss()


def test_an_interpreter_that_ends_at_once_is_an_error_of_ours(hub: Hub, tmp_path: Path):
    """It never reads what is written to it."""
    broken = tmp_path / "python"
    broken.symlink_to("/bin/false")
    code = f"""
import fastload.standby
fastload.standby.executable = lambda: Path({str(broken)!r})
for _ in range(5):
    fastload.standby._is_first = True
    try:
        fastload.load_tensors('org/m')
    except fastload.FastloadError as e:
        assert 'ended with status 1' in str(e), e
print(json.dumps(left()))
"""
    assert told(code) == []


def test_an_interrupt_during_the_imports_of_a_call_leaves_no_child(hub: Hub):
    hub.script(Fault("hold", path=LARGE, times=None))
    code = """
import importlib.abc
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == 'fastload.loading':
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
try:
    fastload.load_tensors('org/m')
except KeyboardInterrupt:
    print(json.dumps([len(knew), left()]))
"""
    assert told(code) == [1, []]


def test_a_child_ends_when_the_program_dies_before_it_gives_orders():
    code = """
import os, signal
from fastload.standby import Standby
print(Standby(())._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with program(code) as process:
        pid = int(process.stdout.readline()) if process.stdout is not None else 0
        assert pid
        until(lambda: not alive(pid), "the child ends with its program")
        process.wait()
        assert process.communicate()[1] == ""  # it has nothing to say about it


def test_a_child_that_died_while_it_stood_by_is_replaced():
    standby = Standby(())
    standby._process.kill()
    standby._process.wait()
    process = started({"nobody": "reads this"}, (), standby)
    try:
        assert process is not standby._process
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
        standby.dismiss()


def test_plugins_that_are_not_allowed_are_not_imported_by_the_child_either(hub: Hub, tmp_path: Path):
    seen = tmp_path / "seen"
    (tmp_path / "loud.py").write_text(f"import os\nopen({str(seen)!r}, 'a').write(str(os.getpid()) + ' ')\n")
    info = tmp_path / "loud-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fastload]\nloud = loud\n")
    path = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{tmp_path}"
    code = "fastload.load_tensors('org/m', settings={'plugins': PLUGINS}); print(json.dumps(len(knew)))"
    assert told(code.replace("PLUGINS", "()"), PYTHONPATH=path) == 1
    assert not seen.exists()
    assert told(code.replace("PLUGINS", "('loud',)"), PYTHONPATH=path) == 1
    assert len(set(seen.read_text().split())) == 2


def test_where_no_process_can_be_started_the_block_runs_without(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("fastload.standby._is_first", True)
    with standing_by("org/m", Settings()) as standby:
        assert standby is None
