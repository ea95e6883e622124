"""A transfer as the program sees it: files that are there, files that are arriving, and how it ended.

The engine tells what it does in messages (plain data). In process they are applied as they are; the transfer process
writes them to its pipe and the program applies what it reads. So every reader works on the same object, wherever the
engine runs, and for a file that yet another process fetches.
"""

from __future__ import annotations

import shutil
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import FastloadError, IntegrityError, from_record
from .events import Event, Events
from .types import Digest, Snapshot
from .view import FileView


class Transfer:
    """What one transfer has told so far. Thread-safe; readers block on it, messages wake them.

    Attributes:
        snapshot: Set with the manifest.
        files: By path, every file that this transfer delivers.
        weights: Paths of the weight files among them, in the order of delivery.
        left: Where there are none: paths of files that hold weights for somebody else.
        error: Why it ended early.
    """

    def __init__(self, events: Events | None = None) -> None:
        self.events = events or Events()
        self.snapshot: Snapshot | None = None
        self.endpoint = ""
        self.files: dict[str, FileView] = {}
        self.weights: tuple[str, ...] = ()
        self.left: tuple[str, ...] = ()
        self.digests: dict[str, Digest | None] = {}
        self.error: FastloadError | None = None
        self._temporary: weakref.finalize[Any, Transfer] | None = None
        self.finished = False
        self._changed = threading.Condition()

    def apply(self, message: dict[str, Any]) -> None:
        """Take in one message of the engine."""
        kind = message["kind"]
        if kind == "event":
            self.events.pass_on(Event.from_record(message["event"]))
            return
        with self._changed:
            if kind == "manifest":
                self._take_manifest(message)
            elif kind == "arriving":
                self.files[message["file"]].arriving(message["data"], message["journal"])
            elif kind == "temporary":  # the cache cannot be written: what is delivered goes with this object
                self._temporary = weakref.finalize(self, shutil.rmtree, message["path"], ignore_errors=True)
            elif kind == "ready":
                self.files[message["file"]].done(message["final"])
            elif kind == "refused":
                self.files[message["file"]].error = from_record(message["error"])
            elif kind == "failed":
                self.error = self.error or from_record(message["error"])
            elif kind == "finished":
                self.finished = True
            self._changed.notify_all()

    def _take_manifest(self, message: dict[str, Any]) -> None:
        for record in message["files"]:
            path = record["path"]
            if path not in self.files:
                self.files[path] = FileView(self, path, record["size"])
                self.digests[path] = Digest.parse(record["digest"]) if record["digest"] else None
        self.weights = tuple(message["weights"])
        self.left = tuple(message.get("left", ()))
        self.endpoint = message["endpoint"]
        self.snapshot = Snapshot(
            path=Path(message["path"]),
            source=message["source"],
            revision=message["revision"],
            commit=message["commit"],
            files=tuple(sorted(self.files)),
        )

    def fail(self, error: FastloadError) -> None:
        """End every wait, here and in all views, with *error*. The first error stays."""
        with self._changed:
            if self.error is None and not self.finished:
                self.error = error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise if the transfer has failed."""
        if self.error is not None:
            raise self.error

    def wait(self, ready: Callable[[], bool]) -> None:
        """Block this thread until ``ready()``; raise if the transfer fails first."""
        with self._changed:
            while not ready():
                self.check()
                self._changed.wait()

    def wait_manifest(self) -> Snapshot:
        """Block until the files are known; return the snapshot."""
        self.wait(lambda: self.snapshot is not None)
        if self.snapshot is None:
            raise FastloadError("the transfer ended without a manifest")
        return self.snapshot

    def wait_files(self, paths: Iterable[str] | None = None) -> None:
        """Block until *paths* (default: every file) are verified and under their final names."""
        self.wait_manifest()
        for path in tuple(self.files) if paths is None else paths:
            view = self.files[path]
            self.wait(lambda view=view: view.ready or view.error is not None)  # type: ignore[misc]
            if view.error is not None:
                raise view.error

    def wait_verified(self, paths: Iterable[str] | None = None) -> None:
        """As :meth:`wait_files`, and raise if a file that somebody may have read was started over meanwhile.

        Raises:
            IntegrityError: What was handed out before is not what the file holds now.
        """
        chosen = tuple(self.files) if paths is None else tuple(paths)
        self.wait_files(chosen)
        for path in chosen:
            if self.files[path].changed():
                raise IntegrityError(
                    f"{path}: bytes that were handed out did not match the digest and have been fetched anew",
                    file=path,
                    hint="load again: the cache now holds the verified file",
                )

    def close(self) -> None:
        """Close all views; what lay in a temporary folder is gone, but for tensors."""
        for view in self.files.values():
            view.close()
        if self._temporary is not None:
            self._temporary()
