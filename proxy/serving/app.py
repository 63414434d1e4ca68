"""Routes, and the one place where an error becomes an HTTP answer."""

import asyncio
import logging
import math
import re
import time
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

from engines.base import JSONObject, Role, new_id
from engines.openai.errors import error_body
from engines.openai.routes import HANDED_OFF, PASSED_ON
from engines.topology import Topology
from engines.vllm import bodies

from ..downstream import protocol as server
from ..downstream.protocol import ClientConnection, refuse_unless_json
from ..errors import (
    BadRequestError,
    ClientGoneError,
    ClientStalledError,
    NodeAnsweredError,
    NodeError,
    NoNodeError,
    OverloadedError,
    ProxyError,
    ShuttingDownError,
)
from ..exchange import exchange
from ..exchange.exchange import DataPlane, Exchange
from ..exchange.media import Media
from ..exchange.release import Releaser
from ..exchange.retry import RetryBudget
from ..nodes import topology
from ..nodes.fleet import Limits, Node, Pool, Share
from ..nodes.prober import Prober
from ..nodes.transfer import TransferWatch
from ..settings import ProxySettings
from ..upstream.client import Deadline, Headers, NodeClients
from . import admin, logs
from .admission import Admission
from .board import Board
from .keys import KeyCheck
from .metrics import Metrics, observe_loop
from .shutdown import Shutdown

logger = logging.getLogger("pd_proxy")

_PRIORITIES = 1000
_SHARE_EVERY_S = 0.1
_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PASSED_TO_NODES = frozenset({b"traceparent", b"tracestate", b"x-session-id", b"x-vllm-priority"})


class Parts:
    """What the application is made of, and the tasks that run as long as it does."""

    def __init__(self, settings: ProxySettings, nodes: Topology, board: Board) -> None:
        self.settings = settings
        self.board = board
        limits = Limits(settings.max_node_in_flight, settings.max_node_waiting, settings.max_node_kv_usage)
        self.pool = Pool(nodes, limits)
        self.node_headers = _node_headers(settings)
        self.admission = Admission(settings, self.pool.has_room)
        self.watch = TransferWatch(self.pool)
        self.prober = Prober(settings, self.pool, self.watch, self.node_headers, self.admission.let_in)
        self.media = Media(settings)
        self.shutdown = Shutdown(settings.shutdown_delay_s)
        metrics = Metrics()
        clients = NodeClients(self.pool, settings.connect_timeout_s)
        self.plane = DataPlane(
            settings,
            self.pool,
            clients,
            metrics,
            Releaser(self.pool, clients, metrics, [(b"content-type", b"application/json"), *self.node_headers]),
            self.admission,
            RetryBudget(),
        )
        if board.inherited is not None:
            self._adopt(board.inherited)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.prober.round()  # who accepts requests knows the nodes: a new worker may not refuse what others serve
        tasks = [asyncio.create_task(work, name=name) for name, work in self._work()]
        for task in tasks:
            task.add_done_callback(_report_death)
        try:
            with self.shutdown.announced():
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for part in (self.plane.releaser, self.prober, self.media):
                await part.close()
            self.plane.clients.close()
            self.board.close()

    def _work(self) -> list[tuple[str, Any]]:
        settings = self.settings
        late = server.close_the_late(settings.head_timeout_s, settings.body_timeout_s, settings.client_stall_timeout_s)
        work = [
            ("prober", self.prober.run()),
            ("late clients", late),
            ("event loop", observe_loop(self.plane.metrics)),
        ]
        if self.board.is_shared:
            work.append(("board", self._share_for_ever()))
        if self.settings.topology_file:
            work.append(("topology", topology.follow(self.settings.topology_file, self.pool, self.prober.meet)))
        if self.settings.admin_port and self.settings.topology_file and self.settings.admin_key:
            listening = (self.settings.admin_host, self.settings.admin_port)
            work.append(("admin", admin.serve(*listening, self.settings.topology_file, self.settings.admin_key)))
        return work

    # -- what the worker processes tell each other

    async def _share_for_ever(self) -> None:
        while True:
            self.share()
            await asyncio.sleep(_SHARE_EVERY_S)

    def share(self) -> None:
        """Tell the others this worker's figures, and hear theirs.

        Before every scrape too: a counter would fall if a worker died with what it alone knew and had told a scrape.
        """
        self.plane.metrics.queued = self.admission.waiting
        if self.board.is_shared:
            shares = {node.spec.name: [node.in_flight, node.hand_offs, node.handed_tokens] for node in self.pool}
            self.board.write({"metrics": self.plane.metrics.snapshot(), "nodes": shares})
            self.board.look()
            self._take_in_the_others()

    def _take_in_the_others(self) -> None:
        alive, all_rows = self.board.others(), self.board.others(alive=False)
        for node in self.pool:
            now = [row["nodes"].get(node.spec.name, (0, 0, 0)) for row in alive]
            ever = [row["nodes"].get(node.spec.name, (0, 0, 0)) for row in all_rows]
            hand_offs, tokens = sum(share[1] for share in ever), sum(share[2] for share in ever)
            node.elsewhere = Share(sum(share[0] for share in now), hand_offs, tokens)

    def _adopt(self, row: JSONObject) -> None:
        """The row of a worker that died: its counts are ours now, its requests are gone."""
        self.plane.metrics.adopt(row["metrics"])
        for node in self.pool:
            _, node.hand_offs, node.handed_tokens = row["nodes"].get(node.spec.name, (0, 0, 0))


class ProxyApp(FastAPI):
    """FastAPI, but for the routes that every token passes: those are answered before its machinery is entered."""

    direct: Mapping[str, ASGIApp]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self.direct:
            await self.direct[scope["path"]](scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def make_app(settings: ProxySettings, board: Board | None = None) -> ProxyApp:
    """The proxy's ASGI application. The nodes of a topology file are read here: raises TopologyError."""
    nodes = topology.read(settings.topology_file) if settings.topology_file else settings.topology
    parts = Parts(settings, nodes, board or Board())

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

    def can_serve() -> bool:
        may_do_without = parts.settings.without_prefill == "aggregated"
        return pool.has(Role.DECODE) and (may_do_without or pool.has(Role.PREFILL))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """200 when requests are answered; says of each node why it gets none.

        "degraded": they are, but decode nodes compute prompts: no prefill node is usable, or KV does not move.
        "stopping" (503): they still are, but send no more.
        """
        stuck = any(watch.verdict(node) == "not moving" for node in pool.of(Role.DECODE))
        status = ("ok" if pool.has(Role.PREFILL) and not stuck else "degraded") if can_serve() else "unavailable"
        status = "stopping" if parts.shutdown.has_begun else status
        nodes = [_node_health(node, watch) for node in pool]
        return JSONResponse({"status": status, "nodes": nodes}, 503 if status in ("unavailable", "stopping") else 200)

    @app.get("/v1/models")
    async def models() -> Response:
        """The models that both a prefill and a decode node serve."""
        if not can_serve():
            return _error_response(NoNodeError("no usable pair of nodes", "See /health"))
        return JSONResponse({"object": "list", "data": pool.models()})

    @app.get("/version")
    async def version() -> Response:
        """The version of the engines, as a decode node gives it."""
        try:
            node = pool.choose(Role.DECODE)
            with node.lease():
                deadline = Deadline(parts.settings.probe_timeout_s, "answer")
                answer = await parts.plane.clients.of(node).request(
                    b"GET", b"/version", parts.node_headers, b"", deadline=deadline
                )
                return Response(await answer.load(), answer.status, media_type="application/json")
        except ProxyError as exc:
            return _error_response(exc)

    @app.get("/metrics")
    async def metrics() -> Response:
        parts.share()
        return Response(
            parts.plane.metrics.text(parts.board, pool, watch), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _node_health(node: Node, watch: TransferWatch) -> JSONObject:
    health: JSONObject = {
        "name": node.spec.name,
        "role": node.spec.role,
        "usable": node.usable,
        "problem": node.why_not,
        "in_flight": node.load,
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
        started = time.perf_counter()
        metrics = self._plane.metrics
        client = ClientConnection(scope, receive, send)
        request_id = _request_id(client.header(b"x-request-id"))
        current: Exchange | None = None
        status, error = 499, ""  # the client left; nobody hears it, the metrics tell it
        metrics.in_flight += 1
        try:
            request = await self._read(scope, client, request_id)
            current = Exchange(self._plane, request, client)
            await _while_connected(client, current)
            status = current.status
        except ClientGoneError:
            pass
        except ProxyError as exc:
            status, error = exc.status, str(exc)
            _tell(client, exc, request_id)
        except asyncio.CancelledError:  # uvicorn's, when the grace time is over
            status, error = 503, "shutting down"
            _tell(client, ShuttingDownError("the proxy is shutting down"), request_id)
        except Exception as exc:
            logger.exception("request %s failed in the proxy itself", request_id)
            status, error = 500, repr(exc)
            _tell(client, ProxyError("the proxy failed; its log tells more", f"Request {request_id}"), request_id)
        finally:
            seconds = time.perf_counter() - started
            metrics.in_flight -= 1
            metrics.requests.count(scope["path"], current.path if current else "none", str(status))
            metrics.request_seconds.observe(seconds)
            if error or self._plane.settings.log_requests == "all":
                logs.exchange(request_id, scope["path"], status, seconds, current, error)

    async def _read(self, scope: Scope, client: ClientConnection, request_id: str) -> exchange.Request:
        refuse_unless_json(client)
        timeout_s = _timeout_s(client.header(b"x-request-timeout"), self._plane.settings.request_timeout_s)
        raw = await client.body(self._plane.settings.max_body_bytes)
        try:
            body = bodies.checked_body(orjson.loads(raw))
        except orjson.JSONDecodeError as exc:
            raise BadRequestError(f"the request body is not valid JSON: {exc}") from exc
        except bodies.InvalidBodyError as exc:
            raise BadRequestError(str(exc), param=exc.param) from exc
        body = await self._parts.media.inlined(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode("latin-1")),
            *self._parts.node_headers,
            *(header for header in scope["headers"] if header[0] in _PASSED_TO_NODES),
        ]
        return exchange.Request(
            scope["path"],
            body,
            request_id,
            headers,
            timeout_s,
            client=client.header(b"authorization") or b"",
            priority=_priority(body, client.header(b"x-vllm-priority")),
        )


async def _while_connected(client: ClientConnection, current: Exchange) -> None:
    """Run the exchange; tell it when the client leaves. Raises ClientGoneError then."""
    try:
        with client.calling_when_gone(current.client_left):
            await current.run()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not client.is_gone or task is None:
            raise
        task.uncancel()
        raise ClientGoneError from None


def _tell(client: ClientConnection, error: ProxyError, request_id: str) -> None:
    """The error to the client: as an answer, or, when one has begun, as a last event and an end that is none."""
    body = orjson.dumps(error_body(str(error), error.kind, error.status, error.param))
    if client.started:
        client.write(b"data: " + body + b"\n\n")
        client.break_off(at_once=isinstance(error, ClientStalledError))
        return
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode("latin-1"))]
    if isinstance(error, NodeAnsweredError):
        headers += [header for header in error.headers if header[0] == b"retry-after"]
    elif isinstance(error, NoNodeError | OverloadedError):
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    elif isinstance(error, NodeError) and not error.may_be_retried:
        headers.append((b"x-should-retry", b"false"))  # OpenAI's clients obey it; by themselves they retry every 5xx
    client.answer(error.status, headers, body)


def _priority(body: JSONObject, header: bytes | None) -> int:
    """VLLM's own field, or its header; 0 when there is none, or none that is a number (a node will say so)."""
    given = body.get("priority", header)
    try:
        return max(-_PRIORITIES, min(_PRIORITIES, int(given or 0)))
    except (TypeError, ValueError):
        return 0


def _timeout_s(given: bytes | None, most_s: float) -> float:
    """The client's own limit for its request, never more than ours. Raises BadRequestError when it is no number."""
    if given is None:
        return most_s
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise BadRequestError("x-request-timeout is a number of seconds above 0")
    return min(seconds, most_s)


def _node_headers(settings: ProxySettings) -> Headers:
    """The proxy's own key for its nodes; a client's key never goes there."""
    key = settings.node_api_key
    return [(b"authorization", b"Bearer " + key.encode())] if key else []


def _request_id(given: bytes | None) -> str:
    """The client's own id when it is harmless in a log and a header, else a new one."""
    if given is not None and _SAFE_REQUEST_ID.fullmatch(given):
        return given.decode("latin-1")
    return new_id()


def _error_response(error: ProxyError) -> JSONResponse:
    return JSONResponse(error_body(str(error), error.kind, error.status, error.param), error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own errors (unknown route, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for it
    kind = {404: "NotFoundError", 405: "MethodNotAllowedError"}.get(error.status_code, "InternalServerError")
    body = error_body(str(error.detail), kind, error.status_code)
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
