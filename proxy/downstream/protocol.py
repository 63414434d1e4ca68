"""One client's connection: HTTP/1.1, one request after the other; served by uvicorn, which knows it by `http=`.

    IDLE ─▶ HEAD ─▶ BODY ─▶ COMPLETE ─▶ IDLE …     a request is read, then answered, then the next one
                      └──────▶ LINGERING ─▶ CLOSED  answered before its body had come: what still comes is dropped

At most one request is read ahead of its answer: bytes of the next wait, unparsed, and when there are many of them they
are not read from the socket. Answers are written by the request itself (`request.py`), in the turn of the loop in which
they are made.

What uvicorn wants of a protocol: it is in `server_state.connections` while it is open, its tasks are in
`server_state.tasks`, and `shutdown` ends it. The application puts the `Service` into the lifespan's state.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from enum import Enum, auto
from typing import Any, Final, Protocol, cast

import orjson

from engines.openai.errors import error_body

from .framing import FramingError
from .head import Head, HeadError
from .request import ClientRequest
from .service import Service

logger = logging.getLogger("pd_proxy")

SERVICE: Final = "pd_proxy.service"
"""The key of the service in the lifespan's state."""

_MOST_HELD_BYTES: Final = 64 * 1024
"""Of a next request, or of a body that nobody reads yet. A client that leaves behind more is noticed only later."""
_LINGER_S: Final = 2.0
_MOST_LINGER_BYTES: Final = 4 * 2**20
_MOST_BODY_TIMEOUTS: Final = 10
"""A body whose every piece comes in time may take this many times as long in all."""


class Source(Protocol):
    """What a client's answer comes from: stopped while the client takes no more."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Reading(Enum):
    """What comes next from the client."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    COMPLETE = auto()
    LINGERING = auto()
    CLOSED = auto()


_SAY_NOTHING: Final = (Reading.LINGERING, Reading.CLOSED)


class ClientProtocol(asyncio.Protocol):
    """The connection of one client."""

    source: Source | None = None

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
        self._is_tls = bool(config.is_ssl)
        self._state = server_state
        self._service: Service = app_state[SERVICE]
        self._loop: asyncio.AbstractEventLoop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)  # made before anything else happens
        self._reading = Reading.IDLE
        self._head = Head()
        self._request: ClientRequest | None = None
        self._task: asyncio.Task[None] | None = None
        """What answers the latest request."""
        self._held = b""
        self._is_read_paused = False
        self._drain: asyncio.Future[None] | None = None
        self.is_write_paused = False
        self._since = 0.0
        """When a piece of what is awaited came last."""
        self._body_since = 0.0
        self._has_had_request = False
        self._lingered = 0
        self._untaken = 0
        self._untaken_since = 0.0

    def __repr__(self) -> str:
        return f"<client's connection: {self._reading.name.lower()}, {self._request and self._request.path}>"

    # -- what asyncio and uvicorn call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        self._since = time.monotonic()
        self._state.connections.add(self)
        self._service.connections.add(self)
        if len(self._service.connections) > self._service.limits.connections:
            self._refuse(503, "ServiceUnavailableError", "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._state.connections.discard(self)
        self._service.connections.discard(self)
        self._reading = Reading.CLOSED
        self._held = b""
        if self.source is not None:
            self.source.pause()  # nothing may be written any more
        if self._request is not None:
            self._request.lose()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        reading = self._reading
        if reading is Reading.COMPLETE or (reading is Reading.IDLE and self._held):
            self._hold(data)  # what is held comes first, also in the moment before it is read
        elif reading is Reading.LINGERING:
            self._drop(len(data))
        elif reading is not Reading.CLOSED:
            self._read(data)

    def eof_received(self) -> None:
        """Who has closed its half has left: it cannot be told from a close, and must not go on holding KV."""

    def pause_writing(self) -> None:
        self.is_write_paused = True
        if self.source is not None:
            self.source.pause()

    def resume_writing(self) -> None:
        self.is_write_paused = False
        if self._drain is not None and not self._drain.done():
            self._drain.set_result(None)
        if self.source is not None and self._reading is not Reading.CLOSED:
            self.source.resume()

    def shutdown(self) -> None:
        """The process ends: a running answer is the last one here."""
        if self._request is None:
            self._close()
        else:
            self._request.keeps_alive = False

    # -- what a request calls

    @property
    def default_head(self) -> bytes:
        """The headers that every answer has, the date among them; made once, whenever uvicorn has new ones."""
        given = self._state.default_headers
        if self._service.default_headers is not given:
            self._service.default_headers = given
            self._service.default_head = b"".join(b"%b: %b\r\n" % header for header in given)
        return self._service.default_head

    @property
    def client_address(self) -> tuple[str, int] | None:
        address = self._transport.get_extra_info("peername")
        return (str(address[0]), int(address[1])) if isinstance(address, tuple) else None

    @property
    def server_address(self) -> tuple[str, int] | None:
        address = self._transport.get_extra_info("sockname")
        return (str(address[0]), int(address[1])) if isinstance(address, tuple) else None

    @property
    def stall_s(self) -> float:
        """How long a client may take nothing of its answer."""
        return self._service.limits.stall_s

    @property
    def scheme(self) -> str:
        return "https" if self._is_tls else "http"

    def write(self, data: bytes) -> None:
        """Nothing once the connection is lost, or the client was told that it is refused."""
        if data and self._reading not in _SAY_NOTHING and not self._transport.is_closing():
            self._transport.write(data)

    def may_stay_open(self, request: ClientRequest) -> bool:
        """Whether another request may follow; not behind a body that nobody has read."""
        return request.keeps_alive and request.is_read and not self._service.is_closing

    def wants_body(self, request: ClientRequest) -> None:
        """Somebody waits for the body: its bytes are read, and the client is asked for them."""
        self._since = self._body_since = time.monotonic()
        if request.expects_continue:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._resume_reading()

    async def drained(self) -> None:
        """Until the client has taken enough of what was written."""
        if self.is_write_paused and self._reading is not Reading.CLOSED:
            self._drain = self._loop.create_future()
            await self._drain

    def answered(self, request: ClientRequest) -> None:
        """The answer is written whole: the next request, or the end of the connection."""
        if request is not self._request or self._reading is Reading.CLOSED:
            return
        if not request.is_read:
            self._linger()
        elif not request.keeps_alive or self._service.is_closing:
            self._close()
        else:
            self._request = None
            self._reading = Reading.IDLE
            self._since = time.monotonic()
            self._head = Head()
            if self._held:
                self._loop.call_soon(self._read_held)  # a turn each: many short requests in one packet stop nobody else
            else:
                self._resume_reading()

    def break_off(self, *, at_once: bool) -> None:
        """Close the connection in the middle of an answer."""
        if at_once:
            self._transport.abort()
        else:
            self._close()

    # -- what the service calls

    def check(self, now: float) -> None:
        """Is the client late, or has it stopped reading?"""
        if not self._check_taken(now):
            return
        limits, since = self._service.limits, now - self._since
        if self._reading is Reading.IDLE:
            if since > (limits.keep_alive_s if self._has_had_request else limits.head_s):
                self._close()
        elif self._reading is Reading.HEAD:
            if since > limits.head_s:
                self._refuse(408, "RequestTimeoutError", "the request's head did not come in time")
        elif self._reading is Reading.BODY and self._request is not None and self._request.is_reading:
            whole_s = now - self._body_since
            if max(since, whole_s / _MOST_BODY_TIMEOUTS) > limits.body_s:
                self._refuse(408, "RequestTimeoutError", "the request's body did not come in time")

    def end_running_answer(self) -> None:
        """Nothing is waited for any more."""
        if self._task is not None:
            self._task.cancel()

    # -- inside

    def _read_held(self) -> None:
        """With bytes that were held while an earlier request was answered."""
        if self._reading is Reading.IDLE and self._held:
            held, self._held = self._held, b""
            self._resume_reading()
            self._read(held)

    def _read(self, data: bytes) -> None:
        try:
            if self._reading is Reading.BODY:
                self._read_body(data)
            else:
                self._read_head(data)
        except HeadError as exc:
            self._refuse(exc.status, exc.kind, str(exc))
        except FramingError as exc:
            self._refuse(400, "BadRequestError", f"the request's body cannot be read: {exc}")

    def _read_head(self, data: bytes) -> None:
        if self._reading is Reading.IDLE:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2
            if not data:
                return
            self._reading, self._since = Reading.HEAD, time.monotonic()
        end = self._head.feed(data)
        if end >= 0:
            self._begin(data[end:])

    def _begin(self, behind: bytes) -> None:
        """A request whose head is here; as much of its body as is here too is read before it is handled."""
        head = self._head
        body = head.body()
        expected = head.first.get(b"expect")
        if expected is not None and expected.lower() != b"100-continue":
            raise HeadError("this expectation cannot be met", 417, "ExpectationFailedError")
        request = self._request = ClientRequest(self, head, body)
        self._has_had_request = True
        self._state.total_requests += 1
        if body is None:
            self._reading = Reading.COMPLETE
            if behind:
                self._hold(behind)
        else:
            self._reading = Reading.BODY
            if behind:
                self._read_body(behind)
        if self._request is request:
            self._handle(request)

    def _read_body(self, data: bytes) -> None:
        request = self._request
        assert request is not None  # noqa: S101  BODY is a state of a request
        self._since = time.monotonic()
        behind = request.feed(data)
        if request.is_read:
            self._reading = Reading.COMPLETE
            if behind:
                self._hold(behind)
        elif not request.is_reading and request.buffered > _MOST_HELD_BYTES:
            self._pause_reading()

    def _handle(self, request: ClientRequest) -> None:
        handler = self._service.other
        if request.method == b"POST":
            handler = self._service.post.get(request.path, handler)
        work = handler(request)
        if work is not None:
            task = self._task = self._loop.create_task(self._answer(work, request))
            self._state.tasks.add(task)
            task.add_done_callback(self._state.tasks.discard)

    async def _answer(self, work: Coroutine[Any, Any, None], request: ClientRequest) -> None:
        try:
            await work
        except Exception:
            logger.exception("the handler of %s failed", request.path)
        finally:
            if not request.has_answer and not request.is_gone:
                request.break_off(at_once=True)

    def _hold(self, data: bytes) -> None:
        self._held = self._held + data if self._held else data
        if len(self._held) > _MOST_HELD_BYTES:
            self._pause_reading()

    def _drop(self, size: int) -> None:
        self._lingered += size
        if self._lingered > _MOST_LINGER_BYTES:
            self._transport.abort()

    def _linger(self) -> None:
        """The answer came before the request's end. A close now would reset the connection, and a client that is still
        sending would lose the answer: what it sends is dropped for a moment, unparsed.
        """
        self._reading = Reading.LINGERING
        self._resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._loop.call_later(_LINGER_S, self._close)

    def _refuse(self, status: int, kind: str, message: str) -> None:
        """What comes from this client can no longer be read. Into an answer that has begun nothing is written."""
        request = self._request
        if request is not None and request.started and not request.has_answer:
            request.break_off()
            return
        body = orjson.dumps(error_body(message, kind, status))
        head = b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.write(head % (status, len(body)) + body)
        if request is not None:
            request.lose()
        self._request = None
        self._linger()

    def _close(self) -> None:
        if self._reading is not Reading.CLOSED:
            self._transport.close()

    def _check_taken(self, now: float) -> bool:
        """A client that takes nothing of what was written for it loses its connection. False when it has lost it."""
        if self._reading is Reading.CLOSED or self._transport.is_closing():
            return self._check_closing(now)
        untaken = self._transport.get_write_buffer_size()
        if untaken == 0 or untaken != self._untaken:
            self._untaken, self._untaken_since = untaken, now
        elif now - self._untaken_since > self._service.limits.stall_s:
            self._transport.abort()
            return False
        return True

    def _check_closing(self, now: float) -> bool:
        """What was written before a close must be taken as well."""
        untaken = self._transport.get_write_buffer_size()
        if untaken != self._untaken or self._untaken_since == 0.0:
            self._untaken, self._untaken_since = untaken, now
        elif now - self._untaken_since > self._service.limits.stall_s:
            self._transport.abort()
        return False

    def _pause_reading(self) -> None:
        if not self._is_read_paused and not self._transport.is_closing():
            self._is_read_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._is_read_paused and not self._transport.is_closing():
            self._is_read_paused = False
            self._transport.resume_reading()
