"""What the nodes that do both are asked for first: prefill or decode, as the load of the last seconds needs it.

Two numbers decide. How long a new prompt would wait for the prefill node that is through soonest, and how long a token
takes on the decode node that is quickest, each as a share of what it may be. A change is at once and needs no drain:
what runs on a node goes on, only new legs go elsewhere.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from engines.base import NodeRole, Role

from ..nodes.fleet import Fleet
from ..nodes.node import Node

_TOO_MUCH = 1.0
"""Share of a target beyond which a role needs another node."""
_TO_SPARE = {Role.PREFILL: 0.5, Role.DECODE: 0.7}
"""... and below which a role can give one away. The gap keeps a node from going to and fro."""
_DWELL_S = 10.0
"""Between two changes: what the first one does must show before the second."""


@dataclass(frozen=True, slots=True)
class Change:
    """One node's new leaning, and why."""

    node: Node
    to: Role
    wait: float
    """Of a new prompt, as a share of its target."""
    token: float
    """Between two tokens, likewise."""

    @property
    def reason(self) -> str:
        return "prompts-wait" if self.to is Role.PREFILL else "tokens-late"

    def __str__(self) -> str:
        return (
            f"node {self.node.spec.name} is asked to {self.to} first from now on: a prompt waits {self.wait:.2f} of "
            f"its target, a token takes {self.token:.2f} of its own"
        )


class Elastic:
    """Of one proxy; asked every second or so."""

    def __init__(
        self,
        fleet: Fleet,
        backlog_s: Callable[[Node], float],
        ttft_target_s: float,
        tpot_target_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`backlog_s`: until a prefill node is through with what it has."""
        self._fleet = fleet
        self._backlog_s = backlog_s
        self._ttft_target_s = ttft_target_s
        self._tpot_target_s = tpot_target_s
        self._now = clock
        self._changed_at = -_DWELL_S

    def step(self) -> Change | None:
        """The next change, made; None when all is well, or nothing can be done. Each role keeps one node."""
        prefills, decodes = self._leaning(Role.PREFILL), self._leaning(Role.DECODE)
        if not prefills or not decodes or self._now() - self._changed_at < _DWELL_S:
            return None
        wait = min(map(self._wait, prefills))
        token = min(map(self._token, decodes))
        change = None
        if wait > _TOO_MUCH and token < _TO_SPARE[Role.DECODE]:
            change = self._given(decodes, Role.PREFILL, self._live_tokens, wait, token)
        elif token > _TOO_MUCH and wait < _TO_SPARE[Role.PREFILL]:
            change = self._given(prefills, Role.DECODE, self._wait, wait, token)
        if change is not None:
            change.node.leaning = change.to
            self._changed_at = self._now()
        return change

    def _given(
        self, giving: list[Node], to: Role, least: Callable[[Node], float], wait: float, token: float
    ) -> Change | None:
        """From those of the other role, the one with the least to do."""
        can = [node for node in giving if node.spec.role is NodeRole.BOTH]
        return Change(min(can, key=least), to, wait, token) if can and len(giving) > 1 else None

    def _leaning(self, role: Role) -> list[Node]:
        return [node for node in self._fleet.of(role) if node.usable and node.leans_to(role)]

    def _wait(self, node: Node) -> float:
        return self._backlog_s(node) / self._ttft_target_s

    def _token(self, node: Node) -> float:
        """An idle node says nothing of how long a token takes beside others."""
        streams = node.live.streams + node.elsewhere.streams
        return node.live.token_s / self._tpot_target_s if streams else 0.0

    def _live_tokens(self, node: Node) -> float:
        return node.live_tokens(self._now())
