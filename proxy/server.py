"""One client's connection, as the data plane uses it: uvicorn's protocol, plus what ASGI has no word for.

A stream that stops cleanly in the middle is taken for complete, and ASGI cannot end one abnormally. It has a coroutine
wake up for every chunk, and another wait for the client to leave. So the connection itself rides along in the scope:
chunks are written to it as they come from the node, and it says when it is lost.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import BadRequestError, ProxyError
from .transport import Answer, Headers

_CONNECTION: Final = "pd_proxy.connection"


class Source(Protocol):
    """What a client's answer comes from: stopped while the client takes no more."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class ClientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol; an application finds it in the scope."""

    source: Source | None = None
    on_lost: Callable[[], object] | None = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[_CONNECTION] = self  # type: ignore[typeddict-unknown-key]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
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


class BodyTooLargeError(ProxyError):
    """Refused while it is being read: no more than the limit is ever held."""

    status = 413
    kind = "RequestEntityTooLargeError"


class ClientGoneError(Exception):
    """The client closed its connection before its request was read."""


class ClientConnection:
    """One request's way in and one answer's way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._connection: ClientProtocol = scope[_CONNECTION]
        self.started = False
        self.is_gone = False

    async def body(self, most_bytes: int) -> bytes:
        """The whole request body. Raises BodyTooLargeError, or ClientGoneError."""
        chunks: list[bytes] = []
        size = 0
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
        """The first value of a request header; `name` in lower case."""
        return next((value for key, value in self._scope["headers"] if key == name), None)

    @contextmanager
    def cancelled_when_gone(self, task: "asyncio.Task[object]") -> Iterator[None]:
        """Cancel `task` should the client close its connection meanwhile; `is_gone` says so then."""

        def lost() -> None:
            self.is_gone = True
            task.cancel()

        if self._connection.transport.is_closing():
            self.is_gone = True
            raise ClientGoneError
        self._connection.on_lost = lost
        try:
            yield
        finally:
            self._connection.on_lost = None

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        message: Message = {"type": "http.response.start", "status": status, "headers": headers}
        await self._send(message)

    async def write(self, chunk: bytes) -> None:
        """Returns when the client can take more: a slow reader slows its node, not the proxy's memory."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def relay(self, answer: Answer, silence_s: float) -> None:
        """The rest of a node's answer, each chunk written in the turn of the loop in which it came.

        Raises NodeBrokeOffError, or TimeoutError after `silence_s` without a byte.
        """
        transport, connection = self._connection.transport, self._connection

        def write(data: bytes) -> None:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))

        connection.source = answer
        if connection.flow.write_paused:
            answer.pause()
        try:
            await answer.pipe(write, silence_s)
        finally:
            connection.source = None
        await self.finish()

    def break_off(self) -> None:
        """End a begun answer so that nobody takes it for whole: close without the end of the body."""
        self._connection.transport.close()


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
