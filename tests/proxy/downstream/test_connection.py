"""One client's connection against bytes of every kind: no process, no socket, a transport that remembers."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any, cast

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from proxy.downstream.framing import ChunkedBody, FramingError
from proxy.downstream.protocol import SERVICE, ClientProtocol, Reading
from proxy.downstream.request import ClientRequest
from proxy.downstream.service import ConnectionLimits, Service
from proxy.errors import ClientGoneError


class Transport(asyncio.Transport):
    """Remembers what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False
        self.is_paused = False
        self.sent_eof = False

    def write(self, data: Any) -> None:
        assert not self.is_closed
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.sent_eof = True

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("10.0.0.1", 5) if name == "peername" else default


class Config:
    """What of uvicorn's the protocol looks at."""

    is_ssl = False


class Unbounded:
    """Memory without a limit."""

    def add(self, size: int) -> None:
        del size


Handler = Callable[[ClientRequest], Coroutine[Any, Any, None] | None]


async def echo(request: ClientRequest) -> None:
    """Answers with what it got."""
    body = await request.body(10**6, Unbounded())
    got = {"method": request.method.decode(), "path": request.path, "body": body.decode("latin-1")}
    request.answer(200, [(b"content-type", b"application/json")], json.dumps(got).encode())


def refuse(request: ClientRequest) -> Coroutine[Any, Any, None] | None:
    """Answers on the head alone."""
    request.answer(401, [], b"no")
    return None


class Peer:
    """A connection and what its client does."""

    def __init__(self, handler: Handler = echo, **limits: float) -> None:
        service = Service({}, handler, ConnectionLimits(**limits))  # type: ignore[arg-type]
        self.state = ServerState()
        self.transport = Transport()
        self.connection = ClientProtocol(Config(), self.state, {SERVICE: service}, asyncio.get_running_loop())
        self.connection.connection_made(self.transport)

    async def send(self, data: bytes, turns: int = 8) -> None:
        if not self.transport.is_closed:
            self.connection.data_received(data)
        await settle(turns)

    def leave(self) -> None:
        self.transport.is_closed = True
        self.connection.connection_lost(None)

    @property
    def got(self) -> bytes:
        return self.transport.written


async def settle(turns: int = 8) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


def played(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))


def request(method: str = "POST", path: str = "/x", body: bytes = b"", *, chunks: int = 0, extra: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: h\r\n".encode() + extra
    if not chunks:
        return head + (b"Content-Length: %d\r\n\r\n" % len(body) if method == "POST" else b"\r\n") + body
    size = max(1, len(body) // chunks)
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\nX-Trailer: y\r\n\r\n"


def answers(data: bytes, methods: list[str]) -> list[tuple[int, bytes]]:
    """As another implementation of HTTP reads them."""
    found: list[tuple[int, bytes]] = []
    reader = h11.Connection(h11.CLIENT)
    reader.receive_data(data)
    for method in methods:
        reader.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        reader.send(h11.EndOfMessage())
        head, body = None, b""
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif not isinstance(event, h11.InformationalResponse):
                return found
        assert head is not None
        found.append((head.status_code, body))
        if reader.our_state is not h11.DONE or reader.their_state is not h11.DONE:
            return found
        reader.start_next_cycle()
    return found


REQUESTS = st.builds(
    lambda path, body, chunks: ("POST", path, body, chunks),
    st.sampled_from(["/x", "/v1/completions", "/a%20b?q=1"]),
    st.binary(max_size=60),
    st.integers(0, 4),
) | st.builds(lambda path: ("GET", path, b"", 0), st.sampled_from(["/health", "/"]))


@settings(max_examples=300)
@given(st.lists(REQUESTS, min_size=1, max_size=6), st.sets(st.integers(1, 900)), st.integers(0, 8), st.booleans())
def test_requests_are_answered_in_order_however_their_bytes_are_split(
    asked: list[tuple[str, str, bytes, int]], cuts: set[int], turns: int, early: bool
) -> None:
    """Pipelined too; by a handler that answers at once, and by one that waits for the body. `turns`: of the loop,
    between two pieces.
    """

    def at_once_if_it_may(given: ClientRequest) -> Coroutine[Any, Any, None] | None:
        return refuse(given) if early and given.method == b"GET" else echo(given)

    async def story() -> None:
        peer = Peer(at_once_if_it_may)
        whole = b"".join(request(m, p, b, chunks=c if b else 0) for m, p, b, c in asked)
        edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
        for start, end in pairwise(edges):
            await peer.send(whole[start:end], turns)
        for _ in asked:
            await settle()
        found = answers(peer.got, [method for method, *_ in asked])
        assert len(found) == len(asked)
        for (status, raw), (method, path, body, _) in zip(found, asked, strict=True):
            if early and method == "GET":
                assert (status, raw) == (401, b"no")
                continue
            echoed = json.loads(raw)
            assert (status, echoed["method"], echoed["body"]) == (200, method, body.decode("latin-1"))
            assert echoed["path"] == path.partition("?")[0].replace("%20", " ")
        assert not peer.state.tasks

    played(story)


@settings(max_examples=300)
@given(st.binary(max_size=80), st.sets(st.integers(1, 79)))
def test_garbage_never_hangs_never_raises_and_is_answered_at_most_once(garbage: bytes, cuts: set[int]) -> None:
    async def story() -> None:
        peer = Peer()
        edges = [0, *sorted(cut for cut in cuts if cut < len(garbage)), len(garbage)]
        for start, end in pairwise(edges):
            await peer.send(garbage[start:end])
        assert peer.got.count(b"HTTP/1.1 400 ") <= 1
        peer.leave()
        await settle()
        assert not peer.state.tasks
        assert not peer.state.connections

    played(story)


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=40), st.sampled_from([b"", b"HTTP", b"\x00", b"GET /"]))
def test_bytes_behind_a_request_never_touch_its_answer(garbage: bytes, start: bytes) -> None:
    """They are not even parsed before it is answered."""
    go_on = asyncio.Event

    async def story() -> None:
        gate = go_on()

        async def slow(given: ClientRequest) -> None:
            given.begin(200, [], b"first")
            await gate.wait()
            given.write(b"last")
            given.finish()

        peer = Peer(slow)
        await peer.send(request(body=b"x") + start + garbage)
        assert peer.got.endswith(b"5\r\nfirst\r\n")
        gate.set()
        await settle()
        assert b"5\r\nfirst\r\n4\r\nlast\r\n0\r\n\r\n" in peer.got

    played(story)


def test_one_request_at_most_is_read_ahead_and_a_flood_of_them_is_not_read_at_all() -> None:
    async def story() -> None:
        gate, begun = asyncio.Event(), list[str]()

        async def slow(given: ClientRequest) -> None:
            begun.append(given.path)
            await gate.wait()
            given.answer(200, [], b"")

        peer = Peer(slow)
        await peer.send(request("GET", "/1") + request("GET", "/2") * 5000)
        assert begun == ["/1"]
        assert peer.transport.is_paused
        gate.set()
        for _ in range(5001):
            await settle()
        assert peer.got.count(b"HTTP/1.1 200 OK") == 5001
        assert not peer.transport.is_paused

    played(story)


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_an_answer_before_the_body_closes_the_connection_and_parses_nothing_more(framing: bytes) -> None:
    async def story() -> None:
        peer = Peer(refuse)
        await peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\n" + framing)
        assert b"HTTP/1.1 401 Unauthorized\r\n" in peer.got
        assert b"connection: close" in peer.got
        assert peer.connection._reading is Reading.LINGERING
        assert peer.transport.sent_eof
        before = peer.got
        for _ in range(100):
            await peer.send(b"1\r\na\r\n" * 1000)
        assert peer.got == before
        await peer.send(b"x" * 5_000_000)
        assert peer.transport.is_closed

    played(story)


def test_an_answer_on_the_head_alone_keeps_the_connection_when_the_body_is_here_too() -> None:
    async def story() -> None:
        peer = Peer(refuse)
        await peer.send(request(body=b"abc"))
        await peer.send(request(body=b"abc"))
        assert peer.got.count(b"HTTP/1.1 401") == 2
        assert b"connection: close" not in peer.got

    played(story)


def test_a_client_that_was_refused_before_it_was_asked_to_send_is_not_read_as_another_request() -> None:
    """Else what it sends as its body would be the next request (a desync)."""

    async def story() -> None:
        peer = Peer(refuse)
        smuggled = request("GET", "/smuggled")
        await peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 60\r\n\r\n")
        await peer.send(smuggled)
        assert peer.got.count(b"HTTP/1.1 ") == 1

    played(story)


@pytest.mark.parametrize(("expected", "status"), [(b"100-continue", b"100"), (b"200-maybe", b"417"), (b"", b"417")])
def test_a_client_is_asked_for_its_body_only_when_somebody_wants_it(expected: bytes, status: bytes) -> None:
    async def story() -> None:
        peer = Peer()
        await peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: %b\r\nContent-Length: 2\r\n\r\n" % expected)
        assert peer.got.startswith(b"HTTP/1.1 %b " % status)

    played(story)


def test_trailers_are_dropped() -> None:
    async def story() -> None:
        seen: list[Any] = []

        async def note(given: ClientRequest) -> None:
            await given.body(100, Unbounded())
            seen.extend(given.headers)
            given.answer(200, [], b"")

        peer = Peer(note)
        head = b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        await peer.send(head + b"1\r\na\r\n0\r\nAuthorization: Bearer k\r\n\r\n")
        assert [name for name, _ in seen] == [b"host", b"transfer-encoding"]

    played(story)


def test_of_a_header_that_is_there_twice_everybody_sees_the_first() -> None:
    async def story() -> None:
        seen: list[bytes | None] = []

        def note(given: ClientRequest) -> None:
            seen.append(given.header(b"authorization"))
            given.answer(200, [], b"")

        peer = Peer(note)
        await peer.send(request("GET", extra=b"Authorization: one\r\nAuthorization: two\r\n"))
        assert seen == [b"one"]

    played(story)


def test_a_client_that_leaves_is_told_to_whoever_answers_it_and_only_to_that_one() -> None:
    async def story() -> None:
        left: list[str] = []

        async def wait(given: ClientRequest) -> None:
            given.on_gone = lambda: left.append(given.path)
            await asyncio.Event().wait()

        peer = Peer(wait)
        await peer.send(request("GET", "/1") + request("GET", "/2"))
        peer.leave()
        assert left == ["/1"]
        for task in tuple(peer.state.tasks):
            task.cancel()
        await settle()

    played(story)


def test_a_client_that_leaves_in_the_middle_of_its_body_ends_the_wait_for_it() -> None:
    async def story() -> None:
        ended: list[Exception] = []

        async def read(given: ClientRequest) -> None:
            try:
                await given.body(100, Unbounded())
            except ClientGoneError as exc:
                ended.append(exc)

        peer = Peer(read)
        await peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nabc")
        peer.leave()
        await settle()
        assert len(ended) == 1
        assert not peer.state.tasks

    played(story)


def test_a_body_that_nobody_reads_yet_is_not_taken_into_memory() -> None:
    async def story() -> None:
        gate = asyncio.Event()

        async def later(given: ClientRequest) -> None:
            await gate.wait()
            body = await given.body(10**7, Unbounded())
            given.answer(200, [], b"%d" % len(body))

        peer = Peer(later)
        await peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 100_000)
        paused = [peer.transport.is_paused]
        gate.set()
        await settle()
        paused.append(peer.transport.is_paused)
        assert paused == [True, False]
        await peer.send(b"x" * 900_000)
        assert peer.got.endswith(b"1000000")

    played(story)


@pytest.mark.parametrize(
    ("sent", "after_s", "answer"),
    [
        (b"", 2, b""),
        (b"POST /x", 2, b"HTTP/1.1 408 "),
        (request(body=b"abc")[:-2], 2, b"HTTP/1.1 408 "),
        (request("GET"), 2, b"HTTP/1.1 200 "),
    ],
    ids=["no byte", "half a head", "half a body", "between two requests"],
)
def test_who_does_not_go_on_loses_the_connection_in_time_and_not_before(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, after_s: float, answer: bytes
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    async def story() -> None:
        peer = Peer(head_s=1, body_s=1, keep_alive_s=60)
        await peer.send(sent)
        now[0] += 0.9
        peer.connection.check(now[0])
        before = peer.got
        assert not peer.transport.is_closed
        now[0] += after_s
        peer.connection.check(now[0])
        if answer == b"HTTP/1.1 200 ":
            assert not peer.transport.is_closed
            now[0] += 61
            peer.connection.check(now[0])
            assert peer.transport.is_closed
        else:
            assert (peer.got[len(before) :] or before).startswith(answer)
            assert peer.transport.is_closed or peer.connection._reading is Reading.LINGERING

    played(story)


def test_a_body_in_drops_may_not_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    async def story() -> None:
        peer = Peer(body_s=1)
        await peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(15):
            now[0] += 0.9
            await peer.send(b"x")
            peer.connection.check(now[0])
        assert peer.got.startswith(b"HTTP/1.1 408 ")

    played(story)


def test_too_many_connections_are_refused_and_not_kept() -> None:
    async def story() -> None:
        service = Service({}, echo, ConnectionLimits(connections=1))
        state = ServerState()
        made = []
        for _ in range(2):
            transport = Transport()
            connection = ClientProtocol(Config(), state, {SERVICE: service}, asyncio.get_running_loop())
            connection.connection_made(transport)
            made.append(transport)
        assert made[0].written == b""
        assert made[1].written.startswith(b"HTTP/1.1 503 ")

    played(story)


def test_nothing_can_be_written_into_an_answer_that_is_over() -> None:
    async def story() -> None:
        kept: list[ClientRequest] = []
        peer = Peer(kept.append)
        await peer.send(request("GET"))
        kept[0].answer(200, [], b"one")
        before = peer.got
        kept[0].answer(500, [], b"two")
        kept[0].write(b"three")
        kept[0].finish()
        kept[0].break_off()
        assert peer.got == before
        assert not peer.transport.is_closed

    played(story)


def test_a_status_that_nobody_knows_is_passed_on() -> None:
    async def story() -> None:
        peer = Peer(lambda given: given.answer(299, [], b"x"))
        await peer.send(request("GET"))
        assert answers(peer.got, ["GET"]) == [(299, b"x")]

    played(story)


# -- the body's framing


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=6), st.sets(st.integers(1, 300)), st.binary(max_size=9))
def test_a_chunked_body_is_the_same_however_it_is_split_and_what_follows_is_left(
    pieces: list[bytes], cuts: set[int], behind: bytes
) -> None:
    framed = b"".join(b"%X\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\na: b\r\n\r\n"
    body = ChunkedBody()
    got, rest = b"", b""
    edges = [0, *sorted(cut for cut in cuts if cut < len(framed)), len(framed)]
    for start, end in pairwise(edges):
        content, rest = body.feed(framed[start:end] + (behind if end == len(framed) else b""))
        got += content
    assert (got, rest, body.is_complete) == (b"".join(pieces), behind, True)


@pytest.mark.parametrize(
    "framed",
    [
        b"g\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"\r\n", b"1\na\r\n", b"1\r\nab\r\n", b"1\r\na\n\r\n",
        b"1\r\na0\r\n", b"1" * 300, b"fffffffffffffffff\r\n", b"1;" + b"e" * 300 + b"\r\n", b"1\r\r\na\r\n",
        b"1\r\na\r\n0\r\n" + b"t: x\r\n" * 3000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 3, 100_000])
def test_a_body_that_two_readers_could_read_in_two_ways_is_an_error(framed: bytes, step: int) -> None:
    def fed() -> None:
        body = ChunkedBody()
        for at in range(0, len(framed), step):
            body.feed(framed[at : at + step])

    with pytest.raises(FramingError):
        fed()


def test_chunks_of_a_byte_each_are_an_error_when_there_are_many() -> None:
    with pytest.raises(FramingError, match="too small"):
        ChunkedBody().feed(b"1\r\na\r\n" * 10_000)


def test_the_protocol_says_what_it_is_waiting_for() -> None:
    async def story() -> None:
        peer = Peer(lambda _: None)
        assert "idle" in repr(peer.connection)
        await peer.send(request(body=b"abc")[:-1])
        assert "body, /x" in repr(peer.connection)
        cast("Any", peer.connection)._close()

    played(story)


def test_what_comes_just_as_an_answer_ends_is_read_behind_what_was_held() -> None:
    """Else the body of a request whose head was held would be read as a request of its own."""

    async def story() -> None:
        asked: list[str] = []
        goes_on = asyncio.Event()

        async def answer(given: ClientRequest) -> None:
            asked.append(given.path)
            if given.path == "/a":
                await goes_on.wait()
            await echo(given)

        peer = Peer(answer)
        smuggled = request("POST", "/smuggled")
        await peer.send(request("POST", "/a") + request("POST", "/b", smuggled)[: -len(smuggled)])
        goes_on.set()
        for _ in range(20):
            await asyncio.sleep(0)
            if b"200" in peer.got:
                break
        await peer.send(smuggled)
        await settle()
        assert asked == ["/a", "/b"]
        assert [status for status, _ in answers(peer.got, ["POST", "POST"])] == [200, 200]

    played(story)


def test_a_client_that_was_refused_is_told_nothing_more() -> None:
    """A handler may answer whatever it makes of a body that ended in an error."""

    async def story() -> None:
        async def stubborn(given: ClientRequest) -> None:
            try:
                await echo(given)
            except ClientGoneError:
                given.answer(500, [], b"what happened?")

        peer = Peer(stubborn)
        await peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(b"no chunk\r\n")
        assert peer.got.startswith(b"HTTP/1.1 400")
        assert b"500" not in peer.got

    played(story)


def test_a_client_that_goes_on_taking_keeps_a_connection_that_is_closing() -> None:
    async def story() -> None:
        peer = Peer(stall_s=10)
        sizes = iter([5000, 4000, 3000, 3000, 3000])
        peer.transport.get_write_buffer_size = lambda: next(sizes)  # type: ignore[method-assign]
        aborted: list[bool] = []
        peer.transport.abort = lambda: aborted.append(True)  # type: ignore[method-assign]
        peer.transport.is_closed = True
        for now, is_aborted in ((100, False), (109, False), (118, False), (127, False), (129, True)):
            peer.connection.check(now)
            assert bool(aborted) is is_aborted

    played(story)
