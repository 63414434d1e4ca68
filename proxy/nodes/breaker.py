"""Circuit breaker, passive: what requests themselves tell of a node, between two probes."""

import time
from dataclasses import dataclass

_FAILURES_IN_A_ROW = 3
_FIRST_REST_S = 2.0
_LONGEST_REST_S = 30.0


@dataclass(slots=True)
class Breaker:
    """Open after some failures in a row, for a time that doubles; then half-open: one request is let through to try.

    Times are of the machine's monotonic clock, in seconds.
    """

    failures: int = 0
    rests_until: float = 0.0
    has_trial: bool = False
    """One request is trying the node now."""

    @property
    def is_open(self) -> bool:
        return self.failures >= _FAILURES_IN_A_ROW

    def admits(self, now: float) -> bool:
        """Whether a request may go there."""
        return not self.is_resting(now) and not (self.is_open and self.has_trial)

    def is_resting(self, now: float) -> bool:
        """Whether it failed a moment ago, or asked to be left alone; the one that tries may go on all the same."""
        return now < self.rests_until

    def begin(self) -> bool:
        """A request goes there. True when it is the one that tries: its end is to be told (`end_trial`)."""
        if not self.failures or not self.is_open or self.has_trial:
            return False
        self.has_trial = True
        return True

    def end_trial(self) -> None:
        """The request that was to try ended, whatever it told."""
        self.has_trial = False

    def record_success(self) -> None:
        if self.failures:
            self.failures, self.rests_until = 0, 0.0

    def record_failure(self) -> None:
        self.failures += 1
        if self.is_open:
            rest_s = _FIRST_REST_S * 2 ** min(self.failures - _FAILURES_IN_A_ROW, 8)
            self.rests_until = time.monotonic() + min(rest_s, _LONGEST_REST_S)

    def rest(self, seconds: float) -> None:
        """The node itself asked to be left alone for a while: no failure."""
        self.rests_until = max(self.rests_until, time.monotonic() + min(seconds, _LONGEST_REST_S))
