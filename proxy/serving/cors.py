"""Web pages of other origins (CORS), as vLLM lets them in: not at all unless told which. A preflight has no key."""

from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from ..downstream.request import ClientRequest
from ..downstream.service import Handler
from ..settings import ProxySettings


class CrossOrigin:
    """Starlette's rules (its middleware is what vLLM uses), around handlers of ours."""

    def __init__(self, settings: ProxySettings) -> None:
        self._is_on = bool(settings.allowed_origins)
        self._rules = CORSMiddleware(
            _nothing,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
        )

    def around(self, handler: Handler) -> Handler:
        """The same handler, for pages as well. Without origins it is the same."""

        def handle(request: ClientRequest) -> Coroutine[Any, Any, None] | None:
            origin = request.header(b"origin")
            if origin is None:
                return handler(request)
            if request.method == b"OPTIONS" and request.header(b"access-control-request-method") is not None:
                answer = self._rules.preflight_response(Headers(raw=request.headers))
                headers = [pair for pair in answer.raw_headers if pair[0] != b"content-length"]
                request.answer(answer.status_code, headers, bytes(answer.body))
                return None
            request.more_headers = self._lines(origin, has_cookie=request.header(b"cookie") is not None)
            return handler(request)

        return handle if self._is_on else handler

    def _lines(self, origin: bytes, *, has_cookie: bool) -> bytes:
        """What an answer to a page of this origin has besides."""
        rules, told = self._rules, dict(self._rules.simple_headers)
        text = origin.decode("latin-1")
        if (rules.allow_all_origins and has_cookie) or (not rules.allow_all_origins and rules.is_allowed_origin(text)):
            told |= {"Access-Control-Allow-Origin": text, "Vary": "Origin"}
        return b"".join(f"{name.lower()}: {value}\r\n".encode("latin-1") for name, value in told.items())


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    del scope, receive, send
