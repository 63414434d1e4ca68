"""Before anything else, on the head alone: a key, and 401 without a known one; or, where none is needed because only
this machine can ask, that it is no page of somebody else's in a browser of this machine.
"""

from collections.abc import Collection, Coroutine
from typing import Any
from urllib.parse import urlsplit

import orjson

from engines.openai.errors import error_body

from ..downstream.request import ClientRequest
from ..downstream.service import Handler
from ..settings import is_loopback
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


def from_here(handler: Handler) -> Handler:
    """The same handler for a listener of this machine's alone, which needs no key.

    A browser lets any page send requests to it, if not read the answers; and lets a page whose name was made to mean
    this machine's address do that, too (DNS rebinding).
    """

    def check(request: ClientRequest) -> Coroutine[Any, Any, None] | None:
        problem = _not_from_here(request)
        if problem:
            body = orjson.dumps(error_body(problem, "PermissionDeniedError", 403))
            request.answer(403, [(b"content-type", b"application/json")], body)
            return None
        return handler(request)

    return check


def _not_from_here(request: ClientRequest) -> str:
    host = (request.header(b"host") or b"").decode("latin-1")
    if not is_loopback(_name_in(f"//{host}")):
        return f"this listener is asked as localhost only, not as {host!r}"
    origin = (request.header(b"origin") or b"").decode("latin-1")
    is_cross = request.header(b"sec-fetch-site") not in (None, b"same-origin", b"none")
    if request.method != b"GET" and (is_cross or (origin and urlsplit(origin).netloc != host)):
        return "another site's page may change nothing here"
    return ""


def _name_in(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
