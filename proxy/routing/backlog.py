"""The prefills on one node (one data-parallel rank of it), and how soon it will be through with them."""

from collections import OrderedDict

FIRST_RATE = 10_000.0
"""Tokens a second, until one was measured. Where no node was measured it cancels out."""
_KEPT = 0.95
"""Of the weight of all earlier prefills, with each new one."""
_FEWEST = 16
"""Tokens: the time of a shorter prefill is what every prefill takes, and says nothing of a rate."""


class Backlog:
    """Prefills that were sent and have not ended, in order; all times on one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._measured_tokens = self._measured_s = 0.0
        self._waiting: OrderedDict[int, float] = OrderedDict()
        self._tokens = 0.0
        self._number = 0
        self._head_since = 0.0
        self._counted_until = 0.0

    @property
    def rate(self) -> float | None:
        """Uncached tokens a second while it was busy; None while that is not known.

        Tokens and seconds are summed apart: an engine computes several prompts in one step, and all but the first of
        them then end with no time of their own.
        """
        return self._measured_tokens / self._measured_s if self._measured_tokens and self._measured_s else None

    def __len__(self) -> int:
        return len(self._waiting)

    def seconds(self, rate: float, now: float) -> float:
        """Until it is through, at this rate: less what the first has had since the one before it ended."""
        if not self._waiting:
            return 0.0
        head = next(iter(self._waiting.values())) / rate
        return self._tokens / rate - min(head, now - self._head_since)

    def begin(self, tokens: float, now: float) -> int:
        """A prefill with so many uncached tokens; the number to end it by."""
        if not self._waiting:
            self._head_since = self._counted_until = now
        self._number += 1
        self._waiting[self._number] = tokens
        self._tokens += tokens
        return self._number

    def end(self, number: int, now: float, tokens: float | None = None) -> None:
        """It has ended. `tokens`: what it was by the node's own count; None when it failed, and measures nothing."""
        was_head = next(iter(self._waiting)) == number
        self._tokens -= self._waiting.pop(number)
        if tokens is not None and tokens >= _FEWEST:
            self._measured_tokens = _KEPT * self._measured_tokens + tokens
            self._measured_s = _KEPT * self._measured_s + (now - self._counted_until)
        self._counted_until = now
        if was_head:
            self._head_since = now
        if not self._waiting:
            self._tokens = 0.0  # no rounding is carried on
