"""The plugin guide can be followed: its files are written, its commands run, and they print what it says they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastload
from fastload.testing import PROMISES

GUIDE = Path(__file__).parent.parent / "docs" / "plugins.md"
_BLOCK = re.compile(r"^```(?P<kind>\w+)(?: (?P<how>\w+))?\n(?P<text>.*?)^```$", re.M | re.S)
_NAME = re.compile(r"`(\w+\.(?:py|toml))`")

pytest.importorskip("torch", reason="the guide loads tensors")
pytest.importorskip("hatchling", reason="builds the distribution of the guide")
pytest.importorskip("pip", reason="installs it")


@dataclass
class Step:
    """One block of the guide: a file to write, a change of one, commands to run, or what they print."""

    kind: str
    text: str
    file: str = ""


def steps() -> list[Step]:
    text = GUIDE.read_text()
    found = []
    for block in _BLOCK.finditer(text):
        paragraph = text[: block.start()].rstrip().rpartition("\n\n")[2]
        names = _NAME.findall(paragraph) if paragraph.endswith(":") else []
        is_file = block["kind"] in ("python", "toml") and not block["how"] and names
        found.append(Step(block["how"] or block["kind"], block["text"], names[-1] if is_file else ""))
    return found


def _words(text: str) -> str:
    """Return *text* with single spaces: how wide a column is depends on what else is installed."""
    return " ".join(text.split())


class Reader:
    """Somebody who follows the guide in an empty folder, in an environment of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "desk"
        self.folder.mkdir()
        self.printed = ""
        self.old = ""
        environment = folder / "venv"
        # What is installed here can be seen from there; what is installed there cannot be seen from here.
        venv.create(environment, with_pip=False, symlinks=True)
        [packages] = environment.glob("lib/python*/site-packages")
        root = Path(fastload.__file__).parent.parent
        plugins = [str(root / "plugins")] if (root / "plugins").is_dir() else []
        (packages / "here.pth").write_text("\n".join([*filter(os.path.isdir, sys.path), str(root), *plugins]) + "\n")
        for name, module in (("pip", "pip._internal.cli.main"), ("pytest", "pytest"), ("fastload", "fastload.cli")):
            script = environment / "bin" / name
            script.write_text(f"#!{environment}/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
            script.chmod(0o755)
        self.environ = {
            "PATH": f"{environment / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "HF_HOME": str(folder / "hf"),
            "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore", "PIP_CACHE_DIR": str(folder / "pip"), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def follow(self, step: Step) -> None:
        if step.file:
            (self.folder / step.file).write_text(step.text)
        elif step.kind == "bash":
            self.run(step.text)
        elif step.kind == "text":
            printed = _words(self.printed)
            for line in step.text.splitlines():
                assert _words(line) in printed, f"the guide promises: {line}\n{self.printed}"
        elif step.kind == "replace":
            self.old = step.text
        elif step.kind == "with":
            path = self.folder / "fastload_crate.py"
            assert path.read_text().count(self.old) == 1
            path.write_text(path.read_text().replace(self.old, step.text))
        else:
            compile(step.text, str(GUIDE), "exec")

    def run(self, commands: str) -> None:
        place = self.folder.parent / "place"
        done = subprocess.run(
            ["bash", "-c", f"trap 'pwd > {place}' EXIT\nset -e\n{commands}"],
            cwd=self.folder, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.folder = Path(place.read_text().strip())
        self.printed = done.stdout
        # The guide shows how a promise is broken first; what pytest must say stands in the guide.
        assert not done.returncode or "pytest" in commands, f"{commands}ended with {done.returncode}:\n{done.stdout}"


@pytest.mark.timeout(300)  # half a minute where nothing else runs
def test_the_guide_can_be_followed(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    files = steps()
    assert {"pyproject.toml", "fastload_crate.py", "test_crate.py"} <= {step.file for step in files}
    for step in files:
        reader.follow(step)


def test_the_guide_explains_every_promise() -> None:
    rows = re.findall(r"^\| `(\w+)` \| \S", GUIDE.read_text(), re.M)
    assert rows == list(PROMISES)
