"""What the proxy knows of each node, and which one a request gets. No I/O: probes and exchanges report here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engines import topology
from engines.base import Connector, JSONObject, Rank, Role
from engines.connectors import CONNECTORS

from .errors import NoNodeError

NOT_PROBED = "not probed yet"


@dataclass(eq=False, slots=True)
class Node:
    """One node and what is known of it. Identity matters: two nodes are never equal."""

    spec: topology.Node
    problem: str | None = NOT_PROBED
    """Why it gets no requests; None when it does."""
    ranks: tuple[Rank, ...] = ()
    """The data-parallel ranks of this life of a prefill node. Never kept over a failure."""
    models: tuple[JSONObject, ...] = ()
    """Its model cards, as its `/v1/models` lists them."""
    in_flight: int = 0
    hand_offs: int = 0
    handed_tokens: int = 0
    """Hand-offs this decode node answered, and their prompts' tokens."""
    _turn: int = 0

    @property
    def usable(self) -> bool:
        return self.problem is None

    def ready(self, ranks: tuple[Rank, ...], models: tuple[JSONObject, ...]) -> None:
        self.problem, self.ranks, self.models = None, ranks, models

    def failed(self, problem: str) -> None:
        """No requests until a probe finds it well, and its identity with it."""
        self.problem, self.ranks = problem, ()

    def next_rank(self) -> Rank | None:
        """The hand-off target of the next request; None for a connector whose nodes have no identity to know."""
        if not self.ranks:
            return None
        self._turn = (self._turn + 1) % len(self.ranks)
        return self.ranks[self._turn]

    def handed_over(self, prompt_tokens: int) -> None:
        self.hand_offs += 1
        self.handed_tokens += prompt_tokens

    @contextmanager
    def lease(self) -> Iterator["Node"]:
        """Count one request on this node, for as long as it lasts."""
        self.in_flight += 1
        try:
            yield self
        finally:
            self.in_flight -= 1


class Pool:
    """All nodes, and whose turn it is."""

    def __init__(self, nodes: topology.Topology) -> None:
        self._nodes: dict[Role, list[Node]] = {}
        self._turn = dict.fromkeys(Role, 0)
        self.replace(nodes)

    def replace(self, nodes: topology.Topology) -> None:
        """Use these nodes from now on. One that stays keeps its state; one that goes finishes what it has."""
        known = {node.spec: node for node in self}
        self._nodes = {role: [known.get(spec) or Node(spec) for spec in nodes.of(role)] for role in Role}
        self.connector: Connector = CONNECTORS[nodes.connector]

    def __iter__(self) -> Iterator[Node]:
        for nodes in self._nodes.values():
            yield from nodes

    def of(self, role: Role) -> list[Node]:
        return self._nodes[role]

    def choose(self, role: Role) -> Node:
        """The next usable node in turn. Raises NoNodeError with the reason of every node that is not."""
        nodes = self._nodes[role]
        for step in range(len(nodes)):
            turn = (self._turn[role] + step) % len(nodes)
            if nodes[turn].usable:
                self._turn[role] = turn + 1
                return nodes[turn]
        raise NoNodeError(f"no usable {role} node: {self._why_none(role)}", "See /health")

    def can_serve(self) -> bool:
        """One usable node of each role."""
        return all(any(node.usable for node in self._nodes[role]) for role in Role)

    def models(self) -> list[JSONObject]:
        """The cards of the models that some usable prefill node and some usable decode node both serve."""
        served = {
            role: {card["id"]: card for node in self._nodes[role] if node.usable for card in node.models}
            for role in Role
        }
        return [card for name, card in served[Role.DECODE].items() if name in served[Role.PREFILL]]

    def _why_none(self, role: Role) -> str:
        nodes = self._nodes[role]
        return "; ".join(f"{node.spec.name}: {node.problem}" for node in nodes) or f"there is no {role} node"
