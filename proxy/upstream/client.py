"""The HTTP/1.1 client of the hot path: one pool of kept connections a node, httptools for parsing, nothing between.

A request is written whole, an answer is read as it comes. What a caller does not read is not read from the socket
either (`_HIGH_WATER` bytes apart), so a slow client slows its node and not the proxy's memory.

Deadlines cost nothing to set: a timer for each wait would be the dearest part of a request. Each client looks at its
busy connections a few times a second instead, so a deadline is kept within `_TICK_S`.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

import httptools

from ..errors import ClientStalledError, NodeBrokeOffError, NodeError, NodeTimeoutError, NodeUnreachableError
from .deadline import NEVER, Deadline

_HIGH_WATER: Final = 256 * 1024
_MOST_HEADER_BYTES: Final = 64 * 1024
_KEEP_IDLE_S: Final = 4.0
"""vLLM closes an idle connection after 5 s unless told otherwise; a request must not meet that close."""

_TICK_S: Final = 0.25

Headers = list[tuple[bytes, bytes]]


class NodeClient:
    """Requests to one node. Names in errors are the node's name, never its address: clients see them."""

    def __init__(
        self, name: str, base_url: str, connect_timeout_s: float, on_close: Callable[[], None] = lambda: None
    ) -> None:
        """`on_close` is called when the node closes a connection that is kept for the next request."""
        parts = urlsplit(base_url)
        self._name = name
        self._host = parts.hostname or ""
        self._port = parts.port or 80
        self._host_header = parts.netloc.encode("ascii")
        self._connect_timeout_s = connect_timeout_s
        self._on_close = on_close
        self._is_closed = False
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._ticking: asyncio.TimerHandle | None = None

    async def request(  # noqa: PLR0913  a request's parts
        self,
        method: bytes,
        path: bytes,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes,
        *,
        deadline: Deadline,
        on_sent: Callable[[], None] = lambda: None,
    ) -> "Answer":
        """Send a request, once, and wait for the answer's head. `on_sent` is called when the node may have it.

        `deadline` holds for the head and for the body, until a reader of the body gives another. Raises NodeError
        when the node cannot be reached, is late, breaks off or does not speak HTTP. Nothing is sent again here, not
        even when the node closes a kept connection without an answer: it may have the request (RFC 9110 §9.2.2).
        """
        connection = self._kept() or await self._connect()
        return await connection.send((self._head(method, path, headers, len(body)), body), deadline, on_sent)

    async def get(self, path: bytes, headers: Iterable[tuple[bytes, bytes]], deadline: Deadline) -> "Answer":
        """A request without effect: of a kept connection that the node closes without an answer it is asked again.

        Raises NodeError.
        """
        was_kept = bool(self._idle)
        try:
            return await self.request(b"GET", path, headers, b"", deadline=deadline)
        except NodeClosedError:
            if not was_kept:
                raise
        self._drop_idle()
        return await self.request(b"GET", path, headers, b"", deadline=deadline)

    def close(self) -> None:
        """Drop every connection, those in use included, and make no more."""
        self._is_closed = True
        self._drop_idle()
        for connection in tuple(self._open):
            connection.abort()
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def _head(self, method: bytes, path: bytes, headers: Iterable[tuple[bytes, bytes]], length: int) -> bytes:
        lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\naccept-encoding: identity\r\n" % (method, path, self._host_header)]
        lines += [b"%b: %b\r\n" % header for header in headers]
        lines.append(b"content-length: %d\r\n\r\n" % length)
        return b"".join(lines)

    def _kept(self) -> "_Connection | None":
        """A connection that is still open, as far as anybody knows here."""
        oldest = time.monotonic() - _KEEP_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and not connection.is_closing:
                return connection
            connection.abort()
        return None

    def _drop_idle(self, since: float = math.inf) -> None:
        """Those that are idle since then or longer. The longest idle one comes first."""
        while self._idle and self._idle[0].idle_since < since:
            self._idle.pop(0).abort()

    async def _connect(self) -> "_Connection":
        if self._is_closed:
            raise NodeUnreachableError(f"node {self._name} is no longer one of the proxy's nodes")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(lambda: _Connection(self), self._host, self._port)
        except TimeoutError as exc:
            raise NodeUnreachableError(
                f"node {self._name} took no connection in {self._connect_timeout_s:g} s"
            ) from exc
        except OSError as exc:
            raise NodeUnreachableError(
                f"node {self._name} cannot be reached: {exc.strerror or type(exc).__name__}"
            ) from exc
        return connection

    def _opened(self, connection: "_Connection") -> None:
        self._open.add(connection)
        if self._ticking is None:
            self._tick()

    def _free(self, connection: "_Connection") -> None:
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def _lost(self, connection: "_Connection") -> None:
        self._open.discard(connection)
        if connection in self._idle:  # else it was dropped from here
            self._idle.remove(connection)
            self._on_close()

    def _tick(self) -> None:
        now = time.monotonic()
        for connection in tuple(self._open):
            connection.check(now)
        self._drop_idle(now - _KEEP_IDLE_S)
        later = asyncio.get_running_loop().call_later(_TICK_S, self._tick) if self._open else None
        self._ticking = later

    @property
    def name(self) -> str:
        return self._name


class Answer:
    """A node's answer: its head is here, its body comes as it is read."""

    __slots__ = ("_connection", "_loaded", "headers", "status")

    def __init__(self, connection: "_Connection", status: int, headers: Headers) -> None:
        self._connection: _Connection | None = connection
        self._loaded = b""
        self.status = status
        self.headers = headers

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        return next((value for key, value in self.headers if key == name), None)

    async def chunk(self, deadline: Deadline | None = None) -> bytes:
        """What has come since the last call, at least one byte; b"" at the end of the body.

        `deadline` replaces the one in force. Raises NodeBrokeOffError when the node does not finish its answer.
        """
        if self._loaded:
            loaded, self._loaded = self._loaded, b""
            return loaded
        if deadline is not None and self._connection is not None:
            self._connection.deadline = deadline
        return await self._read()

    async def load(self) -> bytes:
        """All of the body. It stays, for `chunk` or another `load`."""
        data = await self._read()
        if data:
            chunks = [self._loaded, data]
            while data := await self._read():
                chunks.append(data)
            self._loaded = b"".join(chunks)
        return self._loaded

    async def pipe(self, sink: "Sink") -> None:
        """Give all that is left to `sink`, as it comes and without waking a task for it.

        Raises NodeBrokeOffError; NodeTimeoutError when nothing comes for `sink.silence_s`; ClientStalledError when
        the sink has been full for `sink.stall_s`.
        """
        if self._connection is None:
            error = sink.write([self._loaded] if self._loaded else [], ended=True)
            if error is not None:
                raise error
        else:
            await self._connection.pipe(sink, self._loaded)
            self._connection = None
        self._loaded = b""

    def hold(self) -> None:
        """Nobody reads on for now: that is no lateness of the node's. The next `chunk` brings a deadline."""
        if self._connection is not None:
            self._connection.deadline = NEVER

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    async def _read(self) -> bytes:
        if self._connection is None:
            return b""
        data = await self._connection.read()
        if not data:
            self._connection = None  # back in the pool, or closed
        return data

    def close(self) -> None:
        """Give it up. An answer that is not read to its end costs its connection, which tells the node to stop."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


class Sink:
    """Where an answer's bytes go as they come.

    `frames`, where it is not None, are two functions. The first is called with the bytes of a chunked body just as they
    came, from the beginning of a chunk on; if they are whole chunks (`are_whole_frames`) it may return bytes for the
    second. Where it returns None, and all else, comes to `write` as pieces of the body. The error that `write` returns,
    if any, ends the answer.
    """

    __slots__ = ("deadline", "frames", "silence_s", "stall_s", "write")

    def __init__(
        self,
        write: "SinkWrite",
        frames: "Frames | None",
        deadline: Deadline,
        *,
        silence_s: float,
        stall_s: float,
    ) -> None:
        self.write = write
        self.frames = frames
        self.deadline = deadline
        self.silence_s = silence_s
        self.stall_s = stall_s


Frames = tuple[Callable[[bytes], bytes | None], Callable[[bytes], object]]


class SinkWrite(Protocol):
    """Takes pieces of a body; `ended` comes once, with the last of them."""

    def __call__(self, pieces: Sequence[bytes], /, *, ended: bool) -> Exception | None: ...


class NodeClosedError(NodeError):
    """The node closed the connection before the first byte of an answer."""


class _State(Enum):
    IDLE = auto()
    WAITING = auto()
    """The request is written, and nothing of an answer has come."""
    IN_HEAD = auto()
    IN_BODY = auto()
    COMPLETE = auto()
    """The answer has come whole; it may not have been read."""


class _Connection(asyncio.Protocol):
    """One connection; one request at a time. httptools calls the `on_…` methods."""

    deadline: Deadline

    def __init__(self, client: NodeClient) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self.idle_since = time.monotonic()
        self._waiter: asyncio.Future[None] | None = None
        self._reading = True
        self._state = _State.IDLE
        self._reset()

    def __repr__(self) -> str:
        return f"<connection to {self._client.name}: {self._state.name.lower()}>"

    def _reset(self) -> None:
        self._headers: Headers = []
        self._header_bytes = 0
        self._status = 0
        self._has_length = False
        self._keep_alive = False
        self._error: Exception | None = None
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._sink: Sink | None = None
        self._heard = False
        self._heard_at = 0.0
        self._between_chunks = False
        self._frames: Frames | None = None

    # -- what NodeClient and Answer call

    async def send(self, message: Iterable[bytes], deadline: Deadline, on_sent: Callable[[], None]) -> Answer:
        """Write the request, once; the answer when its head is here. Raises NodeError."""
        assert self._transport is not None  # noqa: S101  made by create_connection
        self._reset()
        self._state = _State.WAITING
        self.deadline = deadline
        try:
            self._transport.writelines(message)
            on_sent()
            while self._status < 200 and self._error is None:
                await self._wait_for_bytes()
        except BaseException:
            self.abort()
            raise
        if self._status < 200 and self._error is not None:
            self.abort()
            raise self._error
        return Answer(self, self._status, self._headers)

    async def read(self) -> bytes:
        while not self._chunks:
            if self._state is _State.COMPLETE:
                self._finish()
                return b""
            if self._error is not None:
                raise self._error
            await self._wait_for_bytes()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        self.resume()
        return data

    async def pipe(self, sink: Sink, first: bytes) -> None:
        if first:
            self._chunks.insert(0, first)
        self._buffered = 0
        self._sink, self.deadline = sink, sink.deadline
        self._heard_at = time.monotonic()
        self._deliver()
        try:
            while self._state is not _State.COMPLETE and self._error is None:
                await self._wait_for_bytes()
        finally:
            self._sink = self._frames = None
        if self._state is not _State.COMPLETE and self._error is not None:
            raise self._error
        self._finish()

    def check(self, now: float) -> None:
        """Is it late or silent?"""
        if self._state is _State.IDLE:
            return
        if self._sink is not None:
            if self._heard:
                self._heard, self._heard_at = False, now
            elif self._reading and now - self._heard_at > self._sink.silence_s:
                self._give_up(NodeTimeoutError(f"{self._node} fell silent for {self._sink.silence_s:g} s"))
            elif not self._reading and now - self._heard_at > self._sink.stall_s:
                self._give_up(ClientStalledError(f"the client took nothing for {self._sink.stall_s:g} s"))
        if now > self.deadline.at:
            message = f"{self._node} did not {self.deadline.what} in {self.deadline.seconds:g} s"
            self._give_up(NodeTimeoutError(message, may_be_retried=not self.deadline.is_everybodys))

    def pause(self) -> None:
        if self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = self._heard = True  # the silence until now was ours
            self._transport.resume_reading()

    @property
    def _is_over(self) -> bool:
        return self._state is _State.COMPLETE or self._error is not None

    @property
    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        self._client._opened(self)  # noqa: SLF001  the two classes are one unit

    def data_received(self, data: bytes) -> None:
        if self._frames is not None:
            in_frames, pass_on = self._frames
            passed = in_frames(data)
            if passed is not None:
                pass_on(passed)
                self._heard = True  # the parser stands between two chunks, before and after
                return
        if self._state in (_State.IDLE, _State.COMPLETE):
            self._fail(NodeBrokeOffError(f"{self._node} sent bytes nobody asked for"))
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(NodeError(f"{self._node} wants to switch protocols"))
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as exc:
            self._fail(self._not_http(exc))
        self._between_chunks = self._between_chunks and data.endswith(b"\r\n")
        if self._sink is not None:
            self._deliver()
            if not self._is_over:
                return
        elif self._buffered > _HIGH_WATER:
            self.pause()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._client._lost(self)  # noqa: SLF001
        if self._state is _State.IN_BODY and not self._has_length and exc is None and self._error is None:
            self._state = _State.COMPLETE  # a body without a length ends with the connection
            if self._sink is not None:
                self._deliver()
        elif self._state is not _State.COMPLETE:
            self._fail(self._broke_off())
        self._wake()

    # -- what httptools calls

    def on_message_begin(self) -> None:
        if self._state is _State.COMPLETE:
            raise ValueError("a second answer to one request")

    def on_status(self, _reason: bytes) -> None:
        self._state = _State.IN_HEAD

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > _MOST_HEADER_BYTES:
            raise ValueError("header too long")
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._has_length = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._headers, self._header_bytes = [], 0  # 100, 102, 103: the answer is still to come
            self._state = _State.WAITING
            return
        if status > 599:
            raise ValueError("no status of HTTP")
        self._status = status
        if status in (204, 304):
            self._has_length = True
        self._state = _State.IN_BODY
        self._keep_alive = self._parser.should_keep_alive()  # the parser forgets with the end of the message

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        if self._state is _State.IN_BODY:
            self._state = _State.COMPLETE

    # -- inside

    def _deliver(self) -> None:
        """To the sink with what has come."""
        assert self._sink is not None  # noqa: S101  asked by the callers
        self._heard = True
        ended = self._state is _State.COMPLETE
        if self._chunks or ended:
            pieces = tuple(self._chunks)
            self._chunks.clear()
            self._buffered = 0
            error = self._sink.write(pieces, ended=ended)
            if error is not None:
                self._state = _State.IN_BODY  # for us it is not complete
                self._give_up(error)
        healthy = not ended and self._error is None
        self._frames = self._sink.frames if self._between_chunks and healthy else None

    def _give_up(self, error: Exception) -> None:
        self._fail(error)
        self.abort()
        self._wake()

    async def _wait_for_bytes(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _finish(self) -> None:
        """The answer is read to its end: keep the connection if both sides may."""
        self._state = _State.IDLE
        self.resume()  # its last reader may have gone while it was stopped
        assert self._transport is not None  # noqa: S101  an answer came over it
        if self._keep_alive and self._error is None and not self._transport.is_closing():
            self._client._free(self)  # noqa: SLF001
        else:
            self._transport.close()

    def _fail(self, error: Exception) -> None:
        self._frames = None
        if self._error is None:
            self._error = error

    @property
    def _node(self) -> str:
        return f"node {self._client.name}"

    def _not_http(self, exc: Exception) -> NodeError:
        kind = NodeBrokeOffError if self._state is _State.IN_BODY else NodeError
        error = kind(f"{self._node} sent something that is not HTTP/1.1")
        error.__cause__ = exc
        return error

    def _broke_off(self) -> NodeError:
        if self._state is _State.IN_BODY:
            return NodeBrokeOffError(f"{self._node} closed the connection in the middle of its answer")
        if self._state is _State.IN_HEAD:
            return NodeError(f"{self._node} closed the connection in the middle of its answer's head")
        return NodeClosedError(f"{self._node} closed the connection without an answer")
