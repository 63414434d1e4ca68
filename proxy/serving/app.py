"""The application: the hot path to its endpoint, everything else to FastAPI, behind one listener."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engines.base import JSONObject
from engines.openai.errors import error_body
from engines.openai.routes import HANDED_OFF, PASSED_ON, REFUSED
from engines.topology import Topology

from ..downstream.asgi import ASGIHandler
from ..downstream.protocol import SERVICE
from ..downstream.service import Service
from ..nodes import topology
from ..nodes.topology import Stamp
from ..settings import ProxySettings
from .assembly import Components, limits_of
from .board import Board
from .cors import CrossOrigin
from .guard import guarded
from .information import STATES, add_routes
from .stored import add_stored_routes


def make_app(
    settings: ProxySettings, board: Board | None = None, found: tuple[Topology, Stamp] | None = None
) -> FastAPI:
    """The application for uvicorn, with `ClientProtocol` as its protocol.

    The nodes of a topology file, unless they are `found` already, and the keys are read here: raises TopologyError,
    KeysError.
    """
    nodes, applied = found or (settings.topology, None)
    if settings.topology_file is not None and found is None:
        nodes, applied = topology.read(settings.topology_file)
    parts = Components(settings, nodes, applied, board or Board())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with parts.running():
            yield {SERVICE: parts.service}

    app = FastAPI(title="pd-proxy", lifespan=lifespan, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)
    add_routes(app, parts)
    add_stored_routes(app, parts.stored, settings.decode_silence_timeout_s)
    app.openapi = lambda: _with_generation_routes(app)  # type: ignore[method-assign]
    cross_origin = CrossOrigin(settings)
    generation = dict.fromkeys((*HANDED_OFF, *PASSED_ON), cross_origin.around(parts.endpoint))
    others = cross_origin.around(guarded(_Others(app, generation), parts.keys))
    parts.serve(Service(generation, others, limits_of(settings)))
    return app


class _Others(ASGIHandler):
    """What is no POST on a generation route; of those routes all other methods are refused here."""

    def __init__(self, app: FastAPI, generation: Any) -> None:
        super().__init__(app)
        for path in generation:
            app.add_api_route(path, _wrong_method, methods=["GET", "PUT", "DELETE", "PATCH"], include_in_schema=False)
        for path, reason in REFUSED.items():
            app.add_api_route(path, _refused(reason), methods=_ALL_METHODS, include_in_schema=False)


_ALL_METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH"]


def _refused(reason: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise HTTPException(404, f"this route is not served by pd-proxy: {reason}")

    return refuse


async def _wrong_method() -> None:
    raise HTTPException(405, headers={"allow": "POST"})


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own errors (unknown route, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for it
    kind = {404: "NotFoundError", 405: "MethodNotAllowedError"}.get(error.status_code, "InternalServerError")
    body = error_body(str(error.detail), kind, error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


_ERROR: JSONObject = {
    "description": "An error, in OpenAI's shape",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {"error": {"type": "object", "required": ["message", "type", "code"]}},
            }
        }
    },
}


def _with_generation_routes(app: FastAPI) -> JSONObject:
    """FastAPI's OpenAPI page, with the routes FastAPI does not see."""
    if app.openapi_schema is None:
        schema: JSONObject = get_openapi(title=app.title, version=app.version, routes=app.routes)
        answer = {"200": {"description": "As the decode node answers it: JSON, or server-sent events"}}
        content = {"application/json": {"schema": {"type": "object"}}}
        for path in (*HANDED_OFF, *PASSED_ON):
            operation = {"summary": path, "requestBody": {"content": content, "required": True}, "responses": answer}
            schema["paths"][path] = {"post": operation}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"]["default"] = {"description": "It says why"} if path in STATES else _ERROR
        app.openapi_schema = schema
    return app.openapi_schema
