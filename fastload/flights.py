"""Ranges on their way, and which of them a fresh connection would bring sooner. Clock injected."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

#: Guessed: what a new connection costs (two round trips and TLS) before it brings a byte.
_FRESH_S = 0.5
#: Guessed: a connection is given up when it would take longer than a fresh one by this factor.
_FACTOR = 3.0
#: Guessed: the last so many ranges tell what a connection here can do.
_RECENT = 16


class Flight:
    """One range on its way.

    Attributes:
        size: Of the range, in bytes.
        position: Returns how many of them are there.
        abandon: Ends the request; what came is kept, and the rest is fetched anew.
        given_up: It has been called.
    """

    __slots__ = ("abandon", "given_up", "position", "size", "started_s")

    def __init__(self, size: int, position: Callable[[], int], abandon: Callable[[], None], started_s: float) -> None:
        self.size = size
        self.position = position
        self.abandon = abandon
        self.started_s = started_s
        self.given_up = False


class Flights:
    """All ranges of one transfer that are on their way. Use from one thread.

    A connection that got a bad path crawls at a fraction of what the others bring, and holds up the digest and the
    readers of its file. It is not raced: the rest of its range goes to another connection, so that no byte travels twice.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._under_way: set[Flight] = set()
        self._rates: deque[float] = deque(maxlen=_RECENT)
        self._landed = 0
        self._given_up = 0
        self._ended_bytes = 0

    def begin(self, size: int, position: Callable[[], int], abandon: Callable[[], None]) -> Flight:
        """A request for *size* bytes goes out."""
        flight = Flight(size, position, abandon, self._clock())
        self._under_way.add(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """Its request has ended, well or not."""
        self._under_way.discard(flight)
        count = flight.position()
        self._ended_bytes += count
        if count == flight.size:
            self._landed += 1
            self._rates.append(count / max(self._clock() - flight.started_s, 1e-6))

    @property
    def received_bytes(self) -> int:
        """All that came until now, of ended ranges and of those under way."""
        return self._ended_bytes + sum(flight.position() for flight in self._under_way)

    def give_up_the_slow(self) -> None:
        """Abandon the ranges that a fresh connection would bring sooner, their past taken for their future.

        At most one for four that landed: where everybody is slow in turns, nothing is gained by changing.
        """
        if not self._rates:
            return
        rates, middle = sorted(self._rates), len(self._rates) // 2
        usual = (rates[middle] + rates[~middle]) / 2  # the median: that module takes 5 ms to import
        now_s = self._clock()
        for flight in [*self._under_way]:
            came, passed_s = flight.position(), now_s - flight.started_s
            rest = flight.size - came
            fresh_s = _FRESH_S + rest / usual
            left_s = rest * passed_s / came if came else passed_s
            too_long = passed_s > _FRESH_S and left_s > _FACTOR * fresh_s
            if rest and too_long and not flight.given_up and self._given_up < 1 + self._landed // 4:
                self._given_up += 1
                flight.given_up = True
                flight.abandon()
