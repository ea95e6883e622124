"""Who asks for a file: code that will read it through ``safe_open`` may have its path before it is complete.

And code that turns every error but an OSError into one of its own hears of wrong bytes in a way that it lets through.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
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
#: What may stand between a reader and the download. Code of others in between (a class of the repository's own, whose
#: ``from_pretrained`` downloads by itself) may open what it gets in any way.
_BETWEEN = {"fastload", "huggingface_hub", "transformers", "diffusers", "accelerate", "peft", "torch", "tqdm"}


def reads_by_safe_open(repo: str) -> bool:
    """Tell whether whoever asks for a file of *repo* in this thread will read it through ``safe_open``."""
    callers = _callers(repo)
    return bool(callers) and all(_is_called_by_reader(frames) for frames in callers)


def lets_os_errors_through(repo: str) -> bool:
    """Tell whether one of those who ask for a file of *repo* in this thread raises another error for any but an OSError."""
    return any(_first_package(frames) == "transformers" for frames in _callers(repo))


def _callers(repo: str) -> list[list[FrameType]]:
    """Return the frames of whoever asks for a file of *repo* in this thread, the innermost first.

    The threads of ``snapshot_download`` do not know who called it: then those of all who have called it for *repo*.
    """
    here = list(_frames(sys._getframe(1)))
    if not any(_name(frame)[0] == _SNAPSHOT[0] for frame in here) or any(_name(frame) == _SNAPSHOT for frame in here):
        return [here]
    return [
        frames[index:]
        for frames in (list(_frames(thread)) for thread in sys._current_frames().values())
        for index, frame in enumerate(frames)
        if _name(frame) == _SNAPSHOT and frame.f_locals.get("repo_id") == repo
    ]


def _first_package(frames: Iterable[FrameType]) -> str:
    """Return the package of the first of *frames* that is neither ours, nor huggingface_hub's, nor Python's."""
    packages = (_name(frame)[0].partition(".")[0] for frame in frames)
    own = {"fastload", "huggingface_hub", "tqdm"}
    return next((p for p in packages if p not in own and p not in sys.stdlib_module_names), "")


def _is_called_by_reader(frames: Iterable[FrameType]) -> bool:
    """Tell whether the next function of those that call the first of *frames*, but for go-betweens, is a reader."""
    for frame in frames:
        name = _name(frame)
        if name in _READERS:
            return _is_reading(frame)
        package = name[0].partition(".")[0]
        if package not in _BETWEEN and package not in sys.stdlib_module_names:
            return False
    return False


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _name(frame: FrameType) -> tuple[str, str]:
    return str(frame.f_globals.get("__name__")), frame.f_code.co_name


def _is_reading(frame: FrameType) -> bool:
    names = frame.f_locals
    keywords = names.get("kwargs")
    given = {**(keywords if isinstance(keywords, dict) else {}), **{n: names[n] for n in _OTHERWISE if n in names}}
    return not any(given.get(name) for name in _OTHERWISE)
