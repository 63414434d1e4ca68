"""The hot path's HTTP client, against servers that misbehave on purpose."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import (
    ClientStalledError,
    NodeBrokeOffError,
    NodeError,
    NodeTimeoutError,
    NodeUnreachableError,
)
from proxy.upstream.client import Answer, NodeClient, NodeClosedError, Sink
from proxy.upstream.deadline import Deadline
from proxy.upstream.framing import are_whole_events
from tests.processes import free_port

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[NodeClient]:
    """A client of a server that does what `handler` does with each connection."""
    handling: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.add(asyncio.current_task())
        try:
            await handler(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    client = NodeClient("node-0", f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", connect_timeout_s=5)
    try:
        yield client
    finally:
        client.close()
        listener.close()
        await asyncio.wait_for(asyncio.gather(*filter(None, handling), return_exceptions=True), 30)
        while client.open_connections:
            await asyncio.sleep(0)


def answering(*pieces: bytes, close: bool = False) -> Handler:
    """Answers every request of a connection with these bytes, written piece by piece."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await read_request(reader):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    break
        except ConnectionError:
            pass
        writer.close()

    return handle


async def read_request(reader: asyncio.StreamReader) -> bytes:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return head + await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


async def ask(client: NodeClient, body: bytes = b"{}") -> Answer:
    return await asyncio.wait_for(
        client.request(b"POST", b"/x", [(b"x-a", b"b")], body, deadline=Deadline(30, "answer")), 30
    )


async def ask_whole(client: NodeClient) -> tuple[int, bytes]:
    answer = await ask(client)
    return answer.status, await asyncio.wait_for(answer.load(), 30)


def run(handler: Handler, times: int = 1) -> list[tuple[int, bytes]]:
    async def main() -> list[tuple[int, bytes]]:
        async with server(handler) as client:
            return [await ask_whole(client) for _ in range(times)]

    return asyncio.run(main())


@pytest.mark.parametrize("answer", [OK, CHUNKED])
def test_a_body_arrives_whole(answer: bytes) -> None:
    assert run(answering(answer), times=3) == [(200, b"hello world" if answer is CHUNKED else b"hello")] * 3


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(1, len(CHUNKED) - 1)))
def test_it_does_not_matter_how_an_answer_is_split_over_packets(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(CHUNKED)]
    pieces = [CHUNKED[start:end] for start, end in pairwise(edges)]
    assert run(answering(*pieces)) == [(200, b"hello world")]


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_a_node_error_and_never_a_hang(garbage: bytes) -> None:
    async def main() -> None:
        async with server(answering(garbage, close=True)) as client:
            try:
                await ask_whole(client)
            except NodeError:
                return

    asyncio.run(main())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_is_said_to_be_that(garbage: bytes) -> None:
    with pytest.raises(NodeError, match=r"node node-0 sent something that is not HTTP/1\.1"):
        run(answering(garbage))


@pytest.mark.parametrize("status", [b"100 Continue", b"102 Processing", b"103 Early Hints"])
def test_interim_answers_are_skipped(status: bytes) -> None:
    assert run(answering(b"HTTP/1.1 " + status + b"\r\n\r\n", OK), times=2) == [(200, b"hello")] * 2


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    assert run(answering(b"HTTP/1.1 200 OK\r\n\r\nhello", close=True), times=2) == [(200, b"hello")] * 2


def test_an_answer_without_a_body_is_one() -> None:
    assert run(answering(b"HTTP/1.1 204 No Content\r\n\r\n"), times=2) == [(204, b"")] * 2


@pytest.mark.parametrize(
    "cut",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ],
)
def test_an_answer_that_is_cut_off_is_never_taken_for_whole(cut: bytes) -> None:
    with pytest.raises(NodeBrokeOffError, match="in the middle of its answer"):
        run(answering(cut, close=True))


def test_a_connection_is_kept_for_the_next_request() -> None:
    connections = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await answering(OK)(reader, writer)

    assert len(run(handle, times=3)) == 3
    assert len(connections) == 1


def test_a_node_that_says_close_is_not_asked_on_that_connection_again() -> None:
    closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello"
    assert run(answering(closing, close=True), times=3) == [(200, b"hello")] * 3


def one_answer_a_connection(requests: list[bytes]) -> Handler:
    """The node answers one request a connection, and closes when the next one has come, without a byte."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(OK)
        requests.append(await read_request(reader))
        writer.close()

    return handle


def test_a_request_whose_kept_connection_closes_without_an_answer_is_not_sent_again() -> None:
    """The node may have it (RFC 9110 section 9.2.2): however many connections are kept, it is sent once."""
    requests: list[bytes] = []

    async def main() -> None:
        async with server(one_answer_a_connection(requests)) as client:
            await asyncio.gather(*(ask_whole(client) for _ in range(20)))
            with pytest.raises(NodeClosedError) as caught:
                await ask(client, b'{"n": 2}')
            assert caught.value.maybe_received

    asyncio.run(main())
    assert sum(b'{"n": 2}' in request for request in requests) == 1


def test_a_kept_connection_that_is_closed_already_is_passed_over() -> None:
    """Nothing was written to it, so nothing can have been received."""

    async def main() -> None:
        async with server(answering(OK, close=True)) as client:
            for _ in range(3):
                assert await ask_whole(client) == (200, b"hello")
                while client.open_connections:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_probe_whose_kept_connection_closes_is_asked_again_on_a_new_one() -> None:
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            if len(requests) % 3 != 2:
                writer.write(OK)
        writer.close()

    async def main() -> None:
        async with server(handle) as client:
            for _ in range(2):
                answer = await client.get(b"/health", [], Deadline(30, "answer"))
                assert await answer.load() == b"hello"

    with suppress(asyncio.IncompleteReadError):
        asyncio.run(main())
    assert len(requests) == 3


@pytest.mark.parametrize("status", [b"600", b"999"])
def test_a_status_that_is_none_of_http_is_said_to_be_that(status: bytes) -> None:
    with pytest.raises(NodeError, match=r"not HTTP/1\.1"):
        run(answering(b"HTTP/1.1 " + status + b" What\r\ncontent-length: 0\r\n\r\n"))


def test_a_fresh_connection_closed_without_an_answer_is_an_error() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.close()

    with pytest.raises(NodeError, match="without an answer"):
        run(handle)


def test_an_answer_that_has_begun_is_not_asked_for_again() -> None:
    requests = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
        await writer.drain()
        writer.close()

    with pytest.raises(NodeError, match="in the middle of its answer's head"):
        run(handle)
    assert len(requests) == 1


def test_bytes_nobody_asked_for_do_not_become_the_next_answer() -> None:
    assert run(answering(OK + b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"), times=2) == [(200, b"hello")] * 2


EVENTS = [b"data: %d\n\n" % n * (1 + n % 3) for n in range(6)]
STREAM = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS) + b"0\r\n\r\n"


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(1, len(STREAM) - 1)), st.integers(0, 3), st.booleans())
def test_a_relayed_stream_is_the_same_however_it_is_split(cuts: set[int], unwanted: int, read_first: bool) -> None:
    """Whole chunks pass without being parsed; the parser must find its place again whenever some are not wanted."""
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in pairwise(edges)]
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    got: list[bytes] = []
    ends: list[bool] = []

    def in_frames(data: bytes) -> bytes | None:
        return None if len(got) % 4 < unwanted or not are_whole_events(data) else data

    def pass_on(data: bytes) -> None:
        parser = httptools.HttpResponseParser(Body(got))
        parser.feed_data(head + data)

    def write(pieces: Sequence[bytes], *, ended: bool) -> None:
        got.extend(pieces)
        ends.append(ended)

    async def main() -> None:
        async with server(answering(head, *pieces)) as client:
            for _ in range(2):  # the second on the same connection
                got.clear()
                answer = await ask(client)
                if read_first:
                    got.append(await answer.chunk())
                await answer.pipe(Sink(write, (in_frames, pass_on), Deadline(30, "answer"), silence_s=30, stall_s=30))
                assert b"".join(got) == b"".join(EVENTS)
            assert client.open_connections == 1
            assert ends.count(True) == 2

    asyncio.run(main())


class Body:
    """Collects what a parser finds in a body."""

    def __init__(self, into: list[bytes]) -> None:
        self.on_body = into.append


def test_a_connection_whose_reader_left_it_stopped_serves_the_next_one() -> None:
    async def main() -> None:
        async with server(answering(CHUNKED)) as client:
            for _ in range(2):
                answer = await ask(client)

                def stop(_: Sequence[bytes], *, ended: bool, answer: Answer = answer) -> None:  # noqa: ARG001
                    answer.pause()

                await answer.pipe(Sink(stop, None, Deadline(30, "answer"), silence_s=30, stall_s=30))
            assert (await ask_whole(client))[1] == b"hello world"

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", OK[:20], CHUNKED[:-20]], ids=["nothing", "half a head", "half a body"])
def test_a_node_that_goes_no_further_is_given_up_at_the_deadline(sent: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)
        await reader.read()

    async def main() -> None:
        async with server(handle) as client:
            answer = await client.request(b"POST", b"/x", [], b"{}", deadline=Deadline(0.3, "come to an end"))
            try:
                await answer.load()
            finally:
                answer.close()

    with pytest.raises(NodeTimeoutError, match=r"node node-0 did not come to an end in 0\.3 s"):
        asyncio.run(asyncio.wait_for(main(), 30))


def test_a_deadline_can_be_brought_forward_under_a_waiting_request() -> None:
    async def handle(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with server(handle) as client:
            deadline = Deadline(600, "answer")
            asking = asyncio.create_task(client.request(b"POST", b"/x", [], b"{}", deadline=deadline))
            await asyncio.sleep(0.1)
            deadline.within(0.1)
            await asking

    with pytest.raises(NodeTimeoutError):
        asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("stopped", [False, True], ids=["a silent node", "a stopped reader"])
def test_a_stream_that_stands_still_is_given_up(stopped: bool) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED[:-5])
        await reader.read()

    async def main() -> None:
        async with server(handle) as client:
            answer = await ask(client)
            if stopped:
                answer.pause()
            limits = {"silence_s": 600.0, "stall_s": 0.2} if stopped else {"silence_s": 0.2, "stall_s": 600.0}
            try:
                await answer.pipe(Sink(lambda _, ended: None, None, Deadline(600, "answer"), **limits))  # noqa: ARG005
            finally:
                answer.close()

    error = ClientStalledError if stopped else NodeTimeoutError
    with pytest.raises(error, match=r"0\.2 s"):
        asyncio.run(asyncio.wait_for(main(), 30))


def test_a_closed_port_is_said_to_be_one() -> None:
    async def main() -> None:
        client = NodeClient("node-0", f"http://127.0.0.1:{free_port()}", connect_timeout_s=5)
        await ask(client)

    with pytest.raises(NodeError, match="node node-0 cannot be reached: Connect"):
        asyncio.run(main())


def test_the_addresses_of_a_name_are_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is `::1` first on many machines, and nodes listen on `127.0.0.1`."""

    def both(_: object, port: int, *__: object, **___: object) -> list[tuple[object, ...]]:
        of = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(socket.AF_INET6, *of, ("::1", port, 0, 0)), (socket.AF_INET, *of, ("127.0.0.1", port))]

    async def main() -> tuple[int, bytes]:
        async with server(answering(OK)) as reached:
            named = NodeClient("node-0", f"http://both.test:{reached._port}", connect_timeout_s=5)
            monkeypatch.setattr(socket, "getaddrinfo", both)
            try:
                return await ask_whole(named)
            finally:
                named.close()

    assert asyncio.run(main()) == (200, b"hello")


def test_a_port_that_takes_no_connection_is_given_up() -> None:
    """A listener whose queue is full lets a connect hang."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
            port = listener.getsockname()[1]
            fillers = []
            for _ in range(8):
                filler = socket.socket()
                filler.setblocking(False)  # noqa: FBT003
                filler.connect_ex(("127.0.0.1", port))
                fillers.append(filler)
            try:
                await ask(NodeClient("node-0", f"http://127.0.0.1:{port}", connect_timeout_s=0.2))
            finally:
                for filler in fillers:
                    filler.close()

    with pytest.raises(NodeUnreachableError, match="took no connection"):
        asyncio.run(main())


def test_closing_an_answer_early_closes_its_connection() -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED[:-5])
        await writer.drain()
        assert await reader.read() == b""
        closed.set()
        writer.close()

    async def main() -> None:
        async with server(handle) as client:
            answer = await ask(client)
            assert await answer.chunk() != b""
            answer.close()
            await asyncio.wait_for(closed.wait(), 30)
            assert client.open_connections == 0

    asyncio.run(main())


def test_what_is_not_read_is_not_taken_from_the_node() -> None:
    """Without back-pressure the whole of it would be in memory."""
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % 2**30)
        try:
            while sent < 2**30:
                writer.write(b"x" * 2**16)
                sent += 2**16
                await writer.drain()
        except ConnectionError:
            pass

    async def main() -> None:
        async with server(handle) as client:
            answer = await ask(client)
            before = -1
            while before != sent:  # until the sender is stopped
                before = sent
                await asyncio.sleep(0.2)
            assert sent < 32 * 2**20
            assert len(await answer.chunk()) > 0
            answer.close()

    asyncio.run(main())


def test_a_cancelled_request_leaves_no_connection() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()
        writer.close()

    async def main() -> None:
        async with server(handle) as client:
            request = asyncio.create_task(ask(client))
            while client.open_connections == 0:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await asyncio.sleep(0.05)
            assert client.open_connections == 0

    asyncio.run(main())


def test_an_answer_without_a_length_that_is_cut_off_here_is_not_whole() -> None:
    """Its end is the connection's end; ours must not be taken for the node's."""

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"half":')
        await reader.read()

    async def story() -> None:
        async with server(half) as client:
            answer = await client.request(b"POST", b"/", [], b"", deadline=Deadline(0.3, "answer"))
            with pytest.raises(NodeTimeoutError):
                await answer.load()

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_client_that_is_closed_makes_no_connections_any_more() -> None:
    async def story() -> None:
        async with server(answering(OK)) as client:
            await (await client.request(b"GET", b"/", [], b"", deadline=Deadline(5, "answer"))).load()
            client.close()
            with pytest.raises(NodeUnreachableError, match="no longer"):
                await client.request(b"GET", b"/", [], b"", deadline=Deadline(5, "answer"))

    asyncio.run(asyncio.wait_for(story(), 30))
