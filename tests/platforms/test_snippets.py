"""The snippets of docs/platforms.md are there and are Python, also where no platform's SDK is installed."""

from __future__ import annotations

import json

import pytest
from serving import snippets

FILES = {
    "Truss": ["model/model.py", "config.yaml"],
    "Beam": ["app.py"],
    "Mystic": ["pipe.py"],
    "Cog": ["run.py"],
    "LitServe": ["server.py"],
    "BentoML": ["service.py"],
    "Ray Serve": ["app.py"],
    "KServe": ["server.py"],
    "MLServer": ["model.py", "model-settings.json"],
}


@pytest.mark.parametrize("section", FILES)
def test_each_platform_has_its_files(section: str):
    files = snippets("platforms.md", section)
    assert list(files) == FILES[section]
    for name, text in files.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
            assert "fastload." in text
        elif name.endswith(".json"):
            json.loads(text)
