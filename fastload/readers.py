"""Who asks for a file: code that will read it through ``safe_open`` may have its path before it is complete."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

#: Functions that read every safetensors file that they download through ``safe_open`` before they return (tested with the
#: real libraries). A path that anybody else asks for may be opened in any way: he gets it when the file is complete.
_READERS = {
    ("transformers.modeling_utils", "from_pretrained"),
    ("transformers.models.auto.auto_factory", "from_pretrained"),
    ("diffusers.models.modeling_utils", "from_pretrained"),
    ("diffusers.pipelines.auto_pipeline", "from_pretrained"),
    ("diffusers.pipelines.pipeline_utils", "from_pretrained"),
}
#: Their keyword arguments that make them read otherwise, or not at once.
_OTHERWISE = ("disable_mmap", "use_flashpack", "gguf_file", "offload_folder")
_SNAPSHOT = ("huggingface_hub._snapshot_download", "snapshot_download")


def reads_by_safe_open(repo: str) -> bool:
    """Tell whether whoever asks for a file of *repo* in this thread will read it through ``safe_open``.

    The threads of ``snapshot_download`` do not know who called it, so all who have called it for *repo* must.
    """
    here = list(_frames(sys._getframe(1)))
    if any(_is_reader(frame) for frame in here):
        return True
    if not any(_name(frame)[0] == _SNAPSHOT[0] for frame in here):
        return False
    callers = []
    for thread in sys._current_frames().values():
        frames = list(_frames(thread))
        if any(_name(f) == _SNAPSHOT and f.f_locals.get("repo_id") == repo for f in frames):
            callers.append(any(map(_is_reader, frames)))
    return bool(callers) and all(callers)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _name(frame: FrameType) -> tuple[str, str]:
    return str(frame.f_globals.get("__name__")), frame.f_code.co_name


def _is_reader(frame: FrameType) -> bool:
    if _name(frame) not in _READERS:
        return False
    names = frame.f_locals
    keywords = names.get("kwargs")
    given = {**(keywords if isinstance(keywords, dict) else {}), **{n: names[n] for n in _OTHERWISE if n in names}}
    return not any(given.get(name) for name in _OTHERWISE)
