"""Every way an attempt can go, with scripted nodes: each hand-off is used once, and settled exactly once.

No processes and no clock. A node does what its script says, and the world keeps the truth: what each node has been
sent, and where KV is held. The client leaves, the request's time ends, or the proxy shuts down at any step.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engines.base import Gauges, NodeFacts, Rank, Role
from engines.openai.request import asked
from engines.topology import Node, Topology
from proxy.errors import (
    ClientGoneError,
    NodeBrokeOffError,
    NodeError,
    NodeTimeoutError,
    NodeUnreachableError,
    ProxyError,
)
from proxy.exchange import attempt, release
from proxy.exchange.fanout import exchange_for
from proxy.exchange.handoff import SETTLED, PinnedKV, State
from proxy.exchange.plane import DataPlane, Request
from proxy.exchange.presence import SEE_OFF_S, Presence
from proxy.exchange.record import Record
from proxy.exchange.release import Releaser
from proxy.exchange.retry import RetryBudget
from proxy.metrics import Metrics
from proxy.nodes.fleet import Fleet
from proxy.routing.decode import DecodeRouter
from proxy.routing.prefill import PrefillRouter
from proxy.routing.split import Split
from proxy.settings import ProxySettings
from proxy.upstream.client import NodeClosedError

PREFILL = (
    "holds", "stops", "refuses", "full", "fails", "wrong key", "no connection", "lost before it was read",
    "lost after it was read", "silent",
)  # fmt: skip
DECODE = (
    "answers", "dies in mid-stream", "error in mid-stream", "ends without its end", "refuses", "late refusal",
    "refuses before its engine", "error first", "dies before its first event", "begins with nonsense", "full",
    "queue full", "queue full at first event", "gateway", "fails", "wrong key", "no connection",
    "lost before it was read", "lost after it was read", "silent",
)  # fmt: skip
RELEASE = ("frees", "no connection", "lost after it was read", "full", "queue full", "gateway")
UNSENT = "no connection"
UNREAD = (
    UNSENT, "lost before it was read", "full", "queue full at first event", "wrong key", "refuses before its engine"
)  # fmt: skip
"""What the engine of a node has never heard of."""


def sse(body: Any) -> bytes:
    return b"data: " + (body if isinstance(body, bytes) else orjson.dumps(body)) + b"\n\n"


def token(number: int, finish: str | None = None, *, shows: bool) -> bytes:
    ids = [number] if shows else None
    choice = {"index": 0, "text": "x", "finish_reason": finish, "token_ids": ids}
    return sse({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


@dataclass
class World:
    """The truth: what nodes were sent and hold, and what is to happen when."""

    prefill: list[str]
    decode: list[str]
    release: list[str]
    disturb_at: int
    disturb: Callable[[], object] = lambda: None
    steps: int = 0
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(what, transfer_id): times it was written to a node's connection."""
    deadlines: list[tuple[str, Any]] = field(default_factory=list)
    """(what, its deadline) of each leg."""
    heard: Counter[tuple[str, str]] = field(default_factory=Counter)
    """... and times an engine heard of it."""
    held: set[str] = field(default_factory=set)
    """Ids of the hand-offs whose KV a prefill node holds."""

    async def step(self) -> None:
        """Some time passes; the disturbance may strike."""
        await asyncio.sleep(0)
        self.steps += 1
        if self.steps == self.disturb_at:
            self.disturb()
            await asyncio.sleep(0)

    @staticmethod
    def next(script: list[str], usual: str) -> str:
        return script.pop(0) if script else usual


class ScriptedAnswer:
    """A node's answer; its chunks are bytes, or an error to raise."""

    def __init__(self, world: World, status: int, chunks: Iterable[bytes | Exception], *, is_stream: bool) -> None:
        self._world = world
        self._chunks = list(chunks)
        self.status = status
        kind = b"text/event-stream" if is_stream else b"application/json"
        self.headers = [(b"content-type", kind)]

    async def chunk(self, deadline: Any = None) -> bytes:
        del deadline
        await self._world.step()
        if not self._chunks:
            return b""
        found = self._chunks.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def hold(self) -> None:
        """Deadlines are no part of this world."""

    async def load(self) -> bytes:
        return b"".join([piece async for piece in self._pieces()])

    async def _pieces(self) -> Any:
        while piece := await self.chunk():
            yield piece

    def close(self) -> None:
        self._chunks.clear()


class ScriptedClient:
    """The connections to one node."""

    def __init__(self, world: World, role: Role) -> None:
        self._world = world
        self._role = role

    async def request(self, *given: Any, deadline: Any, on_sent: Callable[[], None] = lambda: None) -> ScriptedAnswer:
        body = orjson.loads(given[3])
        params = body.get("kv_transfer_params") or {}
        world, transfer_id = self._world, params.get("transfer_id", "")
        is_release = body.get("max_tokens") == 2**31 - 1
        what = "release" if is_release else self._role.value if transfer_id else "alone"
        script = {"release": world.release, "prefill": world.prefill, "decode": world.decode}.get(what, [])
        behaviour = world.next(script, {"release": "frees", "prefill": "holds"}.get(what, "answers"))
        if not body.get("stream"):  # only of a stream is anything refused after its 200
            behaviour = {"late refusal": "refuses", "queue full at first event": "queue full"}.get(behaviour, behaviour)
        await world.step()
        if behaviour == UNSENT:
            raise NodeUnreachableError("no connection")
        on_sent()
        world.sent[what, transfer_id] += 1
        world.deadlines.append((what, deadline))
        if behaviour not in UNREAD:
            world.heard[what, transfer_id] += 1
        await world.step()
        return self._answer(what, behaviour, transfer_id, body)

    def _answer(self, what: str, behaviour: str, transfer_id: str, body: dict[str, Any]) -> ScriptedAnswer:
        self._engine(what, behaviour, transfer_id)
        match behaviour:
            case "lost before it was read" | "lost after it was read":
                raise NodeClosedError("closed the connection without an answer")
            case "silent":
                raise NodeTimeoutError("did not answer", may_be_retried=what != "prefill")
            case "refuses" | "frees" | "refuses before its engine":
                kind = "Bad Request" if behaviour == "refuses before its engine" else "BadRequestError"
                return self._made(400, [orjson.dumps({"error": {"type": kind, "message": "no", "code": 400}})])
            case "full":
                return self._made(503, [orjson.dumps({"error": {"type": "ServiceUnavailable"}})])
            case "queue full":
                return self._made(503, [orjson.dumps({"error": {"type": "Service Unavailable"}})])
            case "gateway":
                return self._made(502, [b"<html>Bad Gateway</html>"])
            case "fails":
                return self._made(500, [orjson.dumps({"error": {"type": "InternalServerError"}})])
            case "wrong key":
                return self._made(401, [b"{}"])
        if what == "prefill":
            reason = "length" if behaviour == "holds" else "stop"
            choice = {"finish_reason": reason, "prompt_token_ids": [1, 2]}
            return self._made(200, [orjson.dumps({"choices": [choice], "usage": {"prompt_tokens": 2}})])
        if not body.get("stream"):
            return self._made(200, [orjson.dumps({"choices": [{"text": "xxx"}], "usage": {}})])
        return ScriptedAnswer(self._world, 200, self._stream(behaviour, body), is_stream=True)

    def _made(self, status: int, chunks: list[bytes]) -> ScriptedAnswer:
        return ScriptedAnswer(self._world, status, chunks, is_stream=False)

    @staticmethod
    def _stream(behaviour: str, body: dict[str, Any]) -> list[bytes | Exception]:
        broken = NodeBrokeOffError("closed the connection in the middle of its answer")
        failed = sse({"error": {"message": "EngineCore died", "code": 500}}) + sse(b"[DONE]")
        refused = sse({"error": {"message": "too many logprobs", "code": 400, "type": "BadRequestError"}})
        full = sse({"error": {"message": "too many waiting", "code": 503, "type": "Service Unavailable"}})
        most, shows = body["max_tokens"], bool(body.get("return_token_ids"))
        usage = sse({"id": "c", "created": 1, "model": "m", "choices": [], "usage": {"completion_tokens": most}})
        tokens = [token(number, shows=shows) for number in range(1, most)]
        streams: dict[str, list[bytes | Exception]] = {
            "answers": [b": keep-alive\n\n", *tokens, token(most, "length", shows=shows), usage, sse(b"[DONE]")],
            "dies in mid-stream": [*tokens, broken],
            "error in mid-stream": [*tokens, failed],
            "ends without its end": [*tokens],
            "late refusal": [refused],
            "queue full at first event": [b": keep-alive\n\n", full],
            "error first": [failed],
            "dies before its first event": [broken],
            "begins with nonsense": [sse({"model": "m"}), *tokens, token(most, "length", shows=shows), sse(b"[DONE]")],
        }
        return streams[behaviour]

    def _engine(self, what: str, behaviour: str, transfer_id: str) -> None:
        """What the engine does with KV, whoever hears of it."""
        held = self._world.held
        if what == "prefill" and behaviour in ("holds", "lost after it was read", "silent"):
            assert transfer_id not in held, "two requests under one id: the first one's KV is never freed"
            held.add(transfer_id)
        elif what in ("decode", "release") and behaviour not in (*UNREAD, "late refusal"):
            assert transfer_id in held, "a pull for what is not there keeps a sender task"
            held.discard(transfer_id)


class ScriptedClients:
    """Stands for `NodeClients`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def of(self, node: Any) -> ScriptedClient:
        return ScriptedClient(self._world, node.spec.role)


class FakeClient:
    """The client's side: what it got."""

    def __init__(self) -> None:
        self.started = False
        self.answers: list[int] = []
        self.got = b""
        self.is_whole = False

    def answer(self, status: int, headers: Any, body: bytes) -> None:
        del headers
        assert not self.started, "an answer into an answer"
        self.started, self.is_whole = True, True
        self.answers.append(status)
        self.got = body

    def begin(self, status: int, headers: Any, first: bytes) -> None:
        del headers
        assert not self.started, "two heads"
        self.started = True
        self.answers.append(status)
        self.got = first

    def write(self, chunk: bytes) -> None:
        assert self.started, "bytes before the head"
        assert not self.is_whole
        self.got += chunk

    async def drained(self, stall_s: float) -> None:
        del stall_s

    def finish(self) -> None:
        assert not self.is_whole
        self.is_whole = True

    async def relay(self, answer: Any, through: Any, *, silence_s: float, stall_s: float) -> None:
        del silence_s, stall_s
        while chunk := await answer.chunk():
            self.write(through.feed(chunk))
            if through.has_failed:
                raise NodeBrokeOffError("the node failed in the middle of its answer")
        if not through.is_done:
            raise NodeBrokeOffError("the node ended its stream before its end")
        self.finish()


class WatchedKV(PinnedKV):
    """Remembers every hand-off and how often it was settled."""

    all: list["WatchedKV"] = []  # noqa: RUF012
    __slots__ = ("settled",)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.settled: list[State] = []
        WatchedKV.all.append(self)

    def _move(self, before: State, after: State) -> None:
        super()._move(before, after)
        if self.state in SETTLED:
            self.settled.append(self.state)


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "PinnedKV", WatchedKV)
    monkeypatch.setattr(release, "_BETWEEN_TRIES_S", 0)


def fleet(version: str = "") -> Fleet:
    nodes = [
        Node(name=f"p{n}", role=Role.PREFILL, url=f"http://p:{n + 1}", bootstrap=f"http://p:{n + 100}")
        for n in range(2)
    ]
    nodes += [Node(name=f"d{n}", role=Role.DECODE, url=f"http://d:{n + 1}") for n in range(2)]
    made = Fleet(Topology(nodes=tuple(nodes)))
    for node in made:
        node.ready(
            (Rank(0, f"engine of {node.spec.name}"),),
            NodeFacts(({"id": "m", "max_model_len": 100},), Gauges(), version),
        )
    return made


@dataclass
class Outcome:
    """What is left when all is over."""

    world: World
    nodes: Fleet
    client: FakeClient
    metrics: Metrics
    error: BaseException | None
    presence: Presence
    budget: RetryBudget
    sequences: int
    record: Record


async def play(world: World, body: dict[str, Any], disturbance: str, nodes: Fleet | None = None) -> Outcome:
    WatchedKV.all.clear()
    nodes, metrics, client = nodes or fleet(), Metrics(), FakeClient()
    clients = cast("Any", ScriptedClients(world))
    releaser = Releaser(nodes, clients, metrics, [])
    budget = RetryBudget()
    budget._left = 5
    decodes = DecodeRouter(nodes)
    prefills = PrefillRouter("prefix-cost", nodes, decodes)
    plane = DataPlane(
        ProxySettings(),
        nodes,
        clients,
        metrics,
        releaser,
        budget,
        cast("Any", None),
        prefills,
        decodes,
        Split(is_wanted=False),
    )
    request = Request("/v1/completions", asked("/v1/completions", orjson.dumps(body)), "id", [])
    presences: list[Presence] = []
    record = Record("id", "/v1/completions")

    async def run() -> None:
        presence = Presence(60)
        presences.append(presence)
        await world.step()
        await exchange_for(plane, request, client, presence, record).run()

    task = asyncio.create_task(run())
    disturbances: dict[str, Callable[[], object]] = {
        "client leaves": lambda: presences[0].end("client-left"),
        "deadline": lambda: presences[0].end("late"),
        "shutdown": task.cancel,
        "decode node dies": lambda: next(n for n in nodes.of(Role.DECODE) if n.in_flight).failed("gone"),
        "all decode nodes are drained": lambda: drain(nodes.of(Role.DECODE)),
        "nothing": lambda: None,
    }
    world.disturb = disturbances[disturbance]
    error: BaseException | None = None
    try:
        await task
    except (ProxyError, ClientGoneError, asyncio.CancelledError) as exc:
        error = exc
    with suppress(TimeoutError):
        await releaser.close(within_s=5)
    sequences = body.get("n", 1) * (len(body["prompt"]) if isinstance(body["prompt"], list) else 1)
    return Outcome(world, nodes, client, metrics, error, presences[0], budget, sequences, record)


def drain(nodes: Iterable[Any]) -> None:
    for node in nodes:
        node.spec = node.spec.model_copy(update={"drain": True})


def check(outcome: Outcome, disturbance: str) -> None:
    world = outcome.world
    for kv in WatchedKV.all:
        assert len(kv.settled) == 1, kv
        assert world.sent["prefill", kv.id or ""] <= 1, "a prefill was sent twice under one id"
        assert world.sent["decode", kv.id or ""] <= 1, "a hand-off was sent to a decode node twice"
        assert world.heard["release", kv.id or ""] <= 1, "a release was heard twice"
        match kv.state:
            case State.TAKEN | State.REFUSED:
                assert world.heard["decode", kv.id or ""] == 1
                assert kv.id not in world.held
            case State.NOT_HELD:
                assert kv.id not in world.held
            case State.GIVEN_BACK:
                assert kv.id not in world.held or not world.heard["release", kv.id or ""]
    settled = Counter(kv.state.value for kv in WatchedKV.all if kv.state is not State.NOT_HELD)
    assert outcome.metrics.hand_offs.values == settled
    assert [(node.in_flight, node.held) for node in outcome.nodes] == [(0, 0)] * 4
    told = outcome.record.stages
    assert [stage for stage in told if not stage.ended >= stage.began > 0] == []
    assert Counter(stage.kv for stage in told if stage.name == "prefill" and stage.kv) == Counter(
        kv.state.value for kv in WatchedKV.all if kv.stage is not None
    )
    assert not any(node.breaker.has_trial for node in outcome.nodes)
    assert outcome.metrics.releases_pending == 0
    assert len(outcome.client.answers) <= 1
    if disturbance == "nothing" or world.steps < world.disturb_at:
        assert outcome.client.is_whole or isinstance(outcome.error, ProxyError), "nobody was told anything"
    if outcome.client.is_whole and outcome.client.answers == [200] and b"data:" in outcome.client.got:
        assert outcome.client.got.endswith(b"data: [DONE]\n\n")
        events = [event for event in outcome.client.got.split(b"\n\n") if b'"text":"x"' in event]
        indices = Counter(orjson.loads(event.removeprefix(b"data: "))["choices"][0]["index"] for event in events)
        assert indices == dict.fromkeys(range(outcome.sequences), 3), "the stream is not the three tokens of each"
        assert b'token_ids":[' not in outcome.client.got


BODIES = st.sampled_from(
    [
        {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m"},
        {"prompt": "x", "max_tokens": 3, "model": "m"},
        {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m", "stop": "y"},
        {"prompt": "x", "max_tokens": 3, "model": "m", "tools": [{}]},
        {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m", "stream_options": {"include_usage": True}},
        {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m", "n": 2, "temperature": 1},
        {"prompt": ["x", "y"], "max_tokens": 3, "model": "m"},
        {"prompt": ["x", "y"], "max_tokens": 3, "stream": True, "model": "m", "stop": "y"},
    ]
)
DISTURBANCES = st.sampled_from(["nothing", "client leaves", "deadline", "shutdown"])


@settings(max_examples=1500)
@given(
    st.lists(st.sampled_from(PREFILL), max_size=3),
    st.lists(st.sampled_from(DECODE), max_size=4),
    st.lists(st.sampled_from(RELEASE), max_size=3),
    BODIES,
    DISTURBANCES,
    st.integers(1, 40),
)
def test_each_hand_off_goes_to_each_node_once_and_is_settled_exactly_once(  # noqa: PLR0913, PLR0917
    prefill: list[str], decode: list[str], releases: list[str], body: dict[str, Any], disturbance: str, at: int
) -> None:
    world = World(list(prefill), list(decode), list(releases), at if disturbance != "nothing" else -1)
    check(asyncio.run(play(world, dict(body), disturbance)), disturbance)
    for kv in WatchedKV.all:
        event(f"settled as {kv.state}")


@pytest.mark.parametrize("disturbance", ["client leaves", "deadline", "shutdown"])
@pytest.mark.parametrize("behaviour", DECODE)
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
def test_whatever_a_decode_node_does_the_client_may_go_at_every_step(
    prompt: str | list[str], behaviour: str, disturbance: str
) -> None:
    """Hypothesis draws; here none is left out."""
    body = {"prompt": prompt, "max_tokens": 3, "stream": True, "model": "m"}
    for at in range(1, 70):
        world = World([], [behaviour], [], at)
        outcome = asyncio.run(play(world, dict(body), disturbance))
        check(outcome, disturbance)
        if world.steps < at:
            break
    else:
        pytest.fail("it never came to an end")


def test_every_request_pays_into_the_budget_of_retries_and_a_retry_takes_from_it() -> None:
    body = {"prompt": "x", "max_tokens": 3, "model": "m"}
    assert asyncio.run(play(World([], [], [], -1), dict(body), "nothing")).budget._left > 5
    assert asyncio.run(play(World(["silent", "fails"], [], [], -1), dict(body), "nothing")).budget._left > 5
    assert asyncio.run(play(World(["lost after it was read"], [], [], -1), dict(body), "nothing")).budget._left < 5


def test_a_deadline_answers_the_client_and_lets_a_prefill_end() -> None:
    """What it leaves is given back; cut off, it would have left KV that nobody knows of."""
    world = World([], [], [], 3)
    outcome = asyncio.run(play(world, {"prompt": "x", "stream": True, "model": "m"}, "deadline"))
    assert [kv.state for kv in WatchedKV.all] == [State.GIVEN_BACK]
    assert outcome.presence.gone == "late"
    assert not world.held


def test_of_a_decode_node_that_takes_no_connection_another_gets_the_same_hand_off() -> None:
    world = World([], ["no connection"], [], -1)
    outcome = asyncio.run(play(world, {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m"}, "nothing"))
    assert outcome.client.is_whole
    assert [kv.state for kv in WatchedKV.all] == [State.TAKEN]
    assert sum(count for (what, _), count in world.sent.items() if what == "prefill") == 1
    assert outcome.metrics.retries.values == {}


def test_a_decode_node_that_dies_while_the_prefill_runs_costs_no_second_prefill() -> None:
    """No decode node has seen the hand-off, so nothing binds it to the one that was chosen first."""
    world = World([], [], [], 3)
    body = {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m"}
    outcome = asyncio.run(play(world, body, "decode node dies"))
    assert outcome.client.is_whole
    assert [kv.state for kv in WatchedKV.all] == [State.TAKEN]
    assert outcome.metrics.retries.values == {}
    assert sorted(node.hand_offs for node in outcome.nodes.of(Role.DECODE)) == [0, 1]
    assert next(node for node in outcome.nodes.of(Role.DECODE) if node.hand_offs).usable


@pytest.mark.parametrize("at", range(2, 9))
def test_what_is_inside_when_decode_nodes_are_drained_is_finished_and_given_back_if_it_must_be(at: int) -> None:
    body = {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m"}
    outcome = asyncio.run(play(World([], [], [], at), dict(body), "all decode nodes are drained"))
    assert outcome.client.is_whole
    assert [kv.state for kv in WatchedKV.all] == [State.TAKEN]
    outcome = asyncio.run(play(World([], ["full"], [], at), dict(body), "all decode nodes are drained"))
    assert not outcome.world.held


def test_a_full_queue_has_freed_the_hand_off_and_what_a_gateway_says_tells_nothing_of_it() -> None:
    """VLLM answers a refused hand-off with an empty pull; one more pull would keep a prefill node's sender task."""
    body = {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m"}
    for behaviour, state in (
        ("queue full", State.REFUSED),
        ("gateway", State.UNKNOWN),
        ("queue full at first event", State.GIVEN_BACK),
    ):
        outcome = asyncio.run(play(World([], [behaviour], [], -1), dict(body), "nothing"))
        assert outcome.client.answers == [200]
        assert [kv.state for kv in WatchedKV.all] == [state, State.TAKEN]
        assert not outcome.world.held


def test_a_continuation_holds_no_lease_of_the_node_it_lost() -> None:
    """While the stream goes on elsewhere, nothing runs on the node that was lost."""
    seen: list[list[int]] = []
    world = World([], ["dies in mid-stream"], [], -1)
    scripted = world.next

    def spied(script: list[str], usual: str) -> str:
        if world.sent.total() >= 2:  # the second prefill, that of the continuation
            seen.append([node.in_flight for node in fleets[0].of(Role.DECODE)])
        return scripted(script, usual)

    fleets: list[Fleet] = []
    world.next = spied  # type: ignore[method-assign]
    made = fleet()
    fleets.append(made)
    body = {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m"}
    outcome = asyncio.run(play(world, body, "nothing", made))
    assert outcome.client.is_whole
    assert outcome.metrics.resumed.values == {"done": 1}
    assert [1, 1] not in seen


def test_a_prefill_nodes_refusal_of_our_body_is_not_the_clients() -> None:
    """The client's own body goes to one node, whose answer is the client's."""
    world = World(["refuses"], [], [], -1)
    outcome = asyncio.run(play(world, {"prompt": "x", "max_tokens": 3, "model": "m"}, "nothing"))
    assert outcome.client.answers == [200]
    assert world.sent["alone", ""] == 1
    assert [kv.state for kv in WatchedKV.all] == [State.NOT_HELD]


def test_an_error_knows_whether_the_node_may_have_the_request() -> None:
    assert not NodeUnreachableError("x").maybe_received
    assert NodeClosedError("x").maybe_received
    assert NodeError("x").source == "node"


@pytest.mark.parametrize("behaviour", ["answers", "silent", "late refusal"])
def test_where_an_abort_in_the_queue_is_fatal_a_leg_is_not_cut_for_a_client_that_leaves(behaviour: str) -> None:
    """Before vLLM 0.32. Until its first event nobody knows whether a request waits in the queue."""
    cut: dict[str, bool] = {}
    for version in ("0.31.0", "0.32.0"):
        for at in range(1, 30):
            world = World([], [behaviour], [], at)
            body = {"prompt": "x", "max_tokens": 3, "stream": True, "model": "m"}
            check(asyncio.run(play(world, body, "client leaves", fleet(version))), "client leaves")
            cut[version] = cut.get(version, False) or any(
                deadline.at - time.monotonic() <= SEE_OFF_S for what, deadline in world.deadlines if what == "decode"
            )
    assert cut == {"0.31.0": False, "0.32.0": True}
