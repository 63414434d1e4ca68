"""May it be tried again? A decision without any I/O."""

import time

import pytest

from engines.base import Gauges, NodeFacts, Rank, Role
from engines.topology import Node, Topology
from proxy.errors import (
    NodeAnsweredError,
    NodeBrokeOffError,
    NodeError,
    NodeRejectsKeyError,
    NodeTimeoutError,
    NodeUnreachableError,
)
from proxy.exchange.retry import RetryBudget, may_retry
from proxy.nodes.fleet import Fleet

FACTS = NodeFacts((), Gauges(), "")


def fleet(prefill: int, decode: int) -> Fleet:
    prefills = [
        Node(name=f"p{n}", role=Role.PREFILL, url=f"http://p:{n + 1}", bootstrap=f"http://p:{n + 100}")
        for n in range(prefill)
    ]
    decodes = [Node(name=f"d{n}", role=Role.DECODE, url=f"http://d:{n + 1}") for n in range(decode)]
    made = Fleet(Topology(nodes=(*prefills, *decodes)))
    for node in made:
        node.ready((Rank(0, "e"),), FACTS)
    return made


def answered(status: int, retry_after: bytes = b"") -> NodeAnsweredError:
    return NodeAnsweredError("n", status, [(b"retry-after", retry_after)], b"")


@pytest.mark.parametrize(
    ("error", "nodes", "role", "may"),
    [
        (NodeBrokeOffError("x"), (1, 1), Role.DECODE, True),
        (NodeError("x"), (1, 1), Role.DECODE, True),
        (NodeUnreachableError("x"), (1, 1), Role.DECODE, True),
        (NodeTimeoutError("x"), (1, 2), Role.DECODE, True),
        (NodeTimeoutError("x", may_be_retried=False), (2, 2), Role.PREFILL, False),
        (NodeRejectsKeyError("x"), (2, 2), Role.DECODE, False),
        (answered(500), (1, 1), Role.DECODE, False),
        (answered(500), (1, 2), Role.DECODE, True),
        (answered(500), (1, 1), Role.PREFILL, True),
        (answered(503, b"3"), (1, 1), Role.PREFILL, False),
        (answered(503, b"3"), (2, 1), Role.PREFILL, True),
    ],
)  # fmt: skip
def test_what_another_attempt_can_do_better(error: NodeError, nodes: tuple[int, int], role: Role, may: bool) -> None:
    """A node that answers that it cannot is not asked again for the same; one that broke off may be."""
    all_nodes = fleet(*nodes)
    failing = all_nodes.of(role)[0]
    assert may_retry(error, failing, all_nodes, {failing}, alone_will_do=True) is may


def test_a_prefill_node_that_cannot_is_the_end_where_decode_nodes_may_not_compute() -> None:
    nodes = fleet(1, 1)
    failing = nodes.of(Role.PREFILL)[0]
    assert not may_retry(answered(500), failing, nodes, {failing}, alone_will_do=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.usefixtures("clock")
def test_retries_are_a_share_of_traffic_and_a_few_are_free() -> None:
    budget = RetryBudget(share=0.2, a_second=0, most=3)
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]
    for _ in range(5):
        budget.deposit()
    assert [budget.withdraw() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("given", "seconds"), [(b"7", 7), (b" 7 ", 7), (b"soon", None), (b"", None), (b"Thu, 01 Jan 1970 00:00:00 GMT", 0)]
)
def test_retry_after_may_be_a_number_or_a_date(given: bytes, seconds: float | None) -> None:
    assert NodeAnsweredError("n", 503, [(b"retry-after", given)], b"").retry_after_s == seconds
