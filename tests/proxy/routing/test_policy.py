"""Which node a leg goes to."""

import pytest

from engines.base import Gauges, NodeFacts, Rank, Role
from engines.topology import Node, Topology
from proxy.errors import NoNodeError
from proxy.nodes.fleet import Fleet, Limits
from proxy.nodes.pairs import Verdict
from proxy.routing.policy import choose

FACTS = NodeFacts((), Gauges(), "")


def fleet(prefill: int = 2, decode: int = 3, *, ready: bool = True) -> Fleet:
    prefills = [
        Node(name=f"p{n}", role=Role.PREFILL, url=f"http://p:{n + 1}", bootstrap=f"http://p:{n + 100}")
        for n in range(prefill)
    ]
    decodes = [Node(name=f"d{n}", role=Role.DECODE, url=f"http://d:{n + 1}") for n in range(decode)]
    made = Fleet(Topology(nodes=(*prefills, *decodes)), Limits(in_flight=10))
    for node in made if ready else ():
        node.ready((Rank(0, "e"),), FACTS)
    return made


def chosen(nodes: Fleet, times: int, role: Role = Role.DECODE) -> list[str]:
    return [choose(nodes, role).spec.name for _ in range(times)]


def test_nodes_of_a_role_take_turns() -> None:
    nodes = fleet()
    assert chosen(nodes, 5) == ["d0", "d1", "d2", "d0", "d1"]
    assert chosen(nodes, 3, Role.PREFILL) == ["p0", "p1", "p0"]


def test_the_one_with_the_fewest_requests_comes_first() -> None:
    nodes = fleet()
    first, second, third = nodes.of(Role.DECODE)
    with first.lease(), first.lease(), third.lease():
        assert choose(nodes, Role.DECODE) is second
        with second.lease(), second.lease():
            assert choose(nodes, Role.DECODE) is third


def test_a_node_that_failed_is_passed_over_until_it_is_ready_again() -> None:
    nodes = fleet()
    failed = nodes.of(Role.DECODE)[1]
    failed.failed("broken")
    assert set(chosen(nodes, 6)) == {"d0", "d2"}
    failed.ready((), FACTS)
    assert set(chosen(nodes, 6)) == {"d0", "d1", "d2"}


def test_no_hand_off_between_two_nodes_that_are_fenced_from_each_other() -> None:
    nodes = fleet(2, 2)
    (p0, p1), (d0, d1) = nodes.of(Role.PREFILL), nodes.of(Role.DECODE)
    nodes.judged((p0, d1), Verdict("differs", "token 1", (1, 1)))
    assert {choose(nodes, Role.PREFILL, partner=d1) for _ in range(4)} == {p1}
    assert {choose(nodes, Role.PREFILL, partner=d0) for _ in range(4)} == {p0, p1}
    assert {choose(nodes, Role.DECODE, partner=p0) for _ in range(4)} == {d0}
    p1.failed("broken")
    with pytest.raises(NoNodeError, match="p0: hand-offs with d1 are fenced; p1: broken"):
        choose(nodes, Role.PREFILL, partner=d1)


def test_a_decode_node_that_no_prefill_node_may_hand_over_to_comes_last_and_not_never() -> None:
    nodes = fleet(1, 2)
    (p0,), (d0, d1) = nodes.of(Role.PREFILL), nodes.of(Role.DECODE)
    nodes.judged((p0, d0), Verdict("differs", "token 1", (1, 1)))
    with d1.lease():
        assert {choose(nodes, Role.DECODE) for _ in range(4)} == {d1}
        d1.gauges = Gauges(waiting=1000)
        assert not nodes.has_room(), "the one that hand-offs go to is full: requests wait for it"
        d1.failed("broken")
        nodes.compare()
        assert choose(nodes, Role.DECODE) is d0
        assert nodes.has_room()
        assert not nodes.can_hand_over()


def test_who_failed_the_same_request_and_who_is_full_comes_last_and_not_never() -> None:
    nodes = fleet(1, 2)
    first, second = nodes.of(Role.DECODE)
    assert choose(nodes, Role.DECODE, {first}) is second
    assert choose(nodes, Role.DECODE, {first, second}) in (first, second)
    second.gauges = Gauges(waiting=1000)
    assert choose(nodes, Role.DECODE) is first
    for _ in range(3):
        first.breaker.record_failure()
    assert choose(nodes, Role.DECODE) is second


def test_without_a_usable_node_the_error_says_why_of_each() -> None:
    nodes = fleet(decode=2)
    for node in nodes.of(Role.DECODE):
        node.failed("out of order")
    with pytest.raises(NoNodeError, match="d0: out of order; d1: out of order"):
        choose(nodes, Role.DECODE)
    assert not nodes.has(Role.DECODE)
    assert nodes.has(Role.PREFILL)


def test_an_empty_role_is_said_so_and_so_is_a_node_not_probed_yet() -> None:
    with pytest.raises(NoNodeError, match="there is no prefill node"):
        choose(fleet(0, 1), Role.PREFILL)
    with pytest.raises(NoNodeError, match="not probed yet"):
        choose(fleet(1, 1, ready=False), Role.DECODE)


def listing(nodes: Fleet, **models: str) -> None:
    """What each node lists: `p0="m a"` is the model m and the adapter a."""
    for node in nodes:
        names = models.get(node.spec.name, "m").split()
        cards = tuple({"id": name, "parent": None if name == "m" else "m"} for name in names)
        node.ready((Rank(0, "e"),), NodeFacts(cards, Gauges(), ""))
    nodes.compare()


def test_a_model_that_only_some_nodes_list_goes_to_those() -> None:
    nodes = fleet()
    listing(nodes, p1="m a", d0="m a", d2="m a")
    assert {choose(nodes, Role.PREFILL, (), "a").spec.name for _ in range(4)} == {"p1"}
    assert {choose(nodes, Role.DECODE, (), "a").spec.name for _ in range(6)} == {"d0", "d2"}
    assert {choose(nodes, Role.DECODE, (), "m").spec.name for _ in range(6)} == {"d0", "d1", "d2"}


def test_one_that_no_prefill_node_lists_has_none_and_one_that_no_decode_node_lists_goes_to_any() -> None:
    """A decode node that does not know it says so itself; a prefill node would refuse a leg of ours."""
    nodes = fleet()
    listing(nodes, d0="m a", p0="m b")
    with pytest.raises(NoNodeError, match="no usable prefill node lists the model a"):
        choose(nodes, Role.PREFILL, (), "a")
    assert {choose(nodes, Role.DECODE, (), "b").spec.name for _ in range(6)} == {"d0", "d1", "d2"}


@pytest.mark.parametrize("model", [None, "nobody-has-it", 7, ["m"], {"m": 1}])
def test_a_model_that_nobody_lists_or_that_is_none_goes_anywhere(model: object) -> None:
    nodes = fleet()
    listing(nodes, d0="m a")
    assert {choose(nodes, Role.DECODE, (), model).spec.name for _ in range(6)} == {"d0", "d1", "d2"}


def test_of_the_nodes_that_list_it_one_that_is_down_is_passed_over() -> None:
    nodes = fleet()
    listing(nodes, d0="m a", d1="m a")
    nodes.of(Role.DECODE)[0].failed("broken")
    assert {choose(nodes, Role.DECODE, (), "a").spec.name for _ in range(4)} == {"d1"}
