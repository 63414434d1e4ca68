"""Passive outlier detection: what requests themselves tell of a node, between two probes."""

import time
from dataclasses import dataclass

_FAILURES_IN_A_ROW = 3
_FIRST_REST_S = 2.0
_LONGEST_REST_S = 30.0


@dataclass(slots=True)
class Breaker:
    """Open after some failures in a row, for a time that doubles; then one request is let through to try.

    Times are of the machine's monotonic clock, in seconds.
    """

    failures: int = 0
    rests_until: float = 0.0
    _is_tried: bool = False

    @property
    def is_open(self) -> bool:
        return self.failures >= _FAILURES_IN_A_ROW

    def admits(self, now: float) -> bool:
        """Whether a request may go there."""
        return now >= self.rests_until and not (self.is_open and self._is_tried)

    def taken(self) -> None:
        """A request goes there; while the breaker is open it is the one that tries."""
        if self.failures:
            self._is_tried = self.is_open

    def succeeded(self) -> None:
        if self.failures:
            self.failures, self.rests_until, self._is_tried = 0, 0.0, False

    def failed(self) -> None:
        self.failures += 1
        self._is_tried = False
        if self.is_open:
            rest_s = _FIRST_REST_S * 2 ** min(self.failures - _FAILURES_IN_A_ROW, 8)
            self.rests_until = time.monotonic() + min(rest_s, _LONGEST_REST_S)

    def untold(self) -> None:
        """The request that was to try ended without telling anything (its client left)."""
        self._is_tried = False

    def rest(self, seconds: float) -> None:
        """The node itself asked to be left alone for a while: no failure."""
        self.rests_until = max(self.rests_until, time.monotonic() + min(seconds, _LONGEST_REST_S))
