"""How many connections a transfer uses: as many as pay. Clock injected."""

from __future__ import annotations

from collections.abc import Callable

#: Measured (loopback, 2 cores; and a link of 2.5 Gbit/s at 20 ms): 8 carry the most at the least CPU, where servers do not
#: hold each one back.
FIRST = 8
#: Measured: with 20 MB/s a connection, 250 MB/s all together, half a second cost 2 % more; unthrottled, 0.25 s is as good.
_WINDOW_S = 0.25
#: Guessed: more connections stay if they brought at least this part of what they would bring in proportion.
_WORTH = 0.4


class Concurrency:
    """Raises the number of connections while each step brings more bytes a second, and halves it when a server says 429.

    Where a server gives each connection so much and no more, the rate grows with their number; where the link or the
    processor is the limit, the first step shows it and is taken back. Use from one thread.

    Attributes:
        limit: How many connections may be used now.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.limit = min(FIRST, most)
        self._most = most
        self._clock = clock
        self._since_s = clock()
        self._from_bytes = 0
        self._before: tuple[int, float] | None = None  # limit and rate before the last step
        self._settled = self.limit == most
        self._throttled = 0

    def look(self, received_bytes: int, *, busy: bool, throttled: int) -> None:
        """Decide anew; call it a few times a second.

        Args:
            received_bytes: Since the transfer began.
            busy: There is work for more connections.
            throttled: How often a server has asked for fewer requests, since the transfer began.
        """
        if throttled > self._throttled:
            self._throttled = throttled
            self.limit = max(1, self.limit // 2)
            self._settled = True
        if self._settled:
            return
        if not busy or received_bytes == 0:
            self._restart(received_bytes)
            return
        seconds = self._clock() - self._since_s
        if seconds < _WINDOW_S:
            return
        self._step((received_bytes - self._from_bytes) / seconds)
        self._restart(received_bytes)

    def _restart(self, received_bytes: int) -> None:
        self._since_s, self._from_bytes = self._clock(), received_bytes

    def _step(self, rate: float) -> None:
        """One window is over, in which all connections had work."""
        if self._before is not None:
            limit, before = self._before
            if rate < before * (1 + _WORTH * (self.limit - limit) / limit):
                self.limit, self._settled = limit, True
                return
        if self.limit == self._most:
            self._settled = True
            return
        self._before = self.limit, rate
        self.limit = min(self._most, 2 * self.limit)
