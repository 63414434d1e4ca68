"""A key before anything else: 401 without a known one, on the head alone."""

from collections.abc import Collection, Coroutine
from typing import Any

import orjson

from engines.openai.errors import error_body

from ..downstream.request import ClientRequest
from ..downstream.service import Handler
from .keys import OPEN_PATHS, KeyRing

MESSAGE = "Unauthorized: a known API key is needed as bearer token"


def keys_in(request: ClientRequest) -> tuple[bytes | None, bytes | None]:
    """Where a client may have put its key."""
    return request.header(b"authorization"), request.header(b"x-api-key")


def guarded(handler: Handler, keys: KeyRing, open_paths: Collection[str] = OPEN_PATHS) -> Handler:
    """The same handler behind the keys, if there are any."""

    def check(request: ClientRequest) -> Coroutine[Any, Any, None] | None:
        if keys.is_needed and request.path not in open_paths and keys.name_of(*keys_in(request)) is None:
            body = orjson.dumps(error_body(MESSAGE, "AuthenticationError", 401))
            request.answer(401, [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")], body)
            return None
        return handler(request)

    return check
