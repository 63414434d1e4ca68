"""Does KV really move? Each decode node's own counters, compared with what was handed over to it.

A miswired transfer fails nothing: the decode node computes every prompt again, and answers. So after some hand-offs
a decode node must have counted tokens that came by transfer; if it has computed them instead, nothing moves.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from engines.base import Role

from .fleet import Node, Pool

logger = logging.getLogger("pd_proxy.transfer")

Verdict = Literal["unproven", "moving", "not moving"]

_ENOUGH_HAND_OFFS = 3
_SHARE_COMPUTED = 0.5
"""Of the tokens handed over. A decode node's own prefix cache takes its share of a prompt without any transfer."""


@dataclass(slots=True)
class _Seen:
    """A decode node at the last look, and what has happened since KV last arrived there."""

    arrived: float
    computed: float
    hand_offs: int
    tokens: int
    computed_since: float = 0
    hand_offs_since: int = 0
    tokens_since: int = 0
    total_arrived: float = 0
    verdict: Verdict = "unproven"


class TransferWatch:
    """Takes in every look at a decode node's counters, and has a verdict on each. No I/O: the prober looks."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._seen: dict[Node, _Seen] = {}

    def verdict(self, node: Node) -> Verdict:
        return self._seen[node].verdict if node in self._seen else "unproven"

    def arrived(self, node: Node) -> float:
        """Prompt tokens that came to this decode node by transfer since the proxy started."""
        return self._seen[node].total_arrived if node in self._seen else 0

    def forget_all_but(self, nodes: Collection[Node]) -> None:
        self._seen = {node: seen for node, seen in self._seen.items() if node in nodes}

    def look(self, node: Node, hand_offs: int, tokens: int) -> None:
        """Take in `node.gauges`, given what had been handed over to it before they were read."""
        if node.spec.role is not Role.DECODE:
            return
        arrived, computed = node.gauges.transferred, node.gauges.computed
        seen = self._seen.get(node)
        if seen is None:
            self._seen[node] = _Seen(arrived, computed, hand_offs, tokens)
            return
        before = seen.verdict
        _judge(seen, arrived, computed, hand_offs, tokens, must_arrive=not self._pool.connector.is_best_effort)
        if seen.verdict == "not moving" != before:
            logger.error(
                "KV does not move to node %s: of %d prompt tokens handed over none arrived, it computed them itself",
                node.spec.name,
                seen.tokens_since,
            )


def _judge(  # noqa: PLR0913  a look's figures
    seen: _Seen, arrived: float, computed: float, hand_offs: int, tokens: int, *, must_arrive: bool
) -> None:
    """Take in a look. A counter that went back is one of a new life, and counts from 0."""
    came = arrived - seen.arrived if arrived >= seen.arrived else arrived
    seen.total_arrived += came
    if came > 0:
        seen.verdict = "moving"
        seen.computed_since, seen.hand_offs_since, seen.tokens_since = 0, 0, 0
    else:
        seen.computed_since += computed - seen.computed if computed >= seen.computed else computed
        seen.hand_offs_since += hand_offs - seen.hand_offs
        seen.tokens_since += tokens - seen.tokens
        enough = seen.hand_offs_since >= _ENOUGH_HAND_OFFS
        if must_arrive and enough and seen.computed_since >= _SHARE_COMPUTED * seen.tokens_since:
            seen.verdict = "not moving"
    seen.arrived, seen.computed, seen.hand_offs, seen.tokens = arrived, computed, hand_offs, tokens
