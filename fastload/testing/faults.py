"""Scripted faults: which answers of a hub go wrong, how, and how often."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

from ..errors import SettingsError
from ..types import ByteRange

#: Instead of any answer, or instead of the right one.
HeadKind = Literal["status", "hang", "drop", "redirect_loop", "captive", "expire", "garbage_json"]
#: The answer's head lies; the body is right.
LabelKind = Literal["wrong_etag", "wrong_commit"]
#: The bytes of a file come wrong, late, or not at all.
BodyKind = Literal[
    "reset", "truncate", "stall", "hold", "slow", "flip", "no_range", "bad_range", "chunked", "gzip"
]  # fmt: skip
Kind = HeadKind | LabelKind | BodyKind
Origin = Literal["hub", "cdn"]

HEAD_KINDS = frozenset(get_args(HeadKind))
LABEL_KINDS = frozenset(get_args(LabelKind))
BODY_KINDS = frozenset(get_args(BodyKind))
#: Body faults that happen at one position of the file.
POSITION_KINDS = frozenset({"reset", "truncate", "stall", "hold", "slow", "flip"})


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault for the answers that match it, ``times`` times after the first ``skip`` of them.

    An answer counts only where the fault can show: a fault of the body needs a file's bytes that reach its position,
    ``bad_range`` and ``no_range`` a request with a range, ``expire`` a signed URL, ``garbage_json`` an API request.

    =================  ============================================================================================
    ``status``         ``status`` with ``headers`` (``Retry-After``, ``RateLimit`` …) and a short body
    ``hang``           no answer until the client goes
    ``drop``           the connection is reset before the head
    ``redirect_loop``  302 to the same URL
    ``captive``        200 with a page of HTML and none of the Hub's headers
    ``expire``         403 as if the signature of a signed URL had run out
    ``garbage_json``   200 with half a JSON document (API only)
    ``wrong_etag``     ``ETag`` and ``X-Linked-ETag`` are zeros
    ``wrong_commit``   ``X-Repo-Commit`` is another one
    ``reset``          TCP RST at the position
    ``truncate``       FIN at the position, short of Content-Length
    ``stall``          no more bytes from the position on; the connection stays open until the client goes
    ``hold``           as ``stall``, until ``Hub.release()``; then it goes on
    ``slow``           ``bytes_per_s`` from the position on
    ``flip``           the byte at the position is XORed with ``mask``
    ``no_range``       200 and the whole file
    ``bad_range``      Content-Range is off by ``shift``; the body is the one asked for
    ``chunked``        Transfer-Encoding: chunked, no Content-Length
    ``gzip``           Content-Encoding: gzip and a weak ETag, whatever the client accepts
    =================  ============================================================================================

    Attributes:
        path: fnmatch pattern over the path in the repository, or over the path of the URL.
        method: ``GET``, ``HEAD``, ``POST`` or ``*``.
        origin: Only answers of this server; ``None``: of both.
        times: ``None``: always.
        after_bytes: The position, counted from the first byte of the answer.
        offset: The position, counted from the first byte of the file; wins over ``after_bytes``.

    Raises:
        SettingsError: There is no such kind.
    """

    kind: Kind
    _: KW_ONLY
    path: str = "*"
    method: str = "GET"
    origin: Origin | None = None
    times: int | None = None
    skip: int = 0
    after_bytes: int = 0
    offset: int | None = None
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    bytes_per_s: int = 1024
    mask: int = 1
    shift: int = 1

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS | LABEL_KINDS | BODY_KINDS:
            raise SettingsError(f"no fault of kind {self.kind!r}", hint=f"one of {', '.join(sorted(_ALL))}")

    def position(self, span: ByteRange) -> int | None:
        """Return where in the file it happens, or ``None`` where an answer with *span* does not get there."""
        position = span.start + self.after_bytes if self.offset is None else self.offset
        return position if span.start <= position < span.stop else None


_ALL = HEAD_KINDS | LABEL_KINDS | BODY_KINDS


@dataclass(frozen=True, slots=True)
class Facts:
    """What a fault can match: the request, and for the body the bytes that would go out."""

    origin: Origin
    method: str
    url_path: str
    file: str | None = None
    is_api: bool = False
    is_ranged: bool = False
    span: ByteRange | None = None


class Script:
    """The faults of one hub and how often each has matched. Thread-safe."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self._matched: list[tuple[Fault, list[int]]] = []
        self.set(faults)

    def set(self, faults: Iterable[Fault]) -> None:
        """Forget all faults and start with *faults*."""
        matched = [(fault, [0]) for fault in faults]
        with self._lock:
            self._matched = matched

    def take(self, kinds: Iterable[str], facts: Facts, *, limit: int | None = None) -> list[Fault]:
        """Return the faults of *kinds* that hit the answer described by *facts*, at most *limit*; they are counted."""
        hits: list[Fault] = []
        with self._lock:
            for fault, matched in self._matched:
                if len(hits) == limit:
                    break
                if fault.kind not in kinds or not _matches(fault, facts):
                    continue
                matched[0] += 1
                if fault.skip < matched[0] and (fault.times is None or matched[0] <= fault.skip + fault.times):
                    hits.append(fault)
        return hits


def _matches(fault: Fault, facts: Facts) -> bool:
    if fault.method not in ("*", facts.method) or fault.origin not in (None, facts.origin):
        return False
    if not any(fnmatchcase(name, fault.path) for name in (facts.file, facts.url_path) if name is not None):
        return False
    if fault.kind == "expire":
        return facts.origin == "cdn"
    if fault.kind == "garbage_json":
        return facts.is_api
    if fault.kind in ("no_range", "bad_range"):
        return facts.is_ranged
    if fault.kind in POSITION_KINDS:
        return facts.span is not None and fault.position(facts.span) is not None
    return True
