"""The node with the fewest requests on it; among equals, the next in turn."""

import time
from collections.abc import Collection

from engines.base import Role

from ..errors import NoNodeError
from ..nodes.fleet import Fleet
from ..nodes.node import Node


def choose(fleet: Fleet, role: Role, avoid: Collection[Node] = ()) -> Node:
    """The node of a role that the next leg goes to.

    One in `avoid` (it has just failed the same request), one whose breaker is open, and a decode node without room
    only when there is no other: the last node of a role is never left out for what may be the requests' fault. Raises
    NoNodeError with the reason of every node that is not usable.
    """
    best: Node | None = None
    best_cost: tuple[bool, bool, bool, int] | None = None
    now = time.monotonic()
    for node in fleet.in_turn(role):
        if node.usable:
            cost = (
                node in avoid,
                not node.breaker.admits(now),
                role is Role.DECODE and not fleet.limits.leave_room(node),
                node.load,
            )
            if best_cost is None or cost < best_cost:
                best, best_cost = node, cost
    if best is None:
        raise NoNodeError(f"no usable {role} node: {fleet.why_none(role)}", "See /health")
    fleet.took_turn(best)
    return best
