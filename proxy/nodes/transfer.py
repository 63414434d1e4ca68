"""Does KV really move? Each decode node's own counters, compared with what was handed over to it.

The rule is the engines' (`engines/transfer.py`); here it is fed, a probe at a time.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from engines.base import Role
from engines.transfer import Transfer

from .fleet import Fleet
from .node import Node

logger = logging.getLogger("pd_proxy.transfer")

Verdict = Literal["unproven", "moving", "not moving"]


@dataclass(slots=True)
class _Seen:
    """A decode node at the last probe, and what has happened since KV last arrived there."""

    transferred: float
    computed: float
    hand_offs: int
    tokens: int
    since: Transfer = field(default_factory=Transfer)
    total_arrived: float = 0
    verdict: Verdict = "unproven"


class TransferWatch:
    """Takes in the counters of decode nodes, and has a verdict on each. No I/O: the prober asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._seen: dict[Node, _Seen] = {}

    def verdict(self, node: Node) -> Verdict:
        return self._seen[node].verdict if node in self._seen else "unproven"

    def arrived(self, node: Node) -> float:
        """Prompt tokens that came to this decode node by transfer since the proxy started."""
        return self._seen[node].total_arrived if node in self._seen else 0

    def forget_all_but(self, nodes: Collection[Node]) -> None:
        self._seen = {node: seen for node, seen in self._seen.items() if node in nodes}

    def adopt(self, node: Node, verdict: Verdict, arrived: float) -> None:
        """What another worker of this proxy, which probes for all, found."""
        seen = self._seen[node] = _Seen(node.gauges.transferred, node.gauges.computed, *node.all_handed_over)
        seen.verdict, seen.total_arrived = verdict, arrived

    def observe(self, node: Node, hand_offs: int, tokens: int) -> None:
        """Take in `node.gauges`, given what had been handed over to it before they were read."""
        if not node.spec.role.does(Role.DECODE):
            return
        gauges = node.gauges
        seen = self._seen.get(node)
        if seen is None:
            self._seen[node] = _Seen(gauges.transferred, gauges.computed, hand_offs, tokens)
            return
        before = seen.verdict
        _add(seen, gauges.transferred, gauges.computed, hand_offs, tokens)
        if seen.since.is_moving:
            seen.verdict, seen.since = "moving", Transfer()
        elif seen.since.is_not_moving and not self._fleet.connector.is_best_effort:
            seen.verdict = "not moving"
        if seen.verdict != before:
            self._tell(node, seen)

    def _tell(self, node: Node, seen: _Seen) -> None:
        if seen.verdict == "moving":
            logger.info("KV moves to node %s", node.spec.name)
        else:
            logger.error(
                "KV does not move to node %s: of %d prompt tokens handed over none arrived, it computed %d itself",
                node.spec.name,
                seen.since.prompt_tokens,
                seen.since.computed,
            )


def _add(seen: _Seen, transferred: float, computed: float, hand_offs: int, tokens: int) -> None:
    """A counter that went back is one of a new life, and counts from 0."""
    came = transferred - seen.transferred if transferred >= seen.transferred else transferred
    seen.total_arrived += came
    seen.since.transferred += came
    seen.since.computed += computed - seen.computed if computed >= seen.computed else computed
    seen.since.hand_offs += max(0, hand_offs - seen.hand_offs)
    seen.since.prompt_tokens += max(0, tokens - seen.tokens)
    seen.transferred, seen.computed, seen.hand_offs, seen.tokens = transferred, computed, hand_offs, tokens
