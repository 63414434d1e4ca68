"""What the proxy knows of each node, and which one a request gets. No I/O: probes and exchanges report here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engines import topology
from engines.base import JSONObject, Role
from engines.mooncake import HandOff

from .errors import NoNodeError

NOT_PROBED = "not probed yet"


@dataclass(eq=False, slots=True)
class Node:
    """One node and what is known of it. Identity matters: two nodes are never equal."""

    spec: topology.Node
    problem: str | None = NOT_PROBED
    """Why it gets no requests; None when it does."""
    engine_ids: dict[int, str] = field(default_factory=dict)
    """Of this life of a prefill node, by data-parallel rank. Never kept over a failure."""
    models: tuple[JSONObject, ...] = ()
    """Its model cards, as its `/v1/models` lists them."""
    in_flight: int = 0

    @property
    def usable(self) -> bool:
        return self.problem is None

    def ready(self, engine_ids: dict[int, str], models: tuple[JSONObject, ...]) -> None:
        self.problem, self.engine_ids, self.models = None, engine_ids, models

    def failed(self, problem: str) -> None:
        """No requests until a probe finds it well, and its identity with it."""
        self.problem, self.engine_ids = problem, {}

    def hand_off(self) -> HandOff:
        """A new hand-off from this prefill node."""
        assert self.spec.bootstrap is not None  # noqa: S101  the topology refuses a prefill node without
        return HandOff(engine_id=self.engine_ids[min(self.engine_ids)], bootstrap=self.spec.bootstrap)

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
