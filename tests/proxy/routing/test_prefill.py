"""Which prefill node computes a prompt: single choices, and whole traffic in virtual time."""

import heapq
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import pytest

from engines.base import Gauges, NodeFacts, Prefilled, Rank, Role
from engines.sim.prefixes import PrefixCache
from engines.topology import Node as Spec
from engines.topology import Topology
from proxy.nodes.fleet import Fleet
from proxy.nodes.node import Node
from proxy.routing.prefill import PrefillRouter
from proxy.routing.prompts import PIECE_IDS, Prompt, prompt_of

CACHE_TOKENS = 4000 * PIECE_IDS
BLOCK = PIECE_IDS


def fleet(prefill: int = 2, ranks: int = 1, cache_tokens: int | None = CACHE_TOKENS) -> Fleet:
    specs = [
        Spec(name=f"p{n}", role=Role.PREFILL, url=f"http://p:{n + 1}", bootstrap=f"http://p:{n + 100}")
        for n in range(prefill)
    ]
    nodes = Fleet(Topology(nodes=(*specs, Spec(name="d0", role=Role.DECODE, url="http://d:1"))))
    for node in nodes:
        start(node, ranks, cache_tokens)
    return nodes


def start(node: Node, ranks: int = 1, cache_tokens: int | None = CACHE_TOKENS, life: int = 0) -> None:
    layout = {"block_size": str(BLOCK)}
    told = tuple(Rank(number, f"{node.spec.name} {life} {number}", ranks) for number in range(ranks))
    node.ready(told, NodeFacts((), Gauges(), "", layout, cache_tokens))


def prompt(*pieces: int) -> Prompt:
    return prompt_of(
        {"prompt": [token for number in pieces for token in [number] * PIECE_IDS]}, len(pieces) * PIECE_IDS
    )


def computes(router: PrefillRouter, node: Node, asked: Prompt, cached: int = 0, rank: Rank | None = None) -> str | None:
    """One prefill from beginning to end; what came of its prediction."""
    with router.sent(node, rank or node.ranks[0], asked) as sent:
        sent.prefilled = Prefilled({}, asked.tokens, cached)
    return sent.audit.outcome if sent.audit else None


LONG = tuple(range(100, 140))


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    nodes = fleet(3)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    second = nodes.of(Role.PREFILL)[1]
    computes(router, second, prompt(*LONG))
    assert {router.choose(prompt(*LONG, number)) for number in range(5)} == {second}


def test_what_was_on_its_way_is_as_predicted_however_far_its_length_was_guessed_wrong() -> None:
    nodes = fleet(2)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    node = nodes.of(Role.PREFILL)[0]
    first, second = prompt(*LONG), prompt(*LONG, 1)
    truth = second.tokens
    first.tokens, second.tokens = first.tokens // 4, second.tokens // 4
    with router.sent(node, node.ranks[0], first), router.sent(node, node.ranks[0], second) as sent:
        sent.prefilled = Prefilled({}, truth, len(LONG) * PIECE_IDS)
    assert sent.audit is not None
    assert sent.audit.outcome == "as-predicted"


def test_without_anything_cached_nodes_take_turns() -> None:
    nodes = fleet(3)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    assert len({router.choose(prompt(number)) for number in range(3)}) == 3


def test_not_where_the_queue_is_longer_than_the_work_it_spares() -> None:
    nodes = fleet(2)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    first, second = nodes.of(Role.PREFILL)
    computes(router, first, prompt(1, 2))
    with router.sent(first, first.ranks[0], prompt(*LONG)):
        assert router.choose(prompt(1, 2, 3)) is second


def test_of_a_node_s_ranks_the_one_that_has_it() -> None:
    nodes = fleet(1, ranks=4)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    node = nodes.of(Role.PREFILL)[0]
    third = node.ranks[2]
    computes(router, node, prompt(*LONG), rank=third)
    assert [router.rank_of(node, prompt(*LONG, number)) for number in range(3)] == [third] * 3
    assert len({router.rank_of(node, prompt(number)) for number in range(4)}) == 4, "else they take turns"


def test_a_node_that_has_started_anew_has_nothing_cached() -> None:
    nodes = fleet(2)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    first = nodes.of(Role.PREFILL)[0]
    computes(router, first, prompt(*LONG))
    first.failed("gone")
    start(first, life=1)
    assert len({router.choose(prompt(*LONG, number)) for number in range(2)}) == 2


@pytest.mark.parametrize(
    ("cached", "outcome"), [(40, "as-predicted"), (39, "as-predicted"), (38, "as-predicted"), (37, "less"), (0, "less")]
)
def test_a_prediction_is_compared_with_what_the_node_says(cached: int, outcome: str) -> None:
    nodes = fleet(2)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    first = nodes.of(Role.PREFILL)[0]
    assert computes(router, first, prompt(*LONG)) == "as-predicted"
    assert computes(router, first, prompt(*LONG, 1, 2), cached * BLOCK) == outcome


@pytest.mark.parametrize("cached", [-5, 10**12])
def test_an_absurd_count_does_no_harm(cached: int) -> None:
    nodes = fleet(2)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    first = nodes.of(Role.PREFILL)[0]
    computes(router, first, prompt(*LONG), cached)
    assert router.choose(prompt(*LONG, 1)) is first


def test_a_node_that_leaves_is_forgotten() -> None:
    nodes = fleet(2)
    router = PrefillRouter("prefix-cost", nodes, clock=lambda: 0.0)
    for node in nodes.of(Role.PREFILL):
        computes(router, node, prompt(*LONG))
    nodes.replace(fleet(3)._topology)
    router.choose(prompt(1))
    for node in nodes.of(Role.PREFILL):
        start(node)
    router.choose(prompt(1))
    assert set(router._known) == set(nodes.of(Role.PREFILL))


@pytest.mark.parametrize("policy", ["least-load", "round-robin"])
def test_the_other_policies_look_at_no_prompt(policy: str) -> None:
    nodes = fleet(2)
    router = PrefillRouter(policy, nodes, clock=lambda: 0.0)
    first, second = nodes.of(Role.PREFILL)
    assert not router.looks_at_prompts
    computes(router, first, prompt(*LONG))
    assert {router.choose(prompt(*LONG, number)) for number in range(2)} == {first, second}
    with first.lease():
        chosen = [router.choose(prompt(*LONG)) for _ in range(4)]
    assert set(chosen) == ({second} if policy == "least-load" else {first, second})


def test_with_one_node_there_is_nothing_to_look_at() -> None:
    assert not PrefillRouter("prefix-cost", fleet(1)).looks_at_prompts
    assert PrefillRouter("prefix-cost", fleet(1, ranks=2)).looks_at_prompts
    assert PrefillRouter("prefix-cost", fleet(2)).looks_at_prompts


# -- several processes


class Notices:
    """Between two routers of one process here; `serving/journal.py` is between processes."""

    def __init__(self) -> None:
        self.other: list[tuple[int, Any]] = []
        self.mine: list[tuple[int, Any]] = []

    def write(self, data: Any, keys: tuple[int, ...] = ()) -> None:
        self.other.append((1, (data, keys)))

    def read(self) -> Iterator[tuple[int, Any]]:
        while self.mine:
            yield self.mine.pop(0)


def two_workers() -> tuple[PrefillRouter, Notices, PrefillRouter, Notices]:
    here, there = Notices(), Notices()
    here.other, there.other = there.mine, here.mine
    routers = [PrefillRouter("prefix-cost", fleet(2), None, notices, lambda: 0.0) for notices in (here, there)]
    return routers[0], here, routers[1], there


def test_what_another_worker_sent_is_known_here() -> None:
    ours, _, theirs, _ = two_workers()
    first = theirs._fleet.of(Role.PREFILL)[0]
    computes(theirs, first, prompt(*LONG))
    assert {ours.choose(prompt(*LONG, number)).spec.name for number in range(3)} == {first.spec.name}


def test_what_another_worker_has_under_way_is_in_the_backlog_here() -> None:
    ours, _, theirs, _ = two_workers()
    first = theirs._fleet.of(Role.PREFILL)[0]
    with theirs.sent(first, first.ranks[0], prompt(*LONG)):
        assert {ours.choose(prompt(number)).spec.name for number in range(3)} == {"p1"}
    assert {ours.choose(prompt(number)).spec.name for number in range(3, 5)} == {"p0", "p1"}


def test_what_a_worker_that_died_had_under_way_is_forgotten() -> None:
    ours, here, theirs, _ = two_workers()
    first = theirs._fleet.of(Role.PREFILL)[0]
    with theirs.sent(first, first.ranks[0], prompt(*LONG)):
        ours.choose(prompt(1))
        here.mine.append((1, None))
        assert {ours.choose(prompt(number)).spec.name for number in range(2, 4)} == {"p0", "p1"}
    ours.choose(prompt(9))


def test_a_prefill_that_failed_elsewhere_left_nothing_here() -> None:
    ours, _, theirs, _ = two_workers()
    first = theirs._fleet.of(Role.PREFILL)[0]
    with theirs.sent(first, first.ranks[0], prompt(*LONG)):
        pass
    assert {ours.choose(prompt(*LONG, number)).spec.name for number in range(2)} == {"p0", "p1"}


# -- traffic, in virtual time: nodes that compute one prompt after the other, and have a real prefix cache

RATE = 20_000.0
OVERHEAD_S = 0.02
Arrival = tuple[float, tuple[int, ...]]
"""When, and the pieces of the prompt."""


@dataclass
class Server:
    cache: PrefixCache
    free_at: float = 0.0


@dataclass
class Outcome:
    waited: list[float] = field(default_factory=list)
    cached: int = 0
    as_predicted: int = 0
    predicted: int = 0

    @property
    def ttft(self) -> float:
        return mean(self.waited)


class World:
    """Four prefill nodes behind a router."""

    def __init__(self, policy: str) -> None:
        self.now = 0.0
        self.nodes = fleet(4)
        self.router = PrefillRouter(policy, self.nodes, clock=lambda: self.now)
        self.servers = {node: Server(PrefixCache(BLOCK, CACHE_TOKENS // BLOCK)) for node in self.nodes.of(Role.PREFILL)}
        self.outcome = Outcome()

    def play(
        self, arrivals: list[Arrival], choose: "Callable[[World, tuple[int, ...]], Node] | None" = None
    ) -> Outcome:
        ends: list[tuple[float, int, Callable[[], None]]] = []
        for number, (at, pieces) in enumerate(arrivals):
            while ends and ends[0][0] <= at:
                self.now, _, end = heapq.heappop(ends)
                end()
            self.now = at
            node = choose(self, pieces) if choose else self.router.choose(prompt(*pieces))
            ends_at, end = self._send(node, pieces)
            heapq.heappush(ends, (ends_at, number, end))
        return self.outcome

    def _send(self, node: Node, pieces: tuple[int, ...]) -> tuple[float, "Callable[[], None]"]:
        server, asked = self.servers[node], prompt(*pieces)
        stack = ExitStack()
        stack.enter_context(node.lease())
        sent = stack.enter_context(self.router.sent(node, node.ranks[0], asked))
        cached = server.cache.compute(tuple(token for piece in pieces for token in [piece] * PIECE_IDS))
        start = max(self.now, server.free_at)
        server.free_at = start + OVERHEAD_S + (asked.tokens - cached) / RATE
        self.outcome.waited.append(server.free_at - self.now)
        self.outcome.cached += cached

        def end() -> None:
            sent.prefilled = Prefilled({}, asked.tokens, cached)
            stack.close()
            if sent.audit is not None:
                self.outcome.predicted += 1
                self.outcome.as_predicted += sent.audit.outcome == "as-predicted"

        return server.free_at, end


def chats(seed: int, load: float = 0.75, number: int = 150, turns: int = 6) -> list[Arrival]:
    """Conversations that grow by some 1500 tokens a turn."""
    source = random.Random(seed)
    fresh = iter(range(10**9))
    said: list[list[tuple[int, ...]]] = []
    for _ in range(number):
        pieces = tuple(next(fresh) for _ in range(source.randrange(4, 40)))
        conversation = []
        for _ in range(turns):
            pieces += tuple(next(fresh) for _ in range(source.randrange(4, 44)))
            conversation.append(pieces)
        said.append(conversation)
    tokens = sum(len(pieces) for conversation in said for pieces in conversation) * PIECE_IDS
    length = tokens / (4 * RATE) / load
    arrivals = list[Arrival]()
    for conversation in said:
        at = source.uniform(0, length * 0.7)
        for pieces in conversation:
            arrivals.append((at, pieces))
            at += source.expovariate(turns / (0.3 * length))
    return sorted(arrivals)


def hot(seed: int) -> list[Arrival]:
    """One prompt of 8000 tokens that everybody begins with, in bursts."""
    source, fresh = random.Random(seed), iter(range(1000, 10**9))
    shared, at, arrivals = tuple(range(125)), 0.0, list[Arrival]()
    for _ in range(120):
        at += source.expovariate(1 / 1.0)
        arrivals += [(at, (*shared, *(next(fresh) for _ in range(20)))) for _ in range(source.randrange(2, 20))]
    return arrivals


def unshared(seed: int) -> list[Arrival]:
    source, fresh = random.Random(seed), iter(range(10**9))
    at, arrivals = 0.0, list[Arrival]()
    for _ in range(800):
        at += source.expovariate(4 * RATE * 0.75 / (40 * PIECE_IDS))
        arrivals.append((at, tuple(next(fresh) for _ in range(source.randrange(10, 70)))))
    return arrivals


def exactly(world: World, pieces: tuple[int, ...]) -> Node:
    """The node that would be through with it first, by what really is in its cache and its queue."""
    ids = tuple(token for piece in pieces for token in [piece] * PIECE_IDS)

    def ends(node: Node) -> float:
        server = world.servers[node]
        return max(world.now, server.free_at) + (len(ids) - server.cache.found(ids)) / RATE

    return min(world.servers, key=ends)


SEEDS = (11, 12)


@pytest.mark.parametrize("seed", SEEDS)
def test_conversations_wait_less_than_half_as_long_as_by_load_alone(seed: int) -> None:
    arrivals = chats(seed)
    ours, by_load = (World(policy).play(arrivals) for policy in ("prefix-cost", "least-load"))
    assert ours.ttft <= 0.5 * by_load.ttft
    assert ours.as_predicted >= 0.99 * ours.predicted > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_conversations_find_what_they_would_find_if_all_were_known(seed: int) -> None:
    arrivals = chats(seed)
    ours, known = World("prefix-cost").play(arrivals), World("prefix-cost").play(arrivals, exactly)
    assert ours.cached >= 0.97 * known.cached
    assert ours.ttft <= known.ttft


@pytest.mark.parametrize("traffic", [hot, unshared])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_shares_everything_or_nothing_waits_no_longer(traffic: Callable[[int], list[Arrival]], seed: int) -> None:
    arrivals = traffic(seed)
    ours, by_load = (World(policy).play(arrivals) for policy in ("prefix-cost", "least-load"))
    assert ours.ttft <= by_load.ttft * 1.02
