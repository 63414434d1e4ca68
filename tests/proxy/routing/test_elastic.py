"""Nodes that do both: what they are asked for first follows the load."""

import pytest

from engines.base import Gauges, NodeFacts, NodeRole, Rank, Role
from engines.topology import Node as Spec
from engines.topology import Topology
from proxy.errors import NoNodeError
from proxy.nodes.fleet import Fleet, Limits
from proxy.nodes.node import Node
from proxy.nodes.pairs import Verdict
from proxy.routing.elastic import Elastic
from proxy.routing.policy import choose


def spec(name: str, role: NodeRole) -> Spec:
    bootstrap = None if role is NodeRole.DECODE else f"http://{name}:2"
    return Spec(name=name, role=role, url=f"http://{name}:1", bootstrap=bootstrap)


def fleet(both: int = 3, prefill: int = 0, decode: int = 0) -> Fleet:
    numbers = {NodeRole.PREFILL: prefill, NodeRole.DECODE: decode, NodeRole.BOTH: both}
    specs = [spec(f"{role}-{place}", role) for role, number in numbers.items() for place in range(number)]
    made = Fleet(Topology(nodes=tuple(specs)), Limits(in_flight=10))
    for node in made:
        start(node)
    return made


def start(node: Node) -> None:
    node.ready((Rank(0, "e"),), NodeFacts((), Gauges(), ""))


def leanings(nodes: Fleet) -> list[Role | None]:
    return [node.leaning for node in nodes]


class Load:
    """What is measured, as a test wants it."""

    def __init__(self, nodes: Fleet) -> None:
        self.nodes = nodes
        self.now = 0.0
        self.waits: dict[str, float] = {}
        self.elastic = Elastic(nodes, lambda node: self.waits.get(node.spec.name, 0.0), 2.0, 0.1, lambda: self.now)

    def set(self, *, wait_s: float, token_s: float) -> None:
        for node in self.nodes:
            self.waits[node.spec.name] = wait_s
            node.live.token_s, node.live.streams = token_s, 1

    def steps(self, seconds: int) -> list[str]:
        """The changes of some seconds, one step each."""
        changes = []
        for _ in range(seconds):
            self.now += 1
            if (change := self.elastic.step()) is not None:
                changes.append(f"{change.node.spec.name} {change.to} {change.reason}")
        return changes


def test_they_begin_with_what_fewer_nodes_do() -> None:
    assert leanings(fleet(3)) == [Role.PREFILL, Role.DECODE, Role.PREFILL]
    assert leanings(fleet(2, decode=3)) == [None, None, None, Role.PREFILL, Role.PREFILL]


def test_a_node_keeps_its_leaning_when_others_come() -> None:
    nodes = fleet(2)
    nodes.of(Role.PREFILL)[0].leaning = Role.DECODE
    nodes.replace(Topology(nodes=tuple(spec(f"both-{place}", NodeRole.BOTH) for place in range(3))))
    assert leanings(nodes) == [Role.DECODE, Role.DECODE, Role.PREFILL]


def test_a_leg_goes_to_a_node_that_leans_to_it_and_to_another_when_there_is_none() -> None:
    nodes = fleet(3)
    first, second, third = nodes
    assert {choose(nodes, Role.DECODE) for _ in range(4)} == {second}
    assert {choose(nodes, Role.PREFILL, partner=second) for _ in range(4)} == {first, third}
    second.failed("gone")
    assert choose(nodes, Role.DECODE) in (first, third)


def test_no_node_hands_over_to_itself() -> None:
    nodes = fleet(2)
    first, second = nodes
    assert {choose(nodes, Role.PREFILL, partner=first) for _ in range(4)} == {second}
    second.failed("gone")
    with pytest.raises(NoNodeError, match="both-0: the other node of the hand-off; both-1: gone"):
        choose(nodes, Role.PREFILL, partner=first)
    assert not nodes.can_hand_over()
    assert nodes.usable_pairs() == []


def test_pairs_in_both_directions_are_pairs_of_their_own() -> None:
    nodes = fleet(2)
    first, second = nodes
    assert set(nodes.usable_pairs()) == {(first, second), (second, first)}
    nodes.judged((first, second), Verdict("differs", "x", (1, 1)))
    assert choose(nodes, Role.PREFILL, partner=first) is second
    with pytest.raises(NoNodeError):
        choose(nodes, Role.PREFILL, partner=second)
    assert nodes.is_cut_off(second)
    assert choose(nodes, Role.DECODE) is first, "a lean is less than a fence"


def test_where_decodes_and_held_kv_leave_no_room_no_prompt_goes_first() -> None:
    nodes = fleet(3)
    first, second, third = nodes
    first.gauges = Gauges(kv_usage=0.99)
    assert {choose(nodes, Role.PREFILL, partner=second) for _ in range(4)} == {third}


def test_prompts_that_wait_get_a_decode_node_that_has_time() -> None:
    load = Load(fleet(4))
    load.set(wait_s=3, token_s=0.02)
    assert load.steps(1) == ["both-1 prefill prompts-wait"]


def test_late_tokens_get_a_prefill_node_that_has_time() -> None:
    load = Load(fleet(4))
    load.set(wait_s=0.1, token_s=0.3)
    assert load.steps(1) == ["both-0 decode tokens-late"]


def test_the_node_with_the_fewest_live_tokens_is_given() -> None:
    load = Load(fleet(4))
    load.set(wait_s=3, token_s=0.02)
    _, second, _, fourth = load.nodes
    second.live.prompts, fourth.live.prompts = 10**9, 5
    assert load.steps(1) == ["both-3 prefill prompts-wait"]


def test_each_role_keeps_a_node_however_long_the_queue() -> None:
    load = Load(fleet(4))
    load.set(wait_s=1000, token_s=0.001)
    assert load.steps(120) == ["both-1 prefill prompts-wait"]
    assert leanings(load.nodes).count(Role.DECODE) == 1


def test_one_change_must_show_before_the_next() -> None:
    load = Load(fleet(8))
    load.set(wait_s=1000, token_s=0.001)
    assert len(load.steps(21)) == 3


@pytest.mark.parametrize(("wait_s", "token_s"), [(1.9, 0.02), (3, 0.09), (1.1, 0.3), (0, 0.1)])
def test_between_the_limits_nothing_changes(wait_s: float, token_s: float) -> None:
    load = Load(fleet(4))
    load.set(wait_s=wait_s, token_s=token_s)
    assert load.steps(60) == []


def test_it_does_not_go_to_and_fro_under_a_load_that_stays() -> None:
    """Each role's figure is its work over its nodes: after one change neither wants the node back."""
    nodes = fleet(4)
    load = Load(nodes)
    changes = []
    for _ in range(300):
        prefills = sum(node.leaning is Role.PREFILL for node in nodes)
        load.set(wait_s=5.0 / prefills, token_s=0.1 / (4 - prefills))
        changes += load.steps(1)
    assert changes == ["both-1 prefill prompts-wait"]


def test_nodes_of_one_role_are_never_given() -> None:
    load = Load(fleet(0, prefill=2, decode=2))
    load.set(wait_s=1000, token_s=0.001)
    assert load.steps(60) == []
    assert leanings(load.nodes) == [None] * 4
