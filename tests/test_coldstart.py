"""The cold start is shared out completely: every second belongs to one phase, or to nobody."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fastload
from fastload.coldstart import SHARES, ColdStart, of_load, partition, process_started_s
from fastload.events import Event
from fastload.importing import ImportTimes
from fastload.measured import Profile


def load_of(*events: Event, source: str = "org/model") -> Profile:
    made = Profile(source)
    for event in events:
        made.observe(event)
    return made


#: The process starts at 90, measuring begins at 91, torch is imported from 92 to 97, the load is asked for at 98.
LOAD = (
    Event("load.started", 98.0, data={"source": "org/model"}),
    Event("resolve.finished", 94.0, 1.0),
    Event("range.landed", 101.0, 7.0, "w", {"start": 0, "stop": 100}),
    Event("verify.advanced", 102.0, 3.0, "w", {"bytes": 100}),
    Event("build.started", 98.5),
    Event("build.waited", 102.0, 2.0, "w"),
    Event("build.finished", 104.0),
    Event("load.finished", 105.0, 7.0),
)


def shares(cold: ColdStart) -> dict[str, tuple[float, float]]:
    return {s.name: (round(s.seconds, 9), round(s.hidden_s, 9)) for s in cold.shares}


def test_every_second_has_one_owner_and_the_rest_is_unaccounted():
    cold = partition([load_of(*LOAD)], started_s=90.0, began_s=91.0, imports=[(92.0, 97.0), (99.0, 99.5)])
    assert cold.total_s == 15.0
    assert shares(cold) == {
        "interpreter": (1.0, 0.0),
        "imports": (5.5, 0.0),
        "resolve": (0.0, 1.0),  # behind the imports
        "download": (2.5, 4.5),  # 97 to 98.5 and 100 to 101: the build had nothing to do but wait
        "verify": (1.0, 2.0),  # 101 to 102
        "build": (3.0, 0.0),  # 98.5 to 99, 99.5 to 100, 102 to 104; what it imported is the imports'
        "unaccounted": (2.0, 0.0),  # 91 to 92, 104 to 105
    }
    assert sum(s.seconds for s in cold.shares) == pytest.approx(cold.total_s)
    assert cold.hidden_s == 7.5
    assert [s.name for s in cold.shares] == [n for n in SHARES if n in shares(cold)] + ["unaccounted"]


@pytest.mark.parametrize("seed", range(20))
def test_shares_always_add_up(seed: int):
    import random

    random.seed(seed)
    events = [Event("load.started", random.uniform(0, 10))]
    for name in ("resolve.finished", "range.landed", "write.finished", "verify.advanced", "build.finished"):
        events += [Event(name, random.uniform(0, 20), random.uniform(0, 5), "w") for _ in range(5)]
    imports = [(at, at + random.random()) for at in (random.uniform(0, 20) for _ in range(5))]
    cold = partition([load_of(*events)], started_s=0.5, began_s=random.uniform(0.5, 3), imports=imports)
    assert sum(s.seconds for s in cold.shares) == pytest.approx(cold.total_s)
    assert all(s.seconds >= 0 and s.hidden_s >= 0 for s in cold.shares)


def test_it_ends_with_the_last_load_or_now_where_nothing_was_loaded():
    second = load_of(Event("load.started", 110.0), Event("load.finished", 112.0, 2.0))
    assert partition([load_of(*LOAD), second], started_s=90.0, began_s=91.0).total_s == 22.0
    assert partition([], started_s=90.0, began_s=91.0, now_s=96.0).total_s == 6.0


def test_a_failed_load_is_said_to_have_failed():
    failed = load_of(
        LOAD[0], LOAD[2], Event("load.failed", 103.0, 5.0, None, {"error": "CacheError", "message": "full"})
    )
    cold = partition([failed], started_s=90.0, began_s=91.0)
    assert (cold.ok, cold.total_s) == (False, 13.0)
    assert str(cold).startswith("cold start 13.00 s (failed): interpreter 1.00, download 7.00")


def test_waiting_for_what_another_process_fetches_is_download():
    joined = load_of(LOAD[0], LOAD[4], LOAD[5], LOAD[6], LOAD[7])
    assert shares(of_load(joined)) == {"download": (2.0, 0.0), "build": (3.5, 0.0), "unaccounted": (1.5, 0.0)}


def test_one_line_says_it_all():
    cold = partition([load_of(*LOAD)], started_s=90.0, began_s=91.0, imports=[(92.0, 97.0)])
    assert str(cold) == (
        "cold start 15.00 s: interpreter 1.00, imports 5.00, resolve 0.00, download 2.50, verify 1.00, build 3.50,"
        " unaccounted 2.00; hidden 7.50 s"
    )
    assert json.loads(json.dumps(cold.to_record()))["phases"]["build"] == {"seconds": 3.5, "hidden_s": 0.0}


def test_the_time_of_one_load_alone_begins_with_its_call():
    assert shares(of_load(load_of(*LOAD))) == {
        "download": (1.5, 1.5),
        "verify": (1.0, 2.0),
        "build": (3.5, 0.0),
        "unaccounted": (1.0, 0.0),
    }


# -- when the process began -------------------------------------------------------------------------------------------


def test_the_start_of_the_process_is_on_the_clock_of_the_events(tmp_path: Path):
    """The machine slept for 1000 s once: the clock of the boot counts that, the clock of the events does not."""
    stat = tmp_path / "stat"
    ticks = os.sysconf("SC_CLK_TCK")
    fields = ["S"] + ["0"] * 18 + [str(5000 * ticks)] + ["0"] * 30
    stat.write_text(f"12 (a name) with) parentheses) {' '.join(fields)}\n")
    assert process_started_s(stat=stat, clock=lambda: 4100.0, boot_clock=lambda: 5100.0) == 4000.0


@pytest.mark.parametrize("text", [None, "", "1 (python) S 0"])
def test_without_proc_the_process_began_now(tmp_path: Path, text: str | None):
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    assert process_started_s(stat=stat, clock=lambda: 7.0) == 7.0


def test_this_process_began_before_this_test():
    before_s = time.monotonic()
    code = "import time; from fastload.coldstart import process_started_s as p; print(p(), time.monotonic())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    started_s, printed_s = map(float, done.stdout.split())
    assert before_s - 0.02 <= started_s < printed_s  # /proc counts hundredths


# -- imports ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``outer_one`` that imports ``inner_one``, whose import fails the first time."""
    (tmp_path / "outer_one.py").write_text("import inner_one\n")
    (tmp_path / "inner_one.py").write_text("import json\n")
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('as it is')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("outer_one", "inner_one", "broken_one"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_imports_are_timed_with_what_they_import(packages: Path):
    ticks = itertools.count(10)
    times = ImportTimes(lambda: float(next(ticks)))
    with times:
        import outer_one
    assert outer_one.__spec__.loader.__class__.__name__ == "SourceFileLoader"
    assert "exec_module" not in vars(outer_one.__spec__.loader)
    assert [(m.name, m.start_s, m.stop_s, m.depth) for m in times.modules] == [
        ("inner_one", 11.0, 12.0, 1),
        ("outer_one", 10.0, 13.0, 0),
    ]
    assert list(times.busy) == [(10.0, 13.0)]
    assert times.packages() == [("outer_one", 3.0), ("inner_one", 1.0)]
    assert times not in sys.meta_path


def test_an_import_that_fails_fails_as_it_would(packages: Path):
    with ImportTimes() as times:
        with pytest.raises(RuntimeError, match="as it is"):
            import broken_one  # noqa: F401
        with pytest.raises(ModuleNotFoundError):
            import there_is_none  # noqa: F401
    assert times.busy


def test_two_timers_at_once_both_time(packages: Path):
    with ImportTimes() as first, ImportTimes() as second:
        import outer_one  # noqa: F401
    assert first.busy and second.busy


def test_imports_of_other_threads_are_timed(packages: Path):
    with ImportTimes() as times:
        thread = threading.Thread(target=__import__, args=("inner_one",))
        thread.start()
        thread.join()
    assert times.busy


def test_a_block_accounts_for_the_imports_inside_it(packages: Path):
    with fastload.profile(imports=True) as p:
        import outer_one  # noqa: F401
    assert "imports" in {share.name for share in p.cold_start.shares}
    with fastload.profile() as p:
        pass
    assert "imports" not in {share.name for share in p.cold_start.shares}
    cold = p.cold_start
    assert sum(share.seconds for share in cold.shares) == pytest.approx(cold.total_s)
