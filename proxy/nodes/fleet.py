"""All nodes, and which of them belong together. No I/O."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from engines import topology
from engines.base import Connector, Engine, JSONObject, NodeRole, Role
from engines.connectors.names import CONNECTORS
from engines.known import ENGINES

from .node import Node
from .pairs import Pair, Pairs, Verdict

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

    def __init__(self, nodes: topology.Topology, limits: Limits | None = None, *, any_version: bool = False) -> None:
        """`any_version`: of the engine, also one that was not tried."""
        self.limits = limits or Limits()
        self.pairs = Pairs()
        self._any_version = any_version
        self._all: list[Node] = []
        self._nodes: dict[Role, list[Node]] = {}
        self._turn = dict.fromkeys(Role, 0)
        self._on_some: frozenset[str] = frozenset()
        """Models that some usable nodes list and others do not: adapters (LoRA) that were loaded at run time."""
        self._cut_off: frozenset[Node] = frozenset()
        """Decode nodes that no usable prefill node may hand over to, though there are some."""
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
        self._all = []
        self._nodes = {role: [] for role in Role}
        for spec in nodes.nodes:
            node = known.get(_identity(spec)) or Node(spec)
            node.spec = spec
            self._all.append(node)
            for role in Role:
                if spec.role.does(role):
                    self._nodes[role].append(node)
        self.connector = CONNECTORS[nodes.connector]
        self.engine = ENGINES[nodes.engine]
        self._let_newcomers_lean()
        self.compare()

    def _let_newcomers_lean(self) -> None:
        """A node that does both begins with what fewer nodes do."""
        for node in self._all:
            if node.spec.role is NodeRole.BOTH and node.leaning is None:
                node.leaning = min(Role, key=lambda role: sum(one.leans_to(role) for one in self._all))

    def __iter__(self) -> Iterator[Node]:
        yield from self._all

    def of(self, role: Role) -> list[Node]:
        return self._nodes[role]

    def in_turn(self, role: Role) -> list[Node]:
        """The nodes of a role, the one whose turn it is first."""
        nodes = self._nodes[role]
        if len(nodes) < 2:
            return nodes
        turn = self._turn[role] % len(nodes)
        return nodes[turn:] + nodes[:turn]

    def took_turn(self, role: Role, node: Node) -> None:
        """The next in turn is the one after this."""
        nodes = self._nodes[role]
        if len(nodes) > 1:
            self._turn[role] = nodes.index(node) + 1

    def has(self, role: Role) -> bool:
        """One usable node at least."""
        return any(node.usable for node in self._nodes[role])

    def has_room(self) -> bool:
        """Whether some decode node could begin one more request now.

        True also when none is usable: to say so is not admission's part.
        """
        usable = [node for node in self._nodes[Role.DECODE] if node.usable]
        if self._cut_off:
            usable = [node for node in usable if node not in self._cut_off] or usable
        return not usable or any(self.limits.leave_room(node) for node in usable)

    def usable_pairs(self) -> list[Pair]:
        """Of nodes that get requests, whether hand-offs between them are fenced or not."""
        prefill, decode = ([node for node in self._nodes[role] if node.usable] for role in (Role.PREFILL, Role.DECODE))
        return [(one, other) for other in decode for one in prefill if one is not other]

    def has_pair(self, pair: Pair) -> bool:
        """Both are in the topology in force."""
        prefill, decode = pair
        return prefill in self._nodes[Role.PREFILL] and decode in self._nodes[Role.DECODE] and prefill is not decode

    def is_cut_off(self, decode: Node) -> bool:
        """No usable prefill node may hand over to it, though there are some; as of the last probe or verdict."""
        return decode in self._cut_off

    def can_hand_over(self) -> bool:
        """Between two usable nodes at least."""
        decodes = [node for node in self._nodes[Role.DECODE] if node.usable and node not in self._cut_off]
        return any(other.usable and other is not node for node in decodes for other in self._nodes[Role.PREFILL])

    def judged(self, pair: Pair, verdict: Verdict) -> None:
        """The canary's verdict on a pair."""
        self.pairs.judged(pair, verdict)
        self._note_cut_off()

    def _note_cut_off(self) -> None:
        cut_off: frozenset[Node] = frozenset()
        if self.pairs.are_any_fenced:
            usable = [node for node in self._nodes[Role.PREFILL] if node.usable]
            partners = {d: [p for p in usable if p is not d] for d in self._nodes[Role.DECODE]}
            cut_off = frozenset(
                d for d, others in partners.items() if others and all(self.pairs.is_fenced(p, d) for p in others)
            )
        self._cut_off = cut_off

    def compare(self) -> None:
        """Keep apart what does not fit. What is expected is said by the topology, else by most of the nodes.

        So a node alone with what it serves is the misfit, whoever was probed first; among equals those that serve
        already stay.
        """
        well = [node for node in self if node.problem is None]
        expected, layout = self._expected(well), dict(_most_common(well, _layout))
        family = _most_common(well, self._family)
        for node in well:
            node.fits(
                self._version_problem(node, family)
                or _difference(_served(node), expected)
                or _other_layout(node, layout)
            )
        self._note_cut_off()
        listed = [node.names for node in self if node.usable]
        self._on_some = frozenset().union(*listed) - frozenset.intersection(*listed) if listed else frozenset()

    def _family(self, node: Node) -> tuple[str, ...]:
        return (self.engine.version_family(node.version),) if node.version else ()

    def _version_problem(self, node: Node, expected: tuple[str, ...]) -> str | None:
        """What KV looks like on its way differs from one minor version to the next, and nobody there compares."""
        problem = "" if self._any_version else self.engine.version_problem(node.version)
        if problem:
            return f"{problem} (--any-version uses it)"
        own = self._family(node)
        if own and expected and own != expected:
            return f"is of {self.engine.name} {own[0]}, while {expected[0]} is expected"
        return None

    def is_on_some(self, model: object) -> bool:
        """Whether it makes a difference which node is asked for the model."""
        return isinstance(model, str) and model in self._on_some

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

    def why_none(self, role: Role, partner: Node | None = None) -> str:
        """Of every node of the role why it is not usable, or not with this partner."""
        fenced = f"hand-offs with {partner.spec.name} are fenced" if partner else None
        nodes = self._nodes[role]
        why = (node.why_not or ("the other node of the hand-off" if node is partner else fenced) for node in nodes)
        told = (f"{node.spec.name}: {reason}" for node, reason in zip(nodes, why, strict=True))
        return "; ".join(told) or f"there is no {role} node"

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
        return _most_common(well, _served)


Fact = TypeVar("Fact", bound=tuple[Any, ...])


def _most_common(nodes: list[Node], of: Callable[[Node], Fact]) -> Fact | tuple[()]:
    """What most of the nodes say; among equals what those say that serve already, then the first."""
    order = [of(node) for node in nodes]
    counts = Counter(fact for fact in order if fact)
    if not counts:
        return ()
    serving = {of(node) for node in nodes if node.misfit is None}
    return max(counts, key=lambda fact: (counts[fact], fact in serving, -order.index(fact)))


def _layout(node: Node) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(node.layout.items()))


def _other_layout(node: Node, expected: Mapping[str, str]) -> str | None:
    """In words; None when all that both say is equal."""
    for name in sorted(node.layout.keys() & expected.keys()):
        if node.layout[name] != expected[name]:
            return f"its KV cache has {name} {node.layout[name]}, while {expected[name]} is expected"
    return None


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
    """Where and what it is; all else may change while it stays."""
    return spec.model_copy(update={"drain": False, "log": None, "finding": ""})
