"""May a request be tried again on another node? A pure decision, from the error and the nodes there are."""

import time
from collections.abc import Collection

from engines.base import NodeRole, Role

from ..errors import NodeAnsweredError, NodeError
from ..nodes.fleet import Fleet
from ..nodes.node import Node

MOST_ATTEMPTS = 3
"""For one request. One that kills every node it is sent to must not be sent to them all."""

MOST_CONTINUATIONS = 3
"""Nodes that one stream may lose in its middle."""

_RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})


def is_node_failure(status: int) -> bool:
    """Whether an answer with this status is the node's failure, which another node may not share."""
    return status in _RETRIED_STATUSES


def may_retry(error: NodeError, failing: Node, fleet: Fleet, avoid: Collection[Node], *, alone_will_do: bool) -> bool:
    """Whether another attempt can do better. `alone_will_do`: decode nodes may compute prompts.

    A node that answers that it cannot is not asked again for the same; one that broke off may be.
    """
    if not error.may_be_retried:
        return False
    if not isinstance(error, NodeAnsweredError):
        return True
    others = (node for role in Role if failing.spec.role.does(role) for node in fleet.of(role))
    if any(node.usable and node not in avoid for node in others):
        return True
    return failing.spec.role is NodeRole.PREFILL and error.retry_after_s is None and alone_will_do


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
