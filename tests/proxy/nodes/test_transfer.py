"""Does KV move? Counters of decode nodes against what was handed over, a probe at a time."""

import pytest

from engines.base import Gauges, NodeFacts, Role
from engines.topology import Node as Spec
from engines.topology import Topology
from proxy.nodes.fleet import Fleet
from proxy.nodes.node import Node
from proxy.nodes.transfer import TransferWatch


class Watched:
    """A decode node and the watch over it."""

    def __init__(self, connector: str = "MooncakeConnector") -> None:
        spec = Spec(name="d", role=Role.DECODE, url="http://d:1")
        self.fleet = Fleet(Topology.model_validate({"connector": connector, "nodes": [spec]}))
        self.node: Node = self.fleet.of(Role.DECODE)[0]
        self.watch = TransferWatch(self.fleet)
        self.transferred = self.computed = 0.0
        self.probe()

    def hand_over(self, times: int, *, moves: bool) -> None:
        for _ in range(times):
            self.node.handed_over(100)
            self.transferred += 100 if moves else 0
            self.computed += 0 if moves else 100

    def probe(self) -> str:
        self.node.ready((), NodeFacts((), Gauges(transferred=self.transferred, computed=self.computed), ""))
        self.watch.observe(self.node, *self.node.all_handed_over)
        return self.watch.verdict(self.node)


def test_what_arrives_moves_and_what_is_computed_again_does_not() -> None:
    watched = Watched()
    assert watched.probe() == "unproven"
    watched.hand_over(2, moves=False)
    assert watched.probe() == "unproven"
    watched.hand_over(1, moves=False)
    assert watched.probe() == "not moving"
    watched.hand_over(1, moves=True)
    assert watched.probe() == "moving"
    assert watched.watch.arrived(watched.node) == 100


def test_what_the_node_computes_for_others_is_no_proof_against_it() -> None:
    """Long streams were handed over at their beginning; short prompts are computed there meanwhile."""
    watched = Watched()
    watched.hand_over(3, moves=True)
    assert watched.probe() == "moving"
    for _ in range(20):
        watched.computed += 500
        assert watched.probe() == "moving"


def test_a_new_life_of_the_node_counts_from_nothing() -> None:
    watched = Watched()
    watched.hand_over(3, moves=True)
    watched.probe()
    watched.transferred = watched.computed = 0
    assert watched.probe() == "moving"
    assert watched.watch.arrived(watched.node) == 300


@pytest.mark.parametrize(
    ("connector", "verdict"), [("MooncakeStoreConnector", "unproven"), ("NixlConnector", "not moving")]
)
def test_where_delivery_is_best_effort_nothing_is_held_against_a_node(connector: str, verdict: str) -> None:
    watched = Watched(connector)
    watched.hand_over(10, moves=False)
    assert watched.probe() == verdict


def test_who_takes_over_the_probing_goes_on_from_what_was_found() -> None:
    """Else all that had arrived would be counted twice, and KV that has just stopped would be said to move."""
    watched = Watched()
    watched.hand_over(1000, moves=True)
    watched.node.ready((), NodeFacts((), Gauges(transferred=watched.transferred, computed=0), ""))
    watched.watch.adopt(watched.node, "moving", watched.transferred)
    watched.hand_over(3, moves=False)
    assert watched.probe() == "not moving"
    assert watched.watch.arrived(watched.node) == 100_000
