"""One client's connection, as the data plane uses it: uvicorn's protocol, plus what ASGI has no word for.

A stream that stops cleanly in the middle is taken for complete, and ASGI cannot end one abnormally. It has a coroutine
wake up for every chunk, another wait for the client to leave, and a system call each for an answer's head, its body
and its end. So the connection itself rides along in the scope: answers are written to it directly, chunks as they
come from the node, and it says when it is lost.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final, Literal, Protocol, cast

import httptools
import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from engines.openai.errors import error_body

from ..errors import BadRequestError, ClientGoneError, ClientStalledError, NodeBrokeOffError, ProxyError
from ..exchange.filters import Through
from ..upstream.client import Answer, Deadline, Sink

_CONNECTION: Final = "pd_proxy.connection"
_CYCLE: Final = "pd_proxy.cycle"
_END: Final = b"0\r\n\r\n"
_MOST_HEAD_BYTES: Final = 64 * 1024
_MOST_HEADERS: Final = 128
_OF_A_REQUEST: Final = frozenset({("1.1", 1), ("1.0", 1), ("1.0", 0)})
"""HTTP version and number of Host headers: RFC 9112 §3.2; the parser does not look."""
_OF_AN_UPGRADE: Final = frozenset({b"upgrade", b"connection", b"http2-settings"})
_LOOK_EVERY_S: Final = 1.0


class Source(Protocol):
    """What a client's answer comes from: stopped while the client takes no more."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class ClientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits; an application finds it in the scope."""

    source: Source | None = None
    on_lost: Callable[[], object] | None = None
    waits_for: Literal["head", "body"] | None = "head"
    """What of a request should come next."""
    since: float = 0.0
    """When a piece of it came last, or its connection; on the machine's monotonic clock."""
    all: ClassVar[set["ClientProtocol"]] = set()
    closing: ClassVar[bool] = False
    """Whether answers should be their connection's last: the process is about to end."""
    _has_begun = False
    _untaken = 0
    _untaken_since = 0.0
    _head_bytes = 0
    _refusal = (400, "BadRequestError", "this is not a valid HTTP request")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        self.since = time.monotonic()
        ClientProtocol.all.add(self)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        unread = memoryview(data)
        try:
            while (offset := self._parsed(unread)) is not None:
                unread = unread[offset:]
                self._begin_again_without_upgrade()
        except httptools.HttpParserError:
            self.send_400_response("")

    def _parsed(self, data: memoryview) -> int | None:
        """Where a request ends its head with the wish for another protocol; None when all is read."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            return int(exc.args[0])
        return None

    def _begin_again_without_upgrade(self) -> None:
        """Java's client asks every server for HTTP/2, by an Upgrade that may be ignored (RFC 9110 §7.8).

        The parser takes what follows for another protocol, so another parser is given the same head without it.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise httptools.HttpParserError("a tunnel")
        headers = [header for header in self.headers if header[0] not in _OF_AN_UPGRADE]
        if not self.parser.should_keep_alive():
            headers.append((b"connection", b"close"))
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%b %b HTTP/%b\r\n" % (method, self.url, version), *(b"%b: %b\r\n" % header for header in headers)]
        self.parser.feed_data(b"".join((*lines, b"\r\n")))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.waits_for, self.since, self._head_bytes, self._has_begun = "head", time.monotonic(), 0, True

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        version, hosts = self.parser.get_http_version(), sum(name == b"host" for name, _ in self.headers)
        if (version, hosts) not in _OF_A_REQUEST:
            raise ValueError("not a request of HTTP/1")  # ends the parsing
        super().on_headers_complete()
        self.scope[_CONNECTION] = self  # type: ignore[typeddict-unknown-key]
        self.scope[_CYCLE] = self.cycle  # type: ignore[typeddict-unknown-key]
        self.waits_for, self.since = "body", time.monotonic()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if not self.cycle.response_complete:  # who is answered, and goes on sending, is not heard for ever
            self.since = time.monotonic()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self.waits_for = None

    def abort_if_stalled(self, now: float, stall_s: float) -> None:
        """A client that takes nothing of what was written for it loses its connection."""
        untaken = self.transport.get_write_buffer_size()
        if untaken == 0 or untaken != self._untaken:
            self._untaken, self._untaken_since = untaken, now
        elif now - self._untaken_since > stall_s:
            self.transport.abort()

    def close_if_late(self, now: float, head_s: float, body_s: float) -> None:
        """A client that does not go on with its request loses its connection: whoever waits costs a socket."""
        if self._is_answering_an_earlier_one():
            self.since = now  # it is not read meanwhile
            return
        if self.waits_for is None or now - self.since <= (head_s if self.waits_for == "head" else body_s):
            return
        if not self._has_begun:
            self.transport.close()
        elif self.waits_for == "head" or not self.cycle.response_started:
            self._refusal = (408, "RequestTimeoutError", f"the request's {self.waits_for} did not come in time")
            self.send_400_response("")
        else:
            self.transport.close()  # it is answered, and goes on sending

    def _is_answering_an_earlier_one(self) -> bool:
        running = self.cycle is not None and not self.cycle.response_complete
        return bool(self.pipeline) or (running and self.waits_for == "head")

    def send_400_response(self, msg: str) -> None:
        """In OpenAI's shape, and with the status of what is wrong."""
        del msg
        status, kind, message = self._refusal
        body = orjson.dumps(error_body(message, kind, status))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > _MOST_HEAD_BYTES or len(self.headers) > _MOST_HEADERS:
            limits = f"{_MOST_HEAD_BYTES} bytes and {_MOST_HEADERS} headers"
            self._refusal = (431, "RequestHeaderFieldsTooLargeError", f"a request's head has at most {limits}")
            raise ValueError("head too large")  # ends the parsing; uvicorn then calls send_400_response

    def connection_lost(self, exc: Exception | None) -> None:
        ClientProtocol.all.discard(self)
        super().connection_lost(exc)
        if self.source is not None:
            self.source.pause()  # nothing may be written any more
        if self.on_lost is not None:
            self.on_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.source is not None:
            self.source.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.source is not None:
            self.source.resume()


async def close_the_late(head_s: float, body_s: float, stall_s: float) -> None:
    """Look at all connections, for ever."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        now = time.monotonic()
        for connection in tuple(ClientProtocol.all):
            connection.close_if_late(now, head_s, body_s)
            connection.abort_if_stalled(now, stall_s)


class BodyTooLargeError(ProxyError):
    """Refused while it is being read: no more than the limit is ever held."""

    status = 413
    kind = "RequestEntityTooLargeError"


class ClientConnection:
    """One request's way in and one answer's way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del send  # answers are written to the connection
        self._receive = receive
        self._headers = dict(scope["headers"])
        self._connection: ClientProtocol = scope[_CONNECTION]
        self._cycle: Any = scope[_CYCLE]
        self._framed = (
            scope["http_version"] != "1.0"
        )  # HTTP/1.0 knows no chunked coding: a body ends with the connection
        self.started = False
        self.is_gone = False

    async def body(self, most_bytes: int) -> bytes:
        """The whole request body. Raises BodyTooLargeError, or ClientGoneError."""
        chunks: list[bytes] = []
        size = 0
        told = self.header(b"content-length") or b"0"
        if int(told) > most_bytes:
            raise BodyTooLargeError(f"the request body is larger than {most_bytes} bytes")
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > most_bytes:
                raise BodyTooLargeError(f"the request body is larger than {most_bytes} bytes")
            if not message.get("more_body"):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def header(self, name: bytes) -> bytes | None:
        """A request header; `name` in lower case."""
        return self._headers.get(name)

    @contextmanager
    def calling_when_gone(self, left: Callable[[], object]) -> Iterator[None]:
        """Call `left` should the client close its connection meanwhile; `is_gone` is true then. Or ClientGoneError."""

        def lost() -> None:
            self.is_gone = True
            left()

        if self._connection.transport.is_closing():
            self.is_gone = True
            raise ClientGoneError
        self._connection.on_lost = lost
        try:
            yield
        finally:
            self._connection.on_lost = None

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer, in one write."""
        self._write(self._head(status, headers, b"content-length: %d\r\n" % len(body)), body)
        self._complete()

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None:
        """The head and the first bytes of an answer whose length nobody knows yet, in one write."""
        self._write(
            self._head(status, headers, b"transfer-encoding: chunked\r\n" if self._framed else b""), self._frame(first)
        )

    def write(self, chunk: bytes) -> None:
        """A chunk of an answer that has begun."""
        self._write(self._frame(chunk))

    async def relay(
        self, answer: Answer, deadline: Deadline, through: Through, *, silence_s: float, stall_s: float
    ) -> None:
        """The rest of a node's answer, each chunk written in the turn of the loop in which it came.

        A client that takes no more stops its node, and not for longer than `stall_s`. Raises NodeError, or
        ClientStalledError.
        """
        connection = self._connection

        def write(pieces: Sequence[bytes], *, ended: bool) -> Exception | None:
            self._take(through.feed(b"".join(pieces)), ended=ended and through.is_done and not through.has_failed)
            if through.has_failed:
                return NodeBrokeOffError("the node failed in the middle of its answer", "Its own log tells why")
            early = ended and not through.is_done
            return NodeBrokeOffError("the node ended its stream before its end") if early else None

        connection.source = answer
        if connection.flow.write_paused:
            answer.pause()
        try:
            frames = (through.in_frames, connection.transport.write) if self._framed else None
            await answer.pipe(Sink(write, frames, deadline, silence_s=silence_s, stall_s=stall_s))
        finally:
            connection.source = None
        self._complete()

    async def drained(self, stall_s: float) -> None:
        """Until the client can take more. Raises ClientStalledError when that takes longer than `stall_s`."""
        try:
            async with asyncio.timeout(stall_s):
                await self._connection.flow.drain()
        except TimeoutError as exc:
            raise ClientStalledError(f"the client took nothing for {stall_s:g} s") from exc

    def finish(self) -> None:
        """The end of an answer that `write` has written."""
        if self._framed:
            self._write(_END)
        self._complete()

    def break_off(self, *, at_once: bool) -> None:
        """End a begun answer so that nobody takes it for whole: close without the end of the body.

        `at_once`: without waiting for a client that takes nothing to take what is written already.
        """
        self._cycle.disconnected = True  # to uvicorn: that nothing more comes is no mistake
        if self._framed and not at_once:
            self._connection.transport.close()
        else:
            self._connection.transport.abort()

    def _take(self, data: bytes, *, ended: bool) -> None:
        self._write(self._frame(data), _END if ended and self._framed else b"")

    def _frame(self, chunk: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._framed and chunk else chunk

    def _head(self, status: int, headers: Iterable[tuple[bytes, bytes]], length: bytes) -> bytes:
        self.started = self._cycle.response_started = True
        lines = [STATUS_LINE[status]]
        lines += [b"%b: %b\r\n" % header for header in self._cycle.default_headers]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if ClientProtocol.closing:
            self._cycle.keep_alive = False
        if not self._cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (length, b"\r\n")
        return b"".join(lines)

    def _write(self, *pieces: bytes) -> None:
        if not self._connection.transport.is_closing():
            self._connection.transport.write(b"".join(pieces))

    def _complete(self) -> None:
        """What uvicorn does when an answer has been sent: close, or make ready for the connection's next request."""
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._connection.transport.close()
        cycle.on_response()


def refuse_unless_json(connection: ClientConnection) -> None:
    """VLLM takes only `application/json`; so do we, and read no compressed bodies (nor does vLLM)."""
    content_type = (connection.header(b"content-type") or b"application/json").split(b";", 1)[0].strip().lower()
    if content_type != b"application/json":
        raise BadRequestError("Unsupported Media Type: Only 'application/json' is allowed")
    if (connection.header(b"content-encoding") or b"identity").lower() != b"identity":
        raise UnsupportedEncodingError("a compressed request body is not read", "Send it without Content-Encoding")


class UnsupportedEncodingError(ProxyError):
    status = 415
    kind = "UnsupportedMediaTypeError"
