"""What the proxy knows of each node, and which one a request gets. No I/O: probes and exchanges report here."""

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from engines import topology
from engines.base import Connector, JSONObject, Rank, Role
from engines.connectors.names import CONNECTORS
from engines.vllm.metrics import Gauges

from ..errors import NodeAnsweredError, NodeError, NodeUnreachableError, NoNodeError
from .breaker import Breaker

NOT_PROBED = "not probed yet"


@dataclass(slots=True)
class Share:
    """A part of a node's load and history."""

    in_flight: int = 0
    hand_offs: int = 0
    handed_tokens: int = 0


@dataclass(eq=False, slots=True)
class Node:
    """One node and what is known of it. Identity matters: two nodes are never equal."""

    spec: topology.Node
    problem: str | None = NOT_PROBED
    """What the last probe found, or the last attempt to connect; None when it was well."""
    breaker: Breaker = field(default_factory=Breaker)
    """What requests found since."""
    ranks: tuple[Rank, ...] = ()
    """The data-parallel ranks of this life of a prefill node. Never kept over a failure."""
    models: tuple[JSONObject, ...] = ()
    """Its model cards, as its `/v1/models` lists them."""
    gauges: Gauges = field(default_factory=Gauges)
    """Its own figures, as of the last probe."""
    in_flight: int = 0
    hand_offs: int = 0
    handed_tokens: int = 0
    """Hand-offs this decode node answered, and their prompts' tokens."""
    elsewhere: Share = field(default_factory=Share)
    """What the proxy's other worker processes have of these three."""
    _turn: int = 0

    @property
    def load(self) -> int:
        """Requests on it, from all workers."""
        return self.in_flight + self.elsewhere.in_flight

    @property
    def all_handed_over(self) -> tuple[int, int]:
        """Hand-offs it answered, and their prompts' tokens, from all workers."""
        return self.hand_offs + self.elsewhere.hand_offs, self.handed_tokens + self.elsewhere.handed_tokens

    @property
    def usable(self) -> bool:
        return self.problem is None and not self.spec.drain

    @property
    def why_not(self) -> str | None:
        """Why it gets no requests; None when it does."""
        return "draining" if self.spec.drain and self.problem is None else self.problem

    def ready(self, ranks: tuple[Rank, ...], models: tuple[JSONObject, ...]) -> None:
        if self.problem is not None:
            self.breaker = Breaker()  # another life of it, perhaps
        self.problem, self.ranks, self.models = None, ranks, models

    def failed(self, problem: str) -> None:
        """No requests until a probe finds it well, and its identity with it."""
        self.problem, self.ranks = problem, ()

    def met(self, error: NodeError) -> None:
        """A request failed here. One failure may be the request's; no connection, or several in a row, are the node's.

        A node that asks to be left alone for a while (Retry-After) is, and has not failed.
        """
        if isinstance(error, NodeUnreachableError):
            self.failed(str(error))
        elif isinstance(error, NodeAnsweredError) and error.retry_after_s is not None:
            self.breaker.rest(error.retry_after_s)
        elif not isinstance(error, NodeAnsweredError) or error.status != 429:
            self.breaker.failed()

    def next_rank(self) -> Rank | None:
        """The hand-off target of the next request; None for a connector whose nodes have no identity to know."""
        if not self.ranks:
            return None
        self._turn = (self._turn + 1) % len(self.ranks)
        return self.ranks[self._turn]

    def handed_over(self, prompt_tokens: int) -> None:
        self.hand_offs += 1
        self.handed_tokens += prompt_tokens

    def lease(self) -> "Lease":
        """Count one request on this node, for as long as it lasts."""
        return Lease(self)


class Lease:
    """One request on a node; a context manager."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def __enter__(self) -> Node:
        self._node.in_flight += 1
        self._node.breaker.taken()
        return self._node

    def __exit__(self, *_: object) -> None:
        self._node.in_flight -= 1
        self._node.breaker.untold()


@dataclass(frozen=True, slots=True)
class Limits:
    """When a decode node is full."""

    in_flight: int = 2048
    waiting: int = 64
    kv_usage: float = 0.98

    def leave_room(self, node: Node) -> bool:
        """Its gauges are as old as the last probe; requests in flight are counted here and now."""
        gauges = node.gauges
        return node.load < self.in_flight and gauges.waiting <= self.waiting and gauges.kv_usage < self.kv_usage


class Pool:
    """All nodes, and whose turn it is."""

    def __init__(self, nodes: topology.Topology, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._nodes: dict[Role, list[Node]] = {}
        self._turn = dict.fromkeys(Role, 0)
        self.replace(nodes)

    def newcomers(self, nodes: topology.Topology) -> list[Node]:
        """Those of the nodes that are not known here."""
        known = {_identity(node.spec) for node in self}
        return [Node(spec) for spec in nodes.nodes if _identity(spec) not in known]

    def replace(self, nodes: topology.Topology, newcomers: Iterable[Node] = ()) -> None:
        """Use these nodes from now on. One that stays keeps its state; one that goes finishes what it has.

        `newcomers`: what is already known of those that come.
        """
        known = {_identity(node.spec): node for node in (*self, *newcomers)}
        self._nodes = {role: [] for role in Role}
        for spec in nodes.nodes:
            node = known.get(_identity(spec)) or Node(spec)
            node.spec = spec
            self._nodes[spec.role].append(node)
        self.connector: Connector = CONNECTORS[nodes.connector]

    def __iter__(self) -> Iterator[Node]:
        for nodes in self._nodes.values():
            yield from nodes

    def of(self, role: Role) -> list[Node]:
        return self._nodes[role]

    def choose(self, role: Role, avoid: Collection[Node] = ()) -> Node:
        """The usable node with the fewest requests on it; among equals, the next in turn.

        One in `avoid` (it has just failed the same request), and one whose breaker is open, only when there is no
        other: the last node of a role is never left out for what may be the requests' fault. Raises NoNodeError with
        the reason of every node that is not usable.
        """
        usable = [node for node in self._in_turn(role) if node.usable]
        if not usable:
            raise NoNodeError(f"no usable {role} node: {self._why_none(role)}", "See /health")
        now = time.monotonic()
        chosen = min(
            usable,
            key=lambda node: (
                node in avoid,
                not node.breaker.admits(now),
                role is Role.DECODE and not self._limits.leave_room(node),
                node.load,
            ),
        )
        self._turn[role] = self._nodes[role].index(chosen) + 1
        return chosen

    def _in_turn(self, role: Role) -> list[Node]:
        nodes = self._nodes[role]
        if len(nodes) < 2:
            return nodes
        turn = self._turn[role] % len(nodes)
        return nodes[turn:] + nodes[:turn]

    def misfit(self, node: Node, models: Collection[JSONObject]) -> str | None:
        """What sets a node apart from the usable ones, so that a hand-off between them would go wrong; or None."""
        ours = {card["id"]: card.get("max_model_len") for card in models}
        for other in self:
            if other is node or not other.usable:
                continue
            theirs = {card["id"]: card.get("max_model_len") for card in other.models}
            if ours and theirs and not ours.keys() & theirs.keys():
                return f"serves {_listed(ours)}, while {other.spec.name} serves {_listed(theirs)}"
            for name in ours.keys() & theirs.keys():
                if ours[name] != theirs[name]:
                    return f"serves {name} up to {ours[name]} tokens, while {other.spec.name} goes to {theirs[name]}"
        return None

    def has_room(self) -> bool:
        """Whether some decode node could begin one more request now.

        True also when none is usable: to say so is not the door's part.
        """
        some_are_usable = False
        for node in self._nodes[Role.DECODE]:
            if node.usable:
                if self._limits.leave_room(node):
                    return True
                some_are_usable = True
        return not some_are_usable

    def has(self, role: Role) -> bool:
        """One usable node at least."""
        return any(node.usable for node in self._nodes[role])

    def models(self) -> list[JSONObject]:
        """The cards of the models that some usable prefill node and some usable decode node both serve.

        Without a usable prefill node: those of the decode nodes.
        """
        served = {
            role: {card["id"]: card for node in self._nodes[role] if node.usable for card in node.models}
            for role in Role
        }
        both = served[Role.PREFILL] if self.has(Role.PREFILL) else served[Role.DECODE]
        return [card for name, card in served[Role.DECODE].items() if name in both]

    def max_model_len(self, model: object) -> int | None:
        """How many tokens, prompt and answer together, a model takes; None when no usable node says."""
        cards = [card for node in self if node.usable for card in node.models]
        named = [card for card in cards if card["id"] == model] or (cards if model is None else [])
        return next((card["max_model_len"] for card in named if isinstance(card.get("max_model_len"), int)), None)

    def _why_none(self, role: Role) -> str:
        nodes = self._nodes[role]
        return "; ".join(f"{node.spec.name}: {node.why_not}" for node in nodes) or f"there is no {role} node"


def _identity(spec: topology.Node) -> topology.Node:
    return spec.model_copy(update={"drain": False})


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
