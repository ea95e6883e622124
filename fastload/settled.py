"""What stands in the cache where huggingface_hub is about to look for a file: nothing, the file, or a link to one in flight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cache import RepoCache, is_in_flight
from .inflight import InFlight
from .router import named


class Place:
    """Where the file that a call of huggingface_hub asks for stands, as far as the cache knows.

    Args:
        kwargs: Of ``_hf_hub_download_to_cache_dir``.

    Raises:
        FastloadError: These are no names that a cache can hold.
    """

    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        self._cache = RepoCache(Path(kwargs["cache_dir"]), kwargs["repo_id"])
        self._path: str = kwargs["filename"]
        self._commit = self._cache.read_ref(str(kwargs["revision"]))

    @property
    def pointer(self) -> Path | None:
        """The file's path in the snapshot; ``None`` while nobody knows the commit."""
        return None if self._commit is None else self._cache.snapshot_path(self._commit) / self._path

    @property
    def settled(self) -> bool:
        """Whether the file is there, or it is known that the repository has none."""
        pointer = self.pointer
        if pointer is None or self._commit is None:
            return False
        return (pointer.exists() and not is_in_flight(pointer)) or self._cache.lacks(self._commit, self._path)

    def flying(self) -> InFlight | None:
        """Return the file while it arrives here, and its path was given out; one that has failed is forgotten first."""
        pointer = self.pointer
        route = named(pointer) if pointer is not None and is_in_flight(pointer) else None
        if not isinstance(route, InFlight):
            return None
        error = route.doomed
        if error is not None:
            route.heard(error)  # whoever asks again hears how that ends
            route.close()
            return None
        return route

    def land(self) -> None:
        """Leave no link to a file in flight, for somebody who cannot read one: wait for the file.

        Raises:
            Exception: Why it will not come.
        """
        pointer, flying = self.pointer, self.flying()
        if flying is not None:
            flying.wait_verified()
        elif pointer is not None and is_in_flight(pointer):  # another process's: its number may mean another file here
            pointer.unlink(missing_ok=True)
