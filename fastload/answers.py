"""Reading what servers answer. Pure functions; headers are case-insensitive mappings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from .errors import MirrorError, MirrorStatusError, RangeError
from .retry import retry_after_s, retryable_status
from .types import ByteRange, Digest


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of *url* (RFC 6454): what a token is bound to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def public(url: str) -> str:
    """Return *url* without credentials, query and fragment, fit for messages and logs."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def length(headers: Mapping[str, str]) -> int | None:
    """Return the length of the body as sent, or ``None`` where only its end will tell."""
    if "Transfer-Encoding" in headers:
        return None
    text = headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def other_size(url: str, actual: object, expected: int) -> RangeError:
    """Return the error for a file of another size than its source said."""
    return RangeError(f"{public(url)}: holds {actual} bytes, expected {expected}", mirror=public(url))


def check_content_range(headers: Mapping[str, str], url: str, want: ByteRange, size: int) -> None:
    """Refuse a 206 that is not exactly *want* of a file of *size* bytes (RFC 9110, 14.4)."""
    text = headers.get("Content-Range", "")
    unit, _, rest = text.partition(" ")
    covered, _, total = rest.partition("/")
    if unit != "bytes" or covered != f"{want.start}-{want.stop - 1}":
        raise RangeError(f"{public(url)}: asked for {want}, got Content-Range {text!r}", mirror=public(url))
    if total not in ("*", str(size)):
        raise other_size(url, total, size)
    if length(headers) not in (None, len(want)):
        raise RangeError(f"{public(url)}: {length(headers)} bytes for {want}", mirror=public(url))


def check_etag(headers: Mapping[str, str], digest: Digest | None, mirror: str) -> None:
    """Refuse a mirror that names another digest for the file than its source did, before its bytes travel.

    Reads ``X-Linked-ETag``, else ``ETag``; whatever is not a digest in the Hub's form says nothing.

    Raises:
        MirrorError: It names another.
    """
    if digest is None:
        return
    text = headers.get("X-Linked-ETag") or headers.get("ETag") or ""
    try:
        named = Digest.parse(text.removeprefix("W/").strip('"'))
    except ValueError:
        return
    if named.algorithm == digest.algorithm and named != digest:
        raise MirrorError(
            f"{mirror}: has another version of the file (etag {named.value[:12]}…)", mirror=mirror, retryable=False
        )


def status_error(status: int, reason: str | None, headers: Mapping[str, str], url: str) -> MirrorStatusError:
    """Return the error for an answer with an error status, with the server's own reason."""
    reason = headers.get("X-Error-Message") or reason or ""
    request_id = headers.get("X-Request-Id") or headers.get("X-Amz-Cf-Id")
    return MirrorStatusError(
        f"{public(url)}: {status} {reason}".rstrip() + (f" (request {request_id})" if request_id else ""),
        mirror=public(url),
        retryable=retryable_status(status),
        status=status,
        retry_after_s=retry_after_s(headers, time.time()),
        code=headers.get("X-Error-Code"),
    )
