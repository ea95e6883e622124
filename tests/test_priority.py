"""A transfer process gives way to the program, as far as the system lets it, and never fails for it."""

from __future__ import annotations

import os
import sys

import pytest
from programs import run

from fastload import priority
from fastload.priority import NICE, give_way

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has one priority")

PROGRAM = """
import os, threading
from fastload.priority import give_way

go_on = threading.Event()
early = threading.Thread(target=go_on.wait)
early.start()
give_way()
give_way()
late = threading.Thread(target=go_on.wait)
late.start()
print(*{os.getpriority(os.PRIO_PROCESS, t) for t in (0, early.native_id, late.native_id)})
go_on.set()
"""


@linux
def test_all_threads_give_way_those_that_start_later_too():
    assert run(PROGRAM).split() == [str(max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))]


@linux
def test_a_lower_priority_stays():
    code = "import os; from fastload.priority import give_way; os.nice(19); give_way(); print(os.nice(0))"
    assert run(code).split() == ["19"]


def test_where_nobody_lists_the_threads_the_calling_one_gives_way(monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str) -> list[str]:
        raise FileNotFoundError(path)

    asked: list[int] = []
    monkeypatch.setattr(priority.os, "listdir", refuse)
    monkeypatch.setattr(priority.os, "setpriority", lambda which, who, value: asked.append(who))
    give_way()
    assert asked == [0]


def test_where_it_is_not_permitted_all_go_on_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def refuse(which: int, who: int, value: int) -> None:
        raise PermissionError

    monkeypatch.setattr(priority.os, "setpriority", refuse)
    give_way()
