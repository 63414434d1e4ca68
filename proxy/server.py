"""One client's connection, as the data plane uses it: uvicorn's protocol, plus the two things ASGI has no word for.

ASGI cannot end an answer abnormally, and a stream that stops cleanly in the middle is taken for complete. So the
connection's transport rides along in the scope.
"""

import asyncio
from typing import Final

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import BadRequestError, ProxyError
from .transport import Headers

_TRANSPORT: Final = "pd_proxy.transport"


class ClientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol; an application finds the transport in the scope."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[_TRANSPORT] = self.transport  # type: ignore[typeddict-unknown-key]


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
        self.started = False

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

    async def gone(self) -> None:
        """Returns when the client has closed its connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        message: Message = {"type": "http.response.start", "status": status, "headers": headers}
        await self._send(message)

    async def write(self, chunk: bytes) -> None:
        """Returns when the client can take more: a slow reader slows its node, not the proxy's memory."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    def break_off(self) -> None:
        """End a begun answer so that nobody takes it for whole: close without the end of the body."""
        transport: asyncio.Transport = self._scope[_TRANSPORT]
        transport.close()


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
