"""Whether a transfer runs apart from the program, in a child process, or in a thread of it.

Beside imports, and whatever else keeps the GIL, an engine in the same process falls to a fraction of its speed: a child is
worth its start. In a program that has imported all that the load will need (a server that loads its second model), and is at
rest, it is not: 2 GB over an unthrottled link into a dict of tensors took 1.27 s and 1.05 CPU-s/GB in a thread, 1.69 s and 1.36
with a child (medians of 5, in turns, two cores), a quarter of a second of which was the child's start.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from .settings import Settings

#: By framework, modules of which one is there when the seconds of its imports are over. Of others we do not know. Where none is
#: named the files decide, too late for us; if it is one that nobody has imported, its imports hold the transfer up.
_IMPORTED = {
    None: ("transformers.modeling_utils", "diffusers.models.modeling_utils"),
    "transformers": ("transformers.modeling_utils",),
    "diffusers": ("diffusers.models.modeling_utils",),
    "sentence_transformers": (
        "sentence_transformers.sentence_transformer.model",
        "sentence_transformers.SentenceTransformer",  # before 6
    ),
    "timm": ("timm.models",),
    "open_clip": ("open_clip.model",),
    "peft": ("peft.peft_model",),
}
#: What a load imports on the program's side while the bytes arrive. Until the first one has, a child is as quick; and Ctrl-C in
#: the middle of an import may leave Python's import lock taken: a thread that imports something too would wait for it forever.
_OURS = {f"{__package__}.loading", "safetensors"}
#: What those need who want tensors alone.
_TENSORS = ("torch",)
_OF_TENSORS = ("torch", "gguf")
#: So long the GIL is let go, time for whoever waits for it to wake and take it.
_LET_GO_S = 0.0005


def better_apart(settings: Settings, framework: str | None = None, options: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a child should run a transfer that begins now.

    Where the program has other threads, blocks for a millisecond, or as long as they keep the GIL.

    Args:
        options: Those of a ``load``; ``None``: tensors alone are wanted.
    """
    if settings.process is not None:
        return settings.process
    if threading.current_thread() is not threading.main_thread():
        return True  # when the main thread has come to its end, no pool of threads takes work, and this load may go on
    if not sys.modules.keys() >= _OURS:
        return True
    tensors = options is None or framework in _OF_TENSORS or options.get("into") is not None
    modules = _TENSORS if tensors else _IMPORTED.get(framework, ())
    return not any(name in sys.modules for name in modules) or _others_compute()


def _others_compute() -> bool:
    """Tell whether other threads of this process keep the GIL; other work on all cores may look the same."""
    if threading.active_count() == 1:
        return False
    # Specified: who computes gives the GIL back after one interval. A wait of half of that is no accident.
    busy_s = sys.getswitchinterval() / 2
    for _ in range(2):
        let_go_s = time.perf_counter()
        time.sleep(_LET_GO_S)
        if time.perf_counter() - let_go_s > _LET_GO_S + busy_s:
            return True
    return False
