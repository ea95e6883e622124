"""Digests: what the bytes of a file must hash to, computed piece by piece."""

from __future__ import annotations

import hashlib

from .errors import IntegrityError
from .types import Digest


class Hasher:
    """Hashes one file in order; releases the GIL for pieces above 2 KiB. Use from one thread at a time."""

    def __init__(self, digest: Digest, size: int) -> None:
        self.digest = digest
        if digest.algorithm == "sha256":
            self._hash = hashlib.sha256()
        else:  # what git calls a blob: gitformat-pack(5), "blob <size>\0<content>"
            self._hash = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        self.hashed_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes of the file."""
        self._hash.update(data)
        self.hashed_bytes += len(data)

    @property
    def actual(self) -> Digest:
        """The digest of what was added so far."""
        return Digest(self.digest.algorithm, self._hash.hexdigest())

    def matches(self) -> bool:
        """Tell whether what was added is what was promised."""
        return self.actual == self.digest


def mismatch(file: str, expected: Digest, actual: Digest, mirror: str, *, final: bool) -> IntegrityError:
    """Return the error for a file whose bytes are not what its source promised."""
    return IntegrityError(
        f"{file}: the bytes from {mirror or 'the cache'} hash to {actual}, expected {expected}",
        file=file,
        expected=str(expected),
        actual=str(actual),
        mirror=mirror,
        hint="the server or something on the way changes bytes; try another mirror or endpoint" if final else None,
    )
