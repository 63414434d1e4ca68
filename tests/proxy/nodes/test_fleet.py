"""Selection and leases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Rank, Role
from engines.topology import Node, Topology
from proxy.errors import NoNodeError
from proxy.nodes.fleet import Pool


def topology(prefill: int, decode: int) -> Topology:
    prefills = [
        Node(name=f"p{n}", role=Role.PREFILL, url=f"http://p:{n + 1}", bootstrap=f"http://p:{n + 100}")
        for n in range(prefill)
    ]
    decodes = [Node(name=f"d{n}", role=Role.DECODE, url=f"http://d:{n + 1}") for n in range(decode)]
    return Topology(nodes=(*prefills, *decodes))


def ready_pool(prefill: int = 2, decode: int = 3) -> Pool:
    pool = Pool(topology(prefill, decode))
    for node in pool:
        node.ready((Rank(0, "e"),), ())
    return pool


def test_nodes_of_a_role_take_turns() -> None:
    pool = ready_pool()
    assert [pool.choose(Role.DECODE).spec.name for _ in range(5)] == ["d0", "d1", "d2", "d0", "d1"]
    assert [pool.choose(Role.PREFILL).spec.name for _ in range(3)] == ["p0", "p1", "p0"]


def test_a_node_that_failed_is_passed_over_until_it_is_ready_again() -> None:
    pool = ready_pool()
    failed = pool.of(Role.DECODE)[1]
    failed.failed("broken")
    assert {pool.choose(Role.DECODE).spec.name for _ in range(6)} == {"d0", "d2"}
    failed.ready((), ())
    assert {pool.choose(Role.DECODE).spec.name for _ in range(6)} == {"d0", "d1", "d2"}


def test_a_failure_forgets_the_identity() -> None:
    node = ready_pool().of(Role.PREFILL)[0]
    node.failed("broken")
    assert node.ranks == ()


def test_without_a_usable_node_the_error_says_why_of_each() -> None:
    pool = ready_pool(decode=2)
    for node in pool.of(Role.DECODE):
        node.failed("out of order")
    with pytest.raises(NoNodeError, match="d0: out of order; d1: out of order"):
        pool.choose(Role.DECODE)
    assert not pool.has(Role.DECODE)
    assert pool.has(Role.PREFILL)


def test_an_empty_role_is_said_so() -> None:
    with pytest.raises(NoNodeError, match="there is no prefill node"):
        Pool(topology(0, 1)).choose(Role.PREFILL)


def test_a_node_not_probed_yet_gets_nothing() -> None:
    with pytest.raises(NoNodeError, match="not probed yet"):
        Pool(topology(1, 1)).choose(Role.DECODE)


@given(st.lists(st.booleans(), max_size=30))
def test_leases_are_given_back_however_they_end(ends: list[bool]) -> None:
    pool = ready_pool()
    for well in ends:
        try:
            with pool.choose(Role.DECODE).lease():
                if not well:
                    raise NoNodeError("x")
        except NoNodeError:
            pass
    assert [node.in_flight for node in pool] == [0] * 5


def test_a_node_that_stays_in_the_topology_keeps_its_state() -> None:
    pool = ready_pool(2, 2)
    stays = pool.of(Role.DECODE)[0]
    pool.replace(topology(2, 1))
    assert pool.of(Role.DECODE) == [stays]
    assert stays.usable


def test_a_model_is_listed_when_a_node_of_each_role_serves_it() -> None:
    pool = ready_pool(1, 1)
    pool.of(Role.PREFILL)[0].ready((Rank(0, "e"),), ({"id": "both"}, {"id": "only-prefill"}))
    pool.of(Role.DECODE)[0].ready((), ({"id": "both"}, {"id": "only-decode"}))
    assert pool.models() == [{"id": "both"}]


def test_the_ranks_of_a_data_parallel_node_take_turns() -> None:
    node = ready_pool().of(Role.PREFILL)[0]
    node.ready((Rank(0, "a"), Rank(1, "b")), ())
    turns = [node.next_rank() for _ in range(4)]
    assert {rank.number for rank in turns if rank} == {0, 1}
    assert turns[0] == turns[2] != turns[1] == turns[3]


def test_a_node_without_an_identity_has_no_rank() -> None:
    assert ready_pool().of(Role.DECODE)[0].next_rank() is not None
    node = ready_pool().of(Role.DECODE)[0]
    node.ready((), ())
    assert node.next_rank() is None
