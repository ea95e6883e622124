"""A hub with the model that the documents load, and a witness of each load inside the servers."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, TOKENS, Stage

from fastload.testing import Hub

#: A plugin, installed as a stranger's: who loads, on which platform, with which cache.
WITNESS = """
import json, os, threading
import fastload
from fastload_platforms.known import recognise

@fastload.hookimpl
def fastload_observer(source, settings):
    platform = recognise(os.environ)
    record = {"pid": os.getpid(), "source": source, "platform": platform and platform.name,
              "cache_dir": str(settings.cache_dir), "thread": threading.current_thread().name}
    with open(os.environ["WITNESS"], "a") as file:
        file.write(json.dumps(record) + "\\n")
"""


#: Without fastload.
REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM

with torch.inference_mode():
    logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.tensor([json.loads(sys.argv[2])])).logits
print(int(logits[0, -1].argmax()))
"""


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Iterator[Callable[[], int]]:
    """Ask for the token that transformers gives for TOKENS; it is worked out while the first server starts."""
    words = [sys.executable, "-c", REFERENCE, str(tiny_model), json.dumps(TOKENS)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield functools.cache(lambda: int(process.communicate(timeout=120)[0]))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def make_stage(tiny_model: Path, make_hub: Callable[..., Hub], tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Make the stage; ``missing=True``: the hub does not know the model."""

    def make(*, missing: bool = False) -> Stage:
        hub = make_hub({"org/other" if missing else MODEL: tiny_model})
        site = tmp_path / "site"
        info = site / "witness-1.dist-info"
        info.mkdir(parents=True)
        (site / "witness.py").write_text(WITNESS)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: witness\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[fastload]\nwitness = witness\n")
        for name in ("app", "home"):
            (tmp_path / name).mkdir()
        environ = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(site), "WITNESS": str(tmp_path / "witness.jsonl"),
        }  # fmt: skip
        return Stage(tmp_path / "app", environ, hub, tiny_model, request.getfixturevalue("reference"))

    return make


@pytest.fixture
def stage(make_stage: Callable[..., Stage]) -> Iterator[Stage]:
    """A hub that serves the model, and an empty cache."""
    yield make_stage()


@pytest.fixture
def failing(make_stage: Callable[..., Stage]) -> Iterator[Stage]:
    """A hub that does not know the model: every load fails."""
    yield make_stage(missing=True)
