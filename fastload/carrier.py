"""What carries a transfer, and how its end is awaited: each has a thread of this process, whatever that thread waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


class Carrier:
    """Carries one transfer to its end. Thread-safe. One of this very class carries what was over before it began."""

    _thread: threading.Thread | None = None

    def _begin(self, work: Callable[[], None], name: str) -> None:
        # A daemon, so that a program that ends without closing its transfer is not kept from ending.
        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    def want(self, paths: Iterable[str]) -> None:
        """Let a transfer on demand deliver *paths*, once its manifest is known; all others deliver everything."""

    def join(self) -> None:
        """Wait until it is over, with what it does after the last message."""
        if self._thread is not None:
            self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether its thread, and whatever that waits for, is gone."""
        return self._thread is None or not self._thread.is_alive()

    def rest(self, timeout_s: float) -> bool:
        """Let it end what it has begun and begin nothing more; tell whether it is over by then."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.ended

    def stop(self) -> None:
        """End the transfer if it still runs; return when it is over. Harmless when repeated."""
