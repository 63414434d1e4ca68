"""What is no hot path is answered by an ASGI application (FastAPI): this is all of ASGI that such routes need."""

import asyncio
import logging
from collections.abc import Coroutine, MutableMapping
from typing import Any

import orjson

from engines.openai.errors import error_body

from ..errors import ClientGoneError, ProxyError
from .request import ClientRequest

logger = logging.getLogger("pd_proxy")

_MOST_BODY_BYTES = 2**20
"""Nothing here takes a large body."""

Message = MutableMapping[str, Any]


class _Uncounted:
    """These bodies are small."""

    def add(self, size: int) -> None:
        del size


class ASGIHandler:
    """A handler for `Service.other`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, request: ClientRequest) -> Coroutine[Any, Any, None]:
        return _Call(request).run(self._app)


class _Call:
    """One request's way through the application."""

    def __init__(self, request: ClientRequest) -> None:
        self._request = request
        self._gone = asyncio.Event()
        request.on_gone = self._gone.set
        self._status = 500
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_received = False
        self._is_refused = False
        """The body could not be had; whatever the application says to that, the answer is made here."""

    async def run(self, app: Any) -> None:
        request, connection = self._request, self._request.connection
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.0" if request.is_1_0 else "1.1",
            "method": request.method.decode("latin-1"),
            "scheme": connection.scheme,
            "path": request.path,
            "raw_path": request.raw_path,
            "query_string": request.query,
            "root_path": "",
            "headers": request.headers,
            "client": connection.client_address,
            "server": connection.server_address,
            "state": {},
        }
        try:
            await app(scope, self._receive, self._send)
        except ClientGoneError:
            return
        except ProxyError as exc:
            if request.started:
                request.break_off(at_once=True)
                return
            body = orjson.dumps(error_body(str(exc), exc.kind, exc.status))
            request.answer(exc.status, [(b"content-type", b"application/json")], body)
        except Exception:
            logger.exception("%s %s failed in the proxy itself", scope["method"], request.path)
            if request.started:
                request.break_off()
                return
            request.answer(500, [(b"content-type", b"text/plain")], b"Internal Server Error")

    async def _receive(self) -> Message:
        if not self._is_received:
            self._is_received = True
            try:
                body = await self._request.body(_MOST_BODY_BYTES, _Uncounted())
            except (ClientGoneError, ProxyError):
                self._is_refused = True
                raise
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"content-length"]
            return
        if self._is_refused:
            return
        request, body, more = self._request, message.get("body", b""), message.get("more_body", False)
        if not request.started and not more:
            request.answer(self._status, self._headers, body)
            return
        if not request.started:
            request.begin(self._status, self._headers, body)
        elif body:
            request.write(body)
        if more:
            await request.drained(request.connection.stall_s)
        else:
            request.finish()
