"""Routes, and the one place where an error becomes an HTTP answer."""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engines import openai
from engines.base import JSONObject, Role
from engines.routes import HANDED_OFF, PASSED_ON
from engines.topology import Topology

from . import exchange, topology
from .background import Background
from .config import ProxySettings
from .errors import BadRequestError, NoNodeError, ProxyError
from .exchange import DataPlane, Exchange
from .health import Prober
from .keys import KeyCheck
from .media import Media
from .metrics import Metrics
from .pool import Node, Pool
from .release import Releaser
from .server import ClientConnection, ClientGoneError, refuse_unless_json
from .transfer import TransferWatch
from .transport import Headers, NodeClients

logger = logging.getLogger("pd_proxy")

_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PASSED_TO_NODES = frozenset({b"traceparent", b"tracestate", b"x-session-id", b"x-vllm-priority"})
_MOST_DETACHED_LEGS = 1024


class Parts:
    """What the application is made of, and the tasks that run as long as it does."""

    def __init__(self, settings: ProxySettings, nodes: Topology) -> None:
        self.settings = settings
        self.pool = Pool(nodes)
        self.node_headers = _node_headers(settings)
        plain = {name.decode(): value.decode() for name, value in self.node_headers}
        self.watch = TransferWatch(self.pool, plain)
        self.prober = Prober(settings, self.pool, plain)
        self.media = Media(settings)
        metrics = Metrics(self.pool, self.watch)
        clients = NodeClients(self.pool, settings.connect_timeout_s)
        self.plane = DataPlane(
            settings,
            self.pool,
            clients,
            metrics,
            Releaser(self.pool, clients, metrics, [(b"content-type", b"application/json"), *self.node_headers]),
            Background(_MOST_DETACHED_LEGS),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work, name=name) for name, work in self._work()]
        for task in tasks:
            task.add_done_callback(_report_death)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for part in (self.plane.background, self.plane.releaser, self.prober, self.watch, self.media):
                await part.close()
            self.plane.clients.close()

    def _work(self) -> list[tuple[str, Any]]:
        work = [("prober", self.prober.run()), ("transfer watch", self.watch.run())]
        if self.settings.topology_file:
            work.append(("topology", topology.follow(self.settings.topology_file, self.pool)))
        return work


class ProxyApp(FastAPI):
    """FastAPI, but for the routes that every token passes: those are answered before its machinery is entered."""

    direct: Mapping[str, ASGIApp]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self.direct:
            await self.direct[scope["path"]](scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def make_app(settings: ProxySettings) -> ProxyApp:
    """The proxy's ASGI application. The nodes of a topology file are read here: raises TopologyError."""
    nodes = topology.read(settings.topology_file) if settings.topology_file else settings.topology
    parts = Parts(settings, nodes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with parts.running():
            yield

    app = ProxyApp(title="pd-proxy", lifespan=lifespan)
    app.add_exception_handler(HTTPException, _http_error)
    generation: ASGIApp = _Generation(parts)
    if settings.api_keys:
        app.add_middleware(KeyCheck, keys=settings.api_keys)
        generation = KeyCheck(generation, settings.api_keys)
    app.direct = dict.fromkeys((*HANDED_OFF, *PASSED_ON), generation)
    for path in app.direct:  # their other methods are FastAPI's to refuse
        app.router.routes.append(Route(path, generation, methods=["POST"]))
    _add_information_routes(app, parts)
    app.openapi = lambda: _with_generation_routes(app)  # type: ignore[method-assign]
    return app


def _add_information_routes(app: FastAPI, parts: Parts) -> None:
    pool, watch = parts.pool, parts.watch

    @app.get("/health")
    async def health() -> Response:
        """200 when at least one prefill and one decode node are usable; says of each node why it is not.

        "degraded": requests are answered, but KV does not move to some decode node, which computes prompts again.
        """
        stuck = any(watch.verdict(node) == "not moving" for node in pool.of(Role.DECODE))
        status = ("degraded" if stuck else "ok") if pool.can_serve() else "unavailable"
        nodes = [_node_health(node, watch) for node in pool]
        return JSONResponse({"status": status, "nodes": nodes}, 503 if status == "unavailable" else 200)

    @app.get("/v1/models")
    async def models() -> Response:
        """The models that both a prefill and a decode node serve."""
        if not pool.can_serve():
            return _error_response(NoNodeError("no usable pair of nodes", "See /health"))
        return JSONResponse({"object": "list", "data": pool.models()})

    @app.get("/version")
    async def version() -> Response:
        """The version of the engines, as a decode node gives it."""
        try:
            node = pool.choose(Role.DECODE)
            with node.lease():
                answer = await parts.plane.clients.of(node).request(b"GET", b"/version", parts.node_headers, b"")
                return Response(await answer.load(), answer.status, media_type="application/json")
        except ProxyError as exc:
            return _error_response(exc)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(parts.plane.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _node_health(node: Node, watch: TransferWatch) -> JSONObject:
    health: JSONObject = {
        "name": node.spec.name,
        "role": node.spec.role,
        "usable": node.usable,
        "problem": node.problem,
        "in_flight": node.in_flight,
    }
    if node.spec.role is Role.DECODE:
        health["kv"] = watch.verdict(node)
    return health


class _Generation:
    """A generation route as a bare ASGI endpoint: FastAPI's request machinery costs more than the whole exchange."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._plane = parts.plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = ClientConnection(scope, receive, send)
        request_id = _request_id(client.header(b"x-request-id"))
        current: Exchange | None = None
        status = 499  # the client left; nobody hears it, the metrics tell it
        try:
            request = await self._read(scope, client, request_id)
            current = Exchange(self._plane, request, client)
            await _while_connected(client, current)
            status = current.status
        except ClientGoneError:
            pass
        except ProxyError as exc:
            status = exc.status
            await _tell(client, exc, request_id)
        except Exception:
            logger.exception("request %s failed in the proxy itself", request_id)
            status = 500
            await _tell(client, ProxyError("the proxy failed; its log tells more", f"Request {request_id}"), request_id)
        finally:
            path = current.path if current else "none"
            self._plane.metrics.requests.labels(scope["path"], path, str(status)).inc()

    async def _read(self, scope: Scope, client: ClientConnection, request_id: str) -> exchange.Request:
        refuse_unless_json(client)
        raw = await client.body(self._plane.settings.max_body_bytes)
        try:
            body = openai.checked_body(orjson.loads(raw))
        except orjson.JSONDecodeError as exc:
            raise BadRequestError(f"the request body is not valid JSON: {exc}") from exc
        except openai.InvalidBodyError as exc:
            raise BadRequestError(str(exc), param=exc.param) from exc
        body = await self._parts.media.inlined(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode("latin-1")),
            *self._parts.node_headers,
            *(header for header in scope["headers"] if header[0] in _PASSED_TO_NODES),
        ]
        return exchange.Request(scope["path"], body, request_id, headers)


async def _while_connected(client: ClientConnection, current: Exchange) -> None:
    """Run the exchange; stop it, and with it both legs, when the client leaves. Raises ClientGoneError then."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  uvicorn runs every request in one
    try:
        with client.cancelled_when_gone(task):
            await current.run()
    except asyncio.CancelledError:
        if not client.is_gone:
            raise
        task.uncancel()
        raise ClientGoneError from None


async def _tell(client: ClientConnection, error: ProxyError, request_id: str) -> None:
    """The error to the client: as an answer, or, when one has begun, as a last event and an end that is none."""
    body = orjson.dumps(openai.error_body(str(error), error.kind, error.status, error.param))
    if client.started:
        await client.write(b"data: " + body + b"\n\n")
        client.break_off()
        return
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode("latin-1"))]
    if isinstance(error, NoNodeError):
        headers.append((b"retry-after", b"2"))
    await client.start(error.status, headers)
    await client.write(body)
    await client.finish()


def _node_headers(settings: ProxySettings) -> Headers:
    """The proxy's own key for its nodes; a client's key never goes there."""
    key = settings.node_api_key
    return [(b"authorization", b"Bearer " + key.encode())] if key else []


def _request_id(given: bytes | None) -> str:
    """The client's own id when it is harmless in a log and a header, else a new one."""
    if given is not None and _SAFE_REQUEST_ID.fullmatch(given):
        return given.decode("latin-1")
    return uuid.uuid4().hex


def _error_response(error: ProxyError) -> JSONResponse:
    return JSONResponse(openai.error_body(str(error), error.kind, error.status, error.param), error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own errors (unknown route, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for it
    kind = {404: "NotFoundError", 405: "MethodNotAllowedError"}.get(error.status_code, "InternalServerError")
    body = openai.error_body(str(error.detail), kind, error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


def _with_generation_routes(app: FastAPI) -> JSONObject:
    """FastAPI's OpenAPI page, with the routes FastAPI does not see."""
    if app.openapi_schema is None:
        schema: JSONObject = get_openapi(title=app.title, version=app.version, routes=app.routes)
        answer = {"200": {"description": "As the decode node answers it: JSON, or server-sent events"}}
        content = {"application/json": {"schema": {"type": "object"}}}
        for path in (*HANDED_OFF, *PASSED_ON):
            operation = {"summary": path, "requestBody": {"content": content, "required": True}, "responses": answer}
            schema["paths"][path] = {"post": operation}
        app.openapi_schema = schema
    return app.openapi_schema


def _report_death(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("background task %s died", task.get_name(), exc_info=task.exception())
