"""A process that has cached weights read into memory while the program imports and builds: nobody else is needed for them.

It imports next to nothing, so it is at work 30 ms after the call; the transfer process would take 0.25 s. In a thread of the
program it would wait for the GIL at each of thousands of calls.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .carrier import Carrier
from .events import log
from .priority import NICE
from .readahead import possible
from .settings import Settings
from .standby import close_pipes, executable

#: Isolated, and without the site's own start: nothing but this package and the standard library is needed.
_BOOT = """
import os, sys
os.nice({nice})
sys.path.append(sys.argv[1])
from fastload.readahead import main
main(sys.argv[2:])
"""


class ReadAhead(Carrier):
    """Reads *paths* into memory, for a transfer that is over: ``stop`` leaves it to its work, whose tensors are being read.

    Raises:
        OSError: No process can be started here.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        python = executable()
        if python is None:
            raise OSError("there is no Python to run it")
        package = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [str(python), "-I", "-S", "-c", _BOOT.format(nice=NICE), package, *map(str, paths)],
            stdin=subprocess.PIPE,  # closed by rest, or when the program is gone
            stdout=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is the program's to handle
        )
        try:
            self._begin(self._reap, "fastload-child")
        except RuntimeError:
            self._process.kill()
            self._reap()
            raise

    def _reap(self) -> None:
        self._process.wait()
        close_pipes(self._process)

    def rest(self, timeout_s: float) -> bool:
        """Let it end now; tell whether it has been reaped by then."""
        close_pipes(self._process)
        return super().rest(timeout_s)


def ahead(paths: Sequence[Path], settings: Settings) -> ReadAhead | None:
    """Have *paths* read into memory by a process, if there are any and it may and can be had."""
    if not paths or not settings.read_ahead or settings.process is False or not possible():
        return None
    try:
        return ReadAhead(paths)
    except (OSError, RuntimeError) as e:  # no more processes, or no more threads
        log.debug("files of the cache are not read ahead: %s", e)
        return None
