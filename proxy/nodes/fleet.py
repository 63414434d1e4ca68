"""All nodes, and which of them belong together. No I/O."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engines import topology
from engines.base import Connector, Engine, JSONObject, Role
from engines.connectors.names import CONNECTORS
from engines.known import ENGINES

from .node import Node

_JUST_LOST_S = 5.0
_LOOK_EVERY_S = 0.1

Served = tuple[tuple[str, int | None], ...]
"""What a node serves: each base model's name and its longest sequence in tokens, sorted."""


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


class Fleet:
    """Every node of the topology in force."""

    engine: Engine
    connector: Connector
    _topology: topology.Topology

    def __init__(self, nodes: topology.Topology, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._nodes: dict[Role, list[Node]] = {}
        self._turn = dict.fromkeys(Role, 0)
        self._had_usable: dict[Role, float] = {}
        """When a node of the role was last seen usable, on the monotonic clock."""
        self.replace(nodes)

    def newcomers(self, nodes: topology.Topology) -> list[Node]:
        """Those of the nodes that are not known here."""
        known = {_identity(node.spec) for node in self}
        return [Node(spec) for spec in nodes.nodes if _identity(spec) not in known]

    def replace(self, nodes: topology.Topology, newcomers: Iterable[Node] = ()) -> None:
        """Use these nodes from now on. One that stays keeps its state; one that goes finishes what it has.

        `newcomers`: what is already known of those that come.
        """
        if self._nodes and nodes.connector != self._topology.connector:
            known = {}  # what is known of their identity is the old connector's
        else:
            known = {_identity(node.spec): node for node in (*self, *newcomers)}
        self._topology = nodes
        self._nodes = {role: [] for role in Role}
        for spec in nodes.nodes:
            node = known.get(_identity(spec)) or Node(spec)
            node.spec = spec
            self._nodes[spec.role].append(node)
        self.connector = CONNECTORS[nodes.connector]
        self.engine = ENGINES[nodes.engine]
        self.compare()

    def __iter__(self) -> Iterator[Node]:
        for nodes in self._nodes.values():
            yield from nodes

    def of(self, role: Role) -> list[Node]:
        return self._nodes[role]

    def in_turn(self, role: Role) -> list[Node]:
        """The nodes of a role, the one whose turn it is first."""
        nodes = self._nodes[role]
        if len(nodes) < 2:
            return nodes
        turn = self._turn[role] % len(nodes)
        return nodes[turn:] + nodes[:turn]

    def took_turn(self, node: Node) -> None:
        """The next in turn is the one after this."""
        nodes = self._nodes[node.spec.role]
        if len(nodes) > 1:
            self._turn[node.spec.role] = nodes.index(node) + 1

    def has(self, role: Role) -> bool:
        """One usable node at least."""
        return any(node.usable for node in self._nodes[role])

    def has_room(self) -> bool:
        """Whether some decode node could begin one more request now.

        True also when none is usable: to say so is not admission's part.
        """
        some_are_usable = False
        for node in self._nodes[Role.DECODE]:
            if node.usable:
                if self.limits.leave_room(node):
                    return True
                some_are_usable = True
        return not some_are_usable

    def compare(self) -> None:
        """Keep apart what does not fit. What is expected is said by the topology, else by most of the nodes.

        So a node alone with what it serves is the misfit, whoever was probed first; among equals those that serve
        already stay.
        """
        well = [node for node in self if node.problem is None]
        expected = self._expected(well)
        for node in self:
            node.fits(_difference(_served(node), expected) if node in well else node.misfit)

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

    def version(self) -> str | None:
        """The engine's version, as a usable decode node gives it; None when there is none."""
        return next((node.version for node in self._nodes[Role.DECODE] if node.usable), None)

    def why_none(self, role: Role) -> str:
        """Of every node of the role why it is not usable."""
        nodes = self._nodes[role]
        return "; ".join(f"{node.spec.name}: {node.why_not}" for node in nodes) or f"there is no {role} node"

    async def until_usable(self, role: Role) -> bool:
        """Wait a moment for a role whose nodes have all just gone down together: most often it is the machine that
        paused. False when it is longer ago, or none came back.
        """
        while not self.has(role):
            if time.monotonic() - self._had_usable.get(role, -_JUST_LOST_S) > _JUST_LOST_S:
                return False
            await asyncio.sleep(_LOOK_EVERY_S)
        return True

    def saw_usable(self) -> None:
        """Note which roles can serve now; called after every probe."""
        now = time.monotonic()
        for role in Role:
            if self.has(role):
                self._had_usable[role] = now

    def _expected(self, well: list[Node]) -> Served:
        if self._topology.models:
            return tuple(sorted((name, self._topology.max_model_len) for name in self._topology.models))
        counts = Counter(served for node in well if (served := _served(node)))
        if not counts:
            return ()
        serving = {served for node in well if node.misfit is None and (served := _served(node))}
        order = [_served(node) for node in well]
        return max(counts, key=lambda served: (counts[served], served in serving, -order.index(served)))


def _served(node: Node) -> Served:
    """LoRA adapters, which have a parent, come and go; nodes need not have the same."""
    base = [card for card in node.models if not card.get("parent")]
    return tuple(sorted((card["id"], _length(card)) for card in base))


def _length(card: JSONObject) -> int | None:
    length = card.get("max_model_len")
    return length if isinstance(length, int) else None


def _difference(served: Served, expected: Served) -> str | None:
    """In words; None when they have a model in common, and every common one with the same length."""
    ours, theirs = dict(served), dict(expected)
    common = ours.keys() & theirs.keys()
    if ours and theirs and not common:
        return f"serves {', '.join(ours)}, while {', '.join(theirs)} is expected"
    for name in sorted(common):
        if ours[name] != theirs[name] and None not in (ours[name], theirs[name]):
            return f"serves {name} up to {ours[name]} tokens, while {theirs[name]} are expected"
    return None


def _identity(spec: topology.Node) -> topology.Node:
    return spec.model_copy(update={"drain": False})
