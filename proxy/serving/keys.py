"""Who may ask: the proxy's own keys, checked before any route is looked at."""

import hashlib
import hmac
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from engines.openai.errors import error_body

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""What a load balancer and a Prometheus ask, by exact path; everything else needs a key when there are keys."""


class KeyCheck:
    """ASGI middleware: 401 without a known `Authorization: Bearer …`."""

    def __init__(self, app: ASGIApp, keys: Collection[str], open_paths: Collection[str] = OPEN_PATHS) -> None:
        self._app = app
        self._open_paths = open_paths
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        from fastapi.responses import JSONResponse  # noqa: PLC0415

        body = error_body("Unauthorized: a known API key is needed as bearer token", "AuthenticationError", 401)
        await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, other) for other in self._digests]  # all of them, in constant time
        return scheme.lower() == b"bearer" and any(known)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
