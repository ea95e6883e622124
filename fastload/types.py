"""The words of the house: frozen records and the protocols that plugins fill.

Standard library only, no I/O. Ranges are half-open everywhere: ``start <= byte < stop``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from .settings import Settings


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """Bytes ``start`` to ``stop`` (half-open) of one file."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"bytes {self.start}-{self.stop - 1}"

    @property
    def header(self) -> str:
        """The value of a ``Range`` request header (RFC 9110, 14.2)."""
        return f"bytes={self.start}-{self.stop - 1}"


Algorithm = Literal["sha256", "git-sha1"]


@dataclass(frozen=True, slots=True)
class Digest:
    """What the bytes of a whole file must hash to.

    ``sha256`` is over the content (large files); ``git-sha1`` over ``blob {size}\\0`` and the content (small files).
    """

    algorithm: Algorithm
    value: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``sha256:…``, ``git-sha1:…`` or a bare Hub ETag, whose length tells (64 or 40 hex digits).

        Raises:
            ValueError: Neither.
        """
        algorithm, _, value = text.rpartition(":")
        value = value.lower()
        expected = {64: "sha256", 40: "git-sha1"}.get(len(value))
        if expected is None or algorithm not in ("", expected) or not all(c in "0123456789abcdef" for c in value):
            raise ValueError(f"not a sha256 or git-sha1 digest: {text!r}")
        return cls("sha256" if expected == "sha256" else "git-sha1", value)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a source: where it stands in the snapshot, how large it is, what it must hash to.

    Attributes:
        path: Relative, with ``/``; never absolute, never with ``..``.
        size: In bytes.
        digest: ``None`` only where the source cannot tell; such a file is refused unless the user allowed it.
        url_path: What follows the base URL of the origin or of any mirror, percent-encoded.
        url: Set where the file has an address of its own that mirrors do not share.
        blob_id: Git's name of the file (of the pointer, for LFS), where the source tells it; nothing is decided by it.
    """

    path: str
    size: int
    digest: Digest | None
    url_path: str = ""
    url: str | None = None
    blob_id: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Manifest:
    """All files of one source at one commit, as the source itself (or the lock) lists them.

    Attributes:
        source: As the framework would name it: ``org/name`` or a path.
        commit: The full commit; what ``revision`` stood for when it was asked.
        endpoint: Base URL of the origin; the only place that ever sees the token.
        local: The folder, when the files are on this machine and nothing travels.
    """

    source: str
    revision: str
    commit: str
    endpoint: str
    files: tuple[RemoteFile, ...]
    local: Path | None = None

    def get(self, path: str) -> RemoteFile | None:
        """Return the file at *path*, or ``None``."""
        return next((f for f in self.files if f.path == path), None)


@dataclass(frozen=True, slots=True)
class Request:
    """What one transfer is to deliver.

    Attributes:
        source: As the user wrote it.
        patterns: Shell patterns of the files wanted; ``None`` leaves the choice to the plan.
        everything: Without patterns: all files, not only what a framework would read.
        options: Those of the framework's keyword arguments that choose files: variant, subfolder, use_safetensors …, and
            ``components``: the names of those that may be parts of a pipeline that the caller brings.
        locked: Accept exactly these files; no metadata request is made.
        on_demand: Deliver each file when it is asked for while the transfer runs, and write nothing else into the cache.
    """

    source: str
    revision: str | None = None
    patterns: tuple[str, ...] | None = None
    everything: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    locked: Manifest | None = None
    on_demand: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A folder that holds (or, while a load runs, will hold) verified files of one commit.

    Attributes:
        path: ``snapshots/{commit}`` of the Hugging Face cache, or the local folder that was asked for.
        files: Relative paths that this load asked for, sorted.
    """

    path: Path
    source: str
    revision: str
    commit: str
    files: tuple[str, ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a weight file.

    Attributes:
        dtype: In safetensors' spelling: ``F32``, ``BF16``, ``F8_E4M3``, ``I64``, ``BOOL`` …
        shape: Row-major.
        span: The bytes of the *file* (not of its data section) that are the tensor, little-endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    span: ByteRange


@dataclass(frozen=True, slots=True)
class NeedBytes:
    """A format's answer when the head is too short: ask again with the first ``count`` bytes of the file.

    Attributes:
        count: It takes at least these; a file that is shorter is damaged.
        likely: As many will probably do; where the file is shorter, all of it.
    """

    count: int
    likely: int = 0


@runtime_checkable
class Format(Protocol):
    """One weight format: turns the head of a file into tensors.

    ``metadata(head) -> dict[str, str]`` may be there too; it is called with the same head once ``parse`` is content.
    So may ``file_bytes: int``, how long the whole file must be; it is read once ``parse`` is content.

    A format whose files can be read only as a whole has ``load(path) -> Mapping[str, torch.Tensor]``, which gets the final
    path of the verified file; ``parse`` is then never called, and ``metadata`` is asked after ``load``.
    """

    name: str

    def parse(self, head: bytes) -> Sequence[TensorInfo] | NeedBytes:
        """Return the tensors of the file that starts with *head*, or how many bytes that takes.

        Raises:
            fastload.errors.FormatError: The head cannot belong to a sound file.
        """


class Http(Protocol):
    """What a source may use to ask for metadata: authenticated, retried requests."""

    async def get_json(self, url: str) -> tuple[Any, Mapping[str, str]]:
        """GET *url*; return the decoded body and the (case-insensitive) headers."""

    async def head(self, url: str) -> Mapping[str, str]:
        """HEAD *url* without following it to another origin; return the (case-insensitive) headers."""


@runtime_checkable
class Source(Protocol):
    """Where files come from. ``files`` is the only method that may touch the network.

    Attributes:
        uri: As the user wrote it.
        name: As the framework would name it (``org/name``, or a path).
        revision: As asked for; ``main`` where nothing was said.
        endpoint: Base URL of the origin, without a slash at the end.
    """

    uri: str
    name: str
    revision: str
    endpoint: str

    async def files(self, http: Http, settings: Settings) -> Manifest:
        """List every file with size and digest, at one commit."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A serving platform that this process runs on; its settings are defaults that everything else overrides."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
