"""``python -m fastload.observed ORDERS PROGRAM …``: runs a Python program as the interpreter would, and profiles it.

What ``fastload profile -- python app.py`` becomes. The profile is written when the program ends: by itself, with an error,
or by SIGTERM if it does not handle that itself. Forked children that load something write files of their own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
from types import CodeType, FrameType

from .errors import FastloadError
from .profile import Profiles, profile
from .profiling import Outputs, write


class _Report:
    """Writes the profile once in each process that has something to tell."""

    def __init__(self, outputs: Outputs, profiles: Profiles) -> None:
        self._outputs = outputs
        self._profiles = profiles
        self._pid = os.getpid()
        self._written: set[int] = set()

    def write(self) -> None:
        pid = os.getpid()
        if pid in self._written:
            return
        self._written.add(pid)
        outputs = self._outputs
        if pid != self._pid:
            self._profiles.loads = [load for load in self._profiles.loads if load.pid == pid]
            if not self._profiles.loads:
                return
            outputs = outputs.for_process(pid)
        try:
            write(self._profiles, outputs)
        except FastloadError as e:
            sys.stderr.write(f"fastload profile: {e}\n")
        sys.stderr.write(f"fastload profile: {self._profiles.cold_start}\n")
        sys.stderr.flush()

    def terminated(self, number: int, frame: FrameType | None) -> None:
        self.write()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def main() -> None:
    """Run the program that the command line names."""
    outputs = Outputs(**json.loads(sys.argv[1]))
    words = sys.argv[2:]
    # Open until the process ends: a load may run in a thread that outlives the program's own.
    block = profile(events=outputs.needs_events, imports=True)
    report = _Report(outputs, block.__enter__())
    atexit.register(block.__exit__, None, None, None)
    atexit.register(report.write)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, report.terminated)
    _run(words)


def _run(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[:1] == ["-c"]:
        sys.argv = ["-c", *words[2:]]
        code: CodeType = compile(words[1], "<string>", "exec")
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = words
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
