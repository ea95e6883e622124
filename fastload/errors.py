"""Everything that fastload raises on purpose.

    FastloadError                     .hint: what the user can do about it
    ├─ SettingsError                  a value is wrong; names the setting and where it came from (+ ValueError)
    ├─ SourceError                    what was asked for cannot be had
    │  ├─ NotFoundError               repository, revision or file (+ FileNotFoundError)
    │  ├─ AccessError                 401/403: gated, private, disabled, no token
    │  ├─ OfflineError                offline, and not in the cache
    │  └─ UnsupportedSourceError      no plugin knows this source, or nothing builds what it holds
    ├─ DownloadError                  the bytes did not arrive; .file .span .attempts
    │  ├─ MirrorError                 one mirror, one attempt; .mirror .retryable (seldom leaves the engine)
    │  │  ├─ MirrorTimeoutError       connect, read or too slow (+ TimeoutError)
    │  │  ├─ MirrorStatusError        .status .retry_after_s
    │  │  └─ RangeError               another range than the one asked for
    │  └─ AllMirrorsFailedError       lists every attempt: mirror, seconds, reason
    ├─ IntegrityError                 the bytes arrived and are wrong; .file .expected .actual .mirror
    │  ├─ SourceChangedError          size, digest or commit changed during the download
    │  └─ RefusedFileError            under accelerate(), in transformers' own code (+ OSError)
    ├─ FormatError                    a weight file cannot be read: header, offsets, dtype, missing shard
    ├─ CacheError                     disk full, lock, permission (+ OSError)
    ├─ DeviceError                    pinning, copy, out of memory
    └─ PluginError                    a plugin or the framework that it serves is broken or missing; .plugin

Nothing here inherits from aiohttp, torch or tenacity, and no exception group leaves the package. A message says what,
where and how much; the attempts follow, one a line; the hint comes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at one range: where, for how long, and how it ended."""

    mirror: str
    seconds: float
    reason: str

    def __str__(self) -> str:
        return f"{self.mirror}: {self.reason} (after {self.seconds:.1f} s)"


class FastloadError(Exception):
    """Base of all errors of this package.

    Args:
        message: What, where, how much.
        hint: What the user can do; shown on a line of its own.
    """

    #: Attributes, beside message and hint, that travel with the error from the transfer process to the program.
    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield the message, then what belongs under it, then the hint."""
        yield self.message
        if self.hint:
            yield f"hint: {self.hint}"


class SettingsError(FastloadError, ValueError):
    """A setting has a wrong name or value."""


class SourceError(FastloadError):
    """What was asked for cannot be had."""


class NotFoundError(SourceError, FileNotFoundError):
    """The repository, revision or file does not exist (or is private: hubs do not tell)."""


class AccessError(SourceError):
    """The hub knows it and does not let this token have it."""


class OfflineError(SourceError):
    """The network is off, or the hub out of reach, and the cache does not hold it all."""


class UnsupportedSourceError(SourceError):
    """No plugin resolves this source, or none can build what it holds."""


class DownloadError(FastloadError):
    """The bytes did not arrive."""

    fields: ClassVar[tuple[str, ...]] = ("file", "span", "attempts")

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        span: tuple[int, int] | None = None,
        attempts: tuple[Attempt, ...] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.file = file
        self.span = span
        self.attempts = attempts

    def lines(self) -> Iterator[str]:
        """Yield the message, one line an attempt, the hint."""
        yield self.message
        for attempt in self.attempts:
            yield f"  {attempt}"
        if self.hint:
            yield f"hint: {self.hint}"


class MirrorError(DownloadError):
    """One mirror failed once.

    Args:
        mirror: Base URL, never with credentials or a signature.
        retryable: Whether the same request may succeed later or elsewhere.
    """

    fields: ClassVar[tuple[str, ...]] = ("file", "span", "attempts", "mirror", "retryable")

    def __init__(self, message: str, *, mirror: str = "", retryable: bool = True, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.mirror = mirror
        self.retryable = retryable


class MirrorTimeoutError(MirrorError, TimeoutError):
    """No connection, no byte, or too few bytes for too long."""


class MirrorStatusError(MirrorError):
    """The mirror answered with an error status.

    Args:
        status: The HTTP status.
        retry_after_s: How long the mirror asked to be left alone, from ``Retry-After`` or ``RateLimit``.
        code: The hub's ``X-Error-Code``, if any.
    """

    fields: ClassVar[tuple[str, ...]] = (*MirrorError.fields, "status", "retry_after_s", "code")

    def __init__(
        self, message: str, *, status: int = 0, retry_after_s: float | None = None, code: str | None = None, **rest: Any
    ) -> None:
        super().__init__(message, **rest)
        self.status = status
        self.retry_after_s = retry_after_s
        self.code = code


class RangeError(MirrorError):
    """The answer covers another range than the one asked for (RFC 9110, 15.3.7)."""


class AllMirrorsFailedError(DownloadError):
    """Every mirror and every attempt failed for one range."""


class IntegrityError(FastloadError):
    """The bytes arrived and are wrong."""

    fields: ClassVar[tuple[str, ...]] = ("file", "expected", "actual", "mirror")

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        expected: str | None = None,
        actual: str | None = None,
        mirror: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.file = file
        self.expected = expected
        self.actual = actual
        self.mirror = mirror


class SourceChangedError(IntegrityError):
    """Size, digest or commit changed while the download ran."""


class RefusedFileError(IntegrityError, OSError):
    """As :class:`IntegrityError`, for callers that let no other error through than an :class:`OSError` (transformers)."""


class FormatError(FastloadError):
    """A weight file cannot be read as what it says it is."""


class CacheError(FastloadError, OSError):
    """The cache on disk cannot be used: full, locked, not writable, damaged."""


class DeviceError(FastloadError):
    """The device refused: pinning, copy, memory."""


class PluginError(FastloadError):
    """A plugin is broken, or the framework that it serves is missing."""

    fields: ClassVar[tuple[str, ...]] = ("plugin",)

    def __init__(self, message: str, *, plugin: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.plugin = plugin


def to_record(error: FastloadError) -> dict[str, Any]:
    """Return *error* as plain data, so that it can cross from one process to another."""
    record: dict[str, Any] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    for name in error.fields:
        value = getattr(error, name)
        record[name] = [asdict(a) for a in value] if name == "attempts" else value
    return record


def from_record(record: dict[str, Any]) -> FastloadError:
    """Return the error that :func:`to_record` wrote; an unknown type becomes a plain :class:`FastloadError`."""
    values = dict(record)
    kind = _BY_NAME.get(values.pop("type"), FastloadError)
    message = values.pop("message")
    known = {"hint", *kind.fields}
    values = {name: value for name, value in values.items() if name in known}
    if "attempts" in values:
        values["attempts"] = tuple(Attempt(**a) for a in values["attempts"])
    if values.get("span") is not None:
        values["span"] = tuple(values["span"])
    return kind(message, **values)


def _tree(root: type[FastloadError]) -> Iterator[type[FastloadError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


_BY_NAME = {kind.__name__: kind for kind in _tree(FastloadError)}


class FastloadWarning(UserWarning):
    """Something went another way than was asked for, and the result is the same."""
