"""Sources on this machine: a folder that holds a model. Nothing travels, and there is no digest to check against."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotFoundError
from ..hookspecs import hookimpl
from ..types import Http, Manifest, RemoteFile

if TYPE_CHECKING:
    from ..settings import Settings


@dataclass(frozen=True, slots=True)
class LocalSource:
    """One folder (or one file of it)."""

    uri: str
    name: str
    revision: str
    endpoint: str
    path: Path

    async def files(self, http: Http, settings: Settings) -> Manifest:
        """List the folder; hidden folders are left out.

        Raises:
            NotFoundError: It holds nothing.
        """
        import asyncio

        files = await asyncio.to_thread(self._walk)
        if not files:
            raise NotFoundError(f"{self.path} holds no files")
        return Manifest(self.name, "main", "local", "", files, local=self.path)

    def _walk(self) -> tuple[RemoteFile, ...]:
        found = []
        for folder, names, files in os.walk(self.path, followlinks=True):
            names[:] = sorted(n for n in names if not n.startswith("."))
            for name in sorted(files):
                full = Path(folder, name)
                if full.is_file():  # not a dangling link
                    found.append(RemoteFile(full.relative_to(self.path).as_posix(), full.stat().st_size, None))
        return tuple(found)


@hookimpl(tryfirst=True)  # as transformers and diffusers have it: a folder that exists is never a name on the hub
def fastload_source(uri: str, revision: str | None, settings: Settings) -> LocalSource | None:
    """Take an existing folder; say so when a path does not exist."""
    path = Path(uri.removeprefix("file://")).expanduser()
    if uri and path.is_dir():
        return LocalSource(uri, uri, "main", "", path.absolute())
    if uri.startswith(("/", "./", "../", "~", "file://")):
        raise NotFoundError(f"{path} is not a folder", hint="a source is a folder, org/name or org/name@revision")
    return None
