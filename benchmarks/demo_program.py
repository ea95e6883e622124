"""One of the two programs that the demo compares: loads a model, then says when and what it got.

    python -m benchmarks.demo_program plain|fastload REPO RESULT.json

Hub, cache and all else come from the environment. The clock stops when the model is ready; digests come after that.
"""

from __future__ import annotations

import time

STARTED_S = time.monotonic()

import hashlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from .importclock import ImportClock  # noqa: E402

if TYPE_CHECKING:
    import torch

SENTENCES = ["Weights that arrive while the program starts.", "A model is ready when its last byte is proven."]


def plain(repo: str) -> tuple[Any, dict[str, Any]]:
    """Load as the model card says."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(repo), {}


def fastload(repo: str) -> tuple[Any, dict[str, Any]]:
    """Load the same with fastload."""
    import fastload

    started_s: list[float] = []
    with fastload.profile() as p:
        model = fastload.load(
            repo,
            observers=[lambda e: started_s.append(e.at_s) if e.name == "load.started" else None],
        )
    profile = p.loads[0]
    phases = {
        phase.name: [(a + started_s[0], b + started_s[0]) for a, b in phase.intervals] for phase in profile.phases
    }
    return model, {"phases": phases, "profile": profile.to_record()}


PROGRAMS: dict[str, Callable[[str], tuple[Any, dict[str, Any]]]] = {"plain": plain, "fastload": fastload}


def digests(model: torch.nn.Module) -> dict[str, list[str]]:
    """Return kind, dtype, shape and sha256 of every parameter and buffer, those that no state dict holds included."""
    import torch

    found = {}
    for kind in ("named_parameters", "named_buffers"):
        for name, tensor in getattr(model, kind)(remove_duplicate=False):
            flat = tensor.detach().contiguous().reshape(-1)
            digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
            found[name] = [kind, str(tensor.dtype), str(list(tensor.shape)), digest]
    return found


def embed(model: Any, repo: str) -> list[list[float]]:
    """Return the embedding of each of :data:`SENTENCES`: the mean over its tokens, of length 1."""
    import torch
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(repo)(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
    embedding: list[list[float]] = torch.nn.functional.normalize(mean).tolist()
    return embedding


def main(program: str, repo: str, target: str) -> None:
    """Load, stop the clock, write what came of it to *target*."""
    clock = ImportClock().install()
    model, details = PROGRAMS[program](repo)
    ready_s = time.monotonic()
    record = {
        "started_s": STARTED_S,
        "ready_s": ready_s,
        "imports": [span for span in clock.intervals if span[0] < ready_s],
        **details,
        "class": type(model).__name__,
        "tensors": digests(model),
        "embedding": embed(model, repo),
    }
    Path(target).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
