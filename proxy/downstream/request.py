"""One request: its body comes in, its answer goes out. A handler sees nothing else of the client's side."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

from ..errors import BodyTooLargeError, ClientGoneError, ClientStalledError, NodeBrokeOffError
from ..upstream.client import Answer, Sink
from ..upstream.deadline import NEVER
from .framing import Body
from .head import Head, Headers

if TYPE_CHECKING:
    from .protocol import ClientProtocol

_END: Final = b"0\r\n\r\n"
_STATUS_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}


class StreamFilter(Protocol):
    """What a stream's bytes go through on their way (`exchange/filters.py`)."""

    @property
    def has_failed(self) -> bool: ...

    @property
    def is_done(self) -> bool: ...

    def in_frames(self, data: bytes) -> bytes | None: ...

    def feed(self, data: bytes) -> bytes: ...


class Memory(Protocol):
    """What the bytes of a body are counted in. Raises an error when there are too many."""

    def add(self, size: int, /) -> None: ...


class ClientRequest:
    """A request whose head is here. Nothing of its body is read before `body` is called."""

    __slots__ = (
        "_chunks",
        "_coming",
        "_connection",
        "_head",
        "_is_reading",
        "_size",
        "_waiter",
        "has_answer",
        "headers",
        "is_gone",
        "keeps_alive",
        "method",
        "more_headers",
        "on_gone",
        "path",
        "query",
        "raw_path",
        "started",
    )

    def __init__(self, connection: "ClientProtocol", head: Head, body: Body | None) -> None:
        self._connection = connection
        self._head = head
        self._coming = body
        self._chunks: list[bytes] = []
        self._size = 0
        self._is_reading = False
        self._waiter: asyncio.Future[None] | None = None
        self.method = head.method
        self.headers: Headers = head.headers
        self.path, self.raw_path, self.query = head.path()
        self.keeps_alive = head.keeps_alive
        self.started = False
        """The beginning of an answer is written."""
        self.has_answer = False
        """All of it is, or it was broken off; what is written after that goes nowhere."""
        self.is_gone = False
        """The client closed its connection before it was answered."""
        self.on_gone: Callable[[], object] | None = None
        self.more_headers = b""
        """Lines that its answer's head has besides, whatever the answer is."""

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        return self._head.first.get(name)

    @property
    def is_1_0(self) -> bool:
        """HTTP/1.0 knows no chunked coding: a body without a length ends with the connection."""
        return self._head.is_1_0

    @property
    def connection(self) -> "ClientProtocol":
        return self._connection

    # -- the body

    @property
    def length(self) -> int | None:
        """Of its body; None when nobody knows before its end."""
        return self._coming.length if self._coming is not None else 0

    @property
    def is_read(self) -> bool:
        """All of the body has come."""
        return self._coming is None or self._coming.is_complete

    @property
    def is_reading(self) -> bool:
        """Somebody waits for the body."""
        return self._is_reading

    @property
    def buffered(self) -> int:
        return self._size

    async def body(self, most_bytes: int, memory: Memory) -> bytes:
        """The whole body. Raises BodyTooLargeError, ClientGoneError, and what `memory` raises."""
        length = self.length
        if length is not None:
            self._check_size(length, most_bytes)
            memory.add(length)
        if self._coming is None or self._coming.is_complete:
            if length is None:
                self._check_size(self._size, most_bytes)
                memory.add(self._size)
            return self._joined()
        self._is_reading = True
        self._connection.wants_body(self)
        counted = 0
        try:
            while True:
                if length is None:
                    self._check_size(self._size, most_bytes)
                    memory.add(self._size - counted)
                    counted = self._size
                if self.is_read:
                    return self._joined()
                if self.is_gone:
                    raise ClientGoneError
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        finally:
            self._is_reading = False
            self._waiter = None

    def feed(self, data: bytes) -> bytes:
        """Bytes of the body, from the connection; returns what lies behind it. Raises FramingError."""
        assert self._coming is not None  # noqa: S101  there is a body to feed
        content, behind = self._coming.feed(data)
        if content:
            self._chunks.append(content)
            self._size += len(content)
        if self._coming.is_complete or self._is_reading:
            self._wake()
        return behind

    @property
    def expects_continue(self) -> bool:
        """The client sends no body before it is asked to."""
        return (self.header(b"expect") or b"").lower() == b"100-continue" and not self.is_1_0

    def lose(self) -> None:
        """The connection is lost."""
        if not self.has_answer:
            self.is_gone = True
            self._wake()
            if self.on_gone is not None:
                self.on_gone()

    # -- the answer

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer, in one write."""
        if self.has_answer or self.started:
            return
        head = self._answer_head(status, headers, b"content-length: %d\r\n" % len(body))
        self._connection.write(head if self.method == b"HEAD" else head + body)
        self._end()

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None:
        """The head and the first bytes of an answer whose length nobody knows yet, in one write."""
        if self.has_answer:
            return
        length = b"" if self.is_1_0 else b"transfer-encoding: chunked\r\n"
        self._connection.write(self._answer_head(status, headers, length) + self._frame(first))

    def write(self, chunk: bytes) -> None:
        """A piece of an answer that has begun."""
        if not self.has_answer:
            self._connection.write(self._frame(chunk))

    def finish(self) -> None:
        """The end of an answer that `write` has written."""
        if self.has_answer:
            return
        if not self.is_1_0:
            self._connection.write(_END)
        self._end()

    def break_off(self, *, at_once: bool = False) -> None:
        """End a begun answer so that nobody takes it for whole: close without the end of the body.

        `at_once`: without waiting for a client that takes nothing to take what is written already.
        """
        if not self.has_answer:
            self.has_answer = True
            self._connection.break_off(at_once=at_once or self.is_1_0)

    async def relay(self, answer: Answer, stream_filter: StreamFilter, *, silence_s: float, stall_s: float) -> None:
        """The rest of a node's answer, each piece written in the turn of the loop in which it came.

        A client that takes no more stops its node, and not for longer than `stall_s`. Raises NodeError, or
        ClientStalledError.
        """
        connection = self._connection

        def write(pieces: Sequence[bytes], *, ended: bool) -> Exception | None:
            try:
                passed = stream_filter.feed(b"".join(pieces))
            except ValueError:
                return NodeBrokeOffError("the node sent a stream that cannot be read")
            if stream_filter.has_failed:
                self.write(passed)
                return NodeBrokeOffError("the node failed in the middle of its answer", "Its own log tells why")
            if ended and not stream_filter.is_done:
                self.write(passed)
                return NodeBrokeOffError("the node ended its stream before its end")
            if ended and not self.is_1_0 and not self.has_answer:
                connection.write(self._frame(passed) + _END)
            else:
                self.write(passed)
            return None

        connection.source = answer
        if connection.is_write_paused:
            answer.pause()
        try:
            frames = None if self.is_1_0 else (stream_filter.in_frames, connection.write)
            await answer.pipe(Sink(write, frames, NEVER, silence_s=silence_s, stall_s=stall_s))
        finally:
            connection.source = None
        self._end()

    async def drained(self, stall_s: float) -> None:
        """Until the client can take more. Raises ClientStalledError when that takes longer than `stall_s`."""
        try:
            async with asyncio.timeout(stall_s):
                await self._connection.drained()
        except TimeoutError as exc:
            raise ClientStalledError(f"the client took nothing for {stall_s:g} s") from exc

    # -- inside

    def _answer_head(self, status: int, headers: Iterable[tuple[bytes, bytes]], length: bytes) -> bytes:
        self.started = True
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, self._connection.default_head]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if not self._connection.may_stay_open(self) or not length:
            self.keeps_alive = False
            lines.append(b"connection: close\r\n")
        elif self.is_1_0:
            lines.append(b"connection: keep-alive\r\n")
        lines += (self.more_headers, length, b"\r\n")
        return b"".join(lines)

    def _frame(self, chunk: bytes) -> bytes:
        return chunk if self.is_1_0 or not chunk else b"%x\r\n%b\r\n" % (len(chunk), chunk)

    def _end(self) -> None:
        if not self.has_answer:
            self.has_answer = True
            self._connection.answered(self)

    def _check_size(self, size: int, most_bytes: int) -> None:
        if size > most_bytes:
            raise BodyTooLargeError(f"the request body is larger than {most_bytes} bytes")

    def _joined(self) -> bytes:
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
