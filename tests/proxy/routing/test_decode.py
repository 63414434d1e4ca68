"""Which decode node answers."""

from collections.abc import Iterator

import pytest

from engines.base import Gauges, NodeFacts, Role
from engines.topology import Node as Spec
from engines.topology import Topology
from proxy.nodes.fleet import Fleet
from proxy.nodes.node import Node
from proxy.routing.decode import DecodeRouter
from proxy.routing.prefill import PrefillRouter
from proxy.routing.prompts import PIECE_IDS, Prompt, prompt_of

CACHE_TOKENS = 1000 * PIECE_IDS


def fleet(decode: int = 2, cache_tokens: int = 0) -> tuple[Fleet, list[Node]]:
    specs = [Spec(name=f"d{n}", role=Role.DECODE, url=f"http://d:{n + 1}") for n in range(decode)]
    nodes = Fleet(Topology(nodes=(Spec(name="p", role=Role.PREFILL, url="http://p:1", bootstrap="http://p:2"), *specs)))
    for node in nodes:
        start(node, cache_tokens)
    return nodes, nodes.of(Role.DECODE)


def start(node: Node, cache_tokens: int) -> None:
    node.ready((), NodeFacts((), Gauges(), "", {}, cache_tokens))


def prompt(*pieces: int, session: bytes = b"") -> Prompt:
    ids = [token for number in pieces for token in [number] * PIECE_IDS]
    return prompt_of({"prompt": ids}, len(ids), session)


def router(nodes: Fleet) -> DecodeRouter:
    return DecodeRouter(nodes, clock=lambda: 0.0)


def test_the_one_with_the_fewest_live_tokens_not_the_one_with_the_fewest_requests() -> None:
    nodes, (first, second) = fleet()
    with first.lease(tokens=8000), second.lease(tokens=10), second.lease(tokens=10), second.lease(tokens=10):
        assert {router(nodes).choose(prompt(1)) for _ in range(4)} == {second}


def test_what_was_generated_counts() -> None:
    nodes, (first, second) = fleet()
    with first.lease(tokens=100) as seat, second.lease(tokens=110):
        seat.generates()
        began = seat._began
        assert began is not None
        assert DecodeRouter(nodes, clock=lambda: began).choose(prompt(1)) is first
        assert DecodeRouter(nodes, clock=lambda: began + 10).choose(prompt(1)) is second


def test_what_other_workers_have_there_counts() -> None:
    nodes, (first, second) = fleet()
    first.elsewhere.live_tokens = 500
    with second.lease(tokens=100):
        assert router(nodes).choose(prompt(1)) is second


def test_a_conversation_goes_on_where_it_is_cached_while_that_holds_no_more_than_it_spares() -> None:
    nodes, (first, second) = fleet(cache_tokens=CACHE_TOKENS)
    one = router(nodes)
    one.has(second, prompt(*range(40)))
    with second.lease(tokens=30 * PIECE_IDS):
        assert {one.choose(prompt(*range(41))) for _ in range(4)} == {second}
        assert one.choose(prompt(100)) is first
    with second.lease(tokens=50 * PIECE_IDS):
        assert one.choose(prompt(*range(41))) is first


def test_nodes_without_a_prefix_cache_keep_no_conversation() -> None:
    nodes, (_, second) = fleet()
    one = router(nodes)
    one.has(second, prompt(*range(40)))
    assert not one.looks_at_prompts
    assert len({one.choose(prompt(*range(41))) for _ in range(2)}) == 2


def test_a_node_that_has_started_anew_has_nothing() -> None:
    nodes, (_, second) = fleet(cache_tokens=CACHE_TOKENS)
    one = router(nodes)
    one.has(second, prompt(*range(40)))
    second.failed("gone")
    start(second, CACHE_TOKENS)
    assert one.cached(second, prompt(*range(40))) == 0


def test_of_equal_nodes_each_session_has_its_own_in_every_process() -> None:
    chosen = {}
    for session in (b"a", b"b", b"c", b"d", b"e", b"f"):
        found = {router(fleet()[0]).choose(prompt(1, session=session)).spec.name for _ in range(3)}
        assert len(found) == 1
        chosen[session] = found.pop()
    assert set(chosen.values()) == {"d0", "d1"}


class Post:
    """Notices from one worker to another."""

    def __init__(self) -> None:
        self.written: list[tuple[object, tuple[int, ...]]] = []

    def write(self, data: object, keys: tuple[int, ...] = ()) -> None:
        self.written.append((data, keys))

    def read(self) -> Iterator[tuple[int, tuple[object, tuple[int, ...]] | None]]:
        yield from ((1, notice) for notice in self.written)
        self.written = []


def test_workers_tell_each_other_what_is_cached_where() -> None:
    post = Post()
    (nodes, decodes), (other_nodes, other_decodes) = (fleet(cache_tokens=CACHE_TOKENS) for _ in range(2))
    here, there = router(nodes), router(other_nodes)
    PrefillRouter("prefix-cost", nodes, here, post)
    listening = PrefillRouter("prefix-cost", other_nodes, there, post)
    here.has(decodes[1], prompt(*range(40)))
    listening.choose(prompt(1))
    assert there.cached(other_decodes[1], prompt(*range(40))) == pytest.approx(40 * PIECE_IDS)
