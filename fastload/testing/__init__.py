"""A Hub on loopback with scripted faults, small weights, and the promises of a weight format: for tests of this package,
of plugins and of programs.

    with Hub({"org/name": write_tiny_llama(folder)}, faults=[Fault("reset", times=1, after_bytes=1000)]) as hub:
        ...

:func:`spawn` (or ``python -m fastload.testing serve FOLDER``) runs one in a process of its own.
:func:`check_format` checks what a plugin's weight format promises.
"""

from .conformance import PROMISES, Report, Verdict, check_format
from .faults import Fault
from .hub import Hub
from .log import Request
from .process import Served, spawn
from .samples import Sample
from .weights import random_tensor, write_safetensors, write_tiny_llama

__all__ = [
    "PROMISES",
    "Fault",
    "Hub",
    "Report",
    "Request",
    "Sample",
    "Served",
    "Verdict",
    "check_format",
    "random_tensor",
    "spawn",
    "write_safetensors",
    "write_tiny_llama",
]
