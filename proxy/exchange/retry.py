"""Another try on another node: when, and how often all in all."""

import time

from ..errors import NodeAnsweredError, NodeError, NodeTimeoutError, NodeUnreachableError

MOST_ATTEMPTS = 3
"""For one request. One that kills every node it meets must not meet them all."""

MOST_CONTINUATIONS = 3
"""Nodes that one stream may lose in its middle."""

_RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})


def is_node_failure(status: int) -> bool:
    """Whether an answer with this status is the node's failure, which another node may not share."""
    return status in _RETRIED_STATUSES


class RetryBudget:
    """Retries are a share of recent traffic, so that an outage is not multiplied by them; a few are always free."""

    def __init__(self, share: float = 0.2, a_second: float = 3.0, most: float = 30.0) -> None:
        self._share = share
        self._a_second = a_second
        self._most = most
        self._left = most
        self._filled_at = time.monotonic()

    def deposit(self) -> None:
        """A request came."""
        self._left = min(self._most, self._left + self._share)

    def withdraw(self) -> bool:
        """May there be one more retry?"""
        now = time.monotonic()
        self._left = min(self._most, self._left + self._a_second * (now - self._filled_at))
        self._filled_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def reason(error: NodeError) -> str:
    """A failure in one word, for the metrics."""
    if isinstance(error, NodeUnreachableError):
        return "unreachable"
    if isinstance(error, NodeTimeoutError):
        return "late"
    if isinstance(error, NodeAnsweredError):
        return str(error.status)
    return "broke-off"
