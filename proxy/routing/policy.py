"""Which nodes come into question for a leg; of those the cheapest, and among equals the next in turn."""

import time
from collections.abc import Callable, Collection

from engines.base import Role

from ..errors import NoNodeError
from ..nodes.fleet import Fleet
from ..nodes.node import Node

Cost = tuple[float, int]
"""The second decides between nodes whose first are equal."""


def fewest_requests(node: Node) -> Cost:
    """The cost that sends each request where the fewest are."""
    return node.load, 0


def choose(  # noqa: PLR0913  who is asked for, and for what
    fleet: Fleet,
    role: Role,
    avoid: Collection[Node] = (),
    model: object = None,
    partner: Node | None = None,
    *,
    cost_of: Callable[[Node], Cost] = fewest_requests,
) -> Node:
    """The node of a role that the next leg goes to. `partner`: the other node of the hand-off, when it is chosen.

    The partner itself is none, whatever it does; nor is a node that is fenced from it (`nodes/pairs.py`). A decode node
    that is fenced from every prefill node is the last choice, and so is, of nodes that do both, one that leans to the
    other role.

    A model that only some nodes list goes to those; to any decode node when none of them does, which then says so.

    One in `avoid` (it has just failed the same request), one whose breaker is open, and a decode node without room
    only when there is no other: the last node of a role is never left out for what may be the requests' fault. Raises
    NoNodeError with the reason of every node that is not usable.
    """
    best: Node | None = None
    best_cost: tuple[bool, bool, bool, bool, bool, Cost] | None = None
    now = time.monotonic()
    for node in _candidates(fleet, role, model):
        if node.usable and node is not partner and not _is_fenced(fleet, role, node, partner):
            cost = (
                node in avoid,
                not node.breaker.admits(now),
                role is Role.DECODE and partner is None and fleet.is_cut_off(node),
                node.spec.role.does(Role.DECODE) and not fleet.limits.leave_room(node),
                not node.leans_to(role),
                cost_of(node),
            )
            if best_cost is None or cost < best_cost:
                best, best_cost = node, cost
    if best is None:
        raise NoNodeError(f"no usable {role} node: {fleet.why_none(role, partner)}", "See /health")
    fleet.took_turn(role, best)
    return best


def _is_fenced(fleet: Fleet, role: Role, node: Node, partner: Node | None) -> bool:
    if partner is None:
        return False
    pair = (node, partner) if role is Role.PREFILL else (partner, node)
    return fleet.pairs.is_fenced(*pair)


def _candidates(fleet: Fleet, role: Role, model: object) -> list[Node]:
    """Raises NoNodeError when no prefill node lists the model: one that does not would refuse the leg."""
    nodes = fleet.in_turn(role)
    if not fleet.is_on_some(model):
        return nodes
    listing = [node for node in nodes if model in node.names]
    if role is Role.PREFILL and not any(node.usable for node in listing):
        raise NoNodeError(f"no usable prefill node lists the model {model}", "Load it on the prefill nodes, too")
    return listing if any(node.usable for node in listing) else nodes
