"""A Hub on loopback with scripted faults, and small weights: for tests of this package, of plugins and of programs.

    with Hub({"org/name": write_tiny_llama(folder)}, faults=[Fault("reset", times=1, after_bytes=1000)]) as hub:
        ...

:func:`spawn` (or ``python -m fastload.testing serve FOLDER``) runs one in a process of its own.
"""

from .faults import Fault
from .hub import Hub
from .log import Request
from .process import Served, spawn
from .weights import random_tensor, write_safetensors, write_tiny_llama

__all__ = ["Fault", "Hub", "Request", "Served", "random_tensor", "spawn", "write_safetensors", "write_tiny_llama"]
