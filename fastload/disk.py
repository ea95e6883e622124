"""What the file system refuses about one file of a transfer, and what the user can do about it."""

from __future__ import annotations

import errno

from .errors import CacheError, FastloadError


class translated:
    """Turns what the file system raises about one file into a :class:`CacheError`."""

    def __init__(self, path: str, size: int, doing: str = "written to") -> None:
        self._path = path
        self._size = size
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, FastloadError):
            return
        hint = {
            errno.ENOSPC: "free some space, or choose another cache_dir; what has landed is kept and will be used",
            errno.EDQUOT: "the quota is used up; what has landed is kept and will be used",
            errno.EACCES: "this user may not write there; choose another cache_dir (HF_HUB_CACHE)",
            errno.EROFS: "the file system is read-only; choose another cache_dir (HF_HUB_CACHE)",
        }.get(error.errno or 0)
        where = f" ({error.filename})" if error.filename else ""
        raise CacheError(
            f"{self._path} ({self._size} bytes) cannot be {self._doing} the cache: {error.strerror or error}{where}",
            hint=hint,
        ) from error
