"""The scoreboard: which base URL to ask next, by health and measured rate. Clock injected."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Score:
    rate_bytes_per_s: float | None = None
    in_flight: int = 0
    failures: int = 0
    rest_until_s: float = 0.0
    asked_until_s: float = 0.0


class Mirrors:
    """Chooses among the origin and its mirrors. Use from one thread.

    A mirror's share follows the rate that one connection to it was measured at; unknown ones count as the best, so that
    each is tried early. A failing one rests, longer each time, and comes back.

    Attributes:
        throttled: How often one of them has said 429.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.urls = tuple(dict.fromkeys(urls))
        self._scores = {url: _Score() for url in self.urls}
        self._clock = clock
        self.throttled = 0

    def pick(self, avoid: Collection[str] = (), only: str | None = None) -> str:
        """Return the base URL for the next request.

        Args:
            avoid: Where this range failed already; asked again only when nothing else is left.
            only: Ask nobody else.
        """
        if only is not None:
            return only
        now_s = self._clock()
        known = [s.rate_bytes_per_s for s in self._scores.values() if s.rate_bytes_per_s is not None]
        best = max(known, default=1.0)

        def rank(url: str) -> tuple[bool, bool, float]:
            score = self._scores[url]
            rate = best if score.rate_bytes_per_s is None else score.rate_bytes_per_s
            return (url not in avoid, score.rest_until_s <= now_s, rate / (score.in_flight + 1) / (1 + score.failures))

        return max(self.urls, key=rank)  # of equals the first: the origin

    @property
    def best_rate_bytes_per_s(self) -> float | None:
        """The rate of one connection to the fastest mirror, as far as measured."""
        return max((s.rate_bytes_per_s for s in self._scores.values() if s.rate_bytes_per_s is not None), default=None)

    def rested(self, avoid: Collection[str] = ()) -> bool:
        """Tell whether there is a mirror outside *avoid* that may be asked at once."""
        now_s = self._clock()
        return any(u not in avoid and s.rest_until_s <= now_s for u, s in self._scores.items())

    def asked_s(self, url: str) -> float:
        """Return for how many seconds yet *url* asked to be left alone; 0 or less: not any more."""
        return self._scores[url].asked_until_s - self._clock()

    def started(self, url: str) -> None:
        """A request to *url* is under way."""
        self._scores[url].in_flight += 1

    def ended(self, url: str) -> None:
        """It ended, well or not."""
        self._scores[url].in_flight -= 1

    def delivered(self, url: str, received_bytes: int, seconds: float) -> None:
        """It brought *received_bytes*: the rate is a moving average over the last few ranges."""
        score = self._scores[url]
        rate = received_bytes / max(seconds, 1e-6)
        old = score.rate_bytes_per_s
        score.rate_bytes_per_s = rate if old is None else 0.7 * old + 0.3 * rate  # guessed: about the last 5 ranges
        score.failures = 0
        score.rest_until_s = 0.0

    def failed(self, url: str, rest_s: float | None = None) -> None:
        """It failed; let it rest: for *rest_s*, if it asked for that, else 0.5 s doubled with each failure, at most 30 s.

        The numbers are guessed.
        """
        score = self._scores[url]
        score.failures += 1
        if rest_s is not None:
            score.asked_until_s = max(score.asked_until_s, self._clock() + rest_s)
        score.rest_until_s = self._clock() + (min(30.0, 0.25 * 2**score.failures) if rest_s is None else rest_s)
