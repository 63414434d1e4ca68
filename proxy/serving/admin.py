"""Nodes added, drained and removed at run time, and the page: its own listener, its own key.

Without a key only this machine reaches it, and of what a browser sends only the page's own is heard.

What it changes is the topology file, by rename, which every worker process follows; so there is one way for nodes to
come and go, whoever decides it.

    GET    /nodes               the topology
    PUT    /nodes/NAME          add a node, or change one: {"role": …, "url": …, "bootstrap": …, "drain": false}
    DELETE /nodes/NAME          remove it; what runs there goes on to its end
    POST   /nodes/NAME/drain    no new requests; POST /nodes/NAME/undrain takes that back
"""

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from uvicorn.config import Config
from uvicorn.server import ServerState

from engines.base import JSONObject
from engines.openai.errors import error_body
from engines.topology import Node, Topology

from ..downstream.asgi import ASGIHandler
from ..downstream.protocol import SERVICE, ClientProtocol
from ..downstream.request import ClientRequest
from ..downstream.service import ConnectionLimits, Handler, Service
from ..nodes import topology
from ..nodes.topology import TopologyError
from ..settings import ProxySettings
from .guard import from_here, guarded
from .keys import KeyRing
from .page.routes import OPEN_PATHS, add_routes
from .view import View

logger = logging.getLogger("pd_proxy.admin")
_TRY_TO_LISTEN_EVERY_S = 1.0


class RefusedError(Exception):
    """What is asked for cannot be done; the message says why."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def make_admin_handler(file: Path, key: str | None, view: View) -> Handler:
    """Answers the admin routes; every one needs the key, if there is one, but the page, which asks for it."""
    app = FastAPI(title="pd-proxy admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        kind = "NotFoundError" if error.status == 404 else "BadRequestError"
        return JSONResponse(error_body(str(error), kind, error.status), error.status)

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> Response:
        kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
        return JSONResponse(error_body(str(error.detail), kind, error.status_code), error.status_code)

    @app.get("/nodes")
    async def nodes() -> JSONObject:
        return _read(file).model_dump(mode="json")

    @app.put("/nodes/{name}")
    async def put(name: str, request: Request) -> JSONObject:
        try:
            given = orjson.loads(await request.body())
            node = Node.model_validate({"name": name, **given})
        except (orjson.JSONDecodeError, TypeError) as exc:
            raise RefusedError("the body is not a JSON object", 400) from exc
        except ValidationError as exc:
            raise RefusedError(_first_of(exc), 400) from exc
        if node.name != name:
            raise RefusedError(f"the node's name is {node.name!r} in the body and {name!r} in the path", 400)
        if node.log is not None:
            raise RefusedError("which file is a node's log is said in the topology file only", 400)
        for url in filter(None, (node.url, node.bootstrap)):
            await _check_address(url)
        return _change(file, lambda known: {**known, name: node})

    @app.delete("/nodes/{name}")
    async def delete(name: str) -> JSONObject:
        return _change(file, lambda known: {other: node for other, node in known.items() if other != name}, name)

    @app.post("/nodes/{name}/drain")
    async def drain(name: str) -> JSONObject:
        return _change(file, lambda known: {**known, name: known[name].model_copy(update={"drain": True})}, name)

    @app.post("/nodes/{name}/undrain")
    async def undrain(name: str) -> JSONObject:
        return _change(file, lambda known: {**known, name: known[name].model_copy(update={"drain": False})}, name)

    add_routes(app, view)
    if key is None:
        return from_here(_audited(ASGIHandler(app)))
    return guarded(_audited(ASGIHandler(app)), KeyRing([key], None), OPEN_PATHS)


def _audited(handler: ASGIHandler) -> Handler:
    """Every change is in the log, with who asked for it."""

    def audited(request: ClientRequest) -> Coroutine[Any, Any, None]:
        if request.method != b"GET":
            address = request.connection.client_address
            logger.info("%s %s from %s", request.method.decode("latin-1"), request.path, address and address[0])
        return handler(request)

    return audited


async def serve(settings: ProxySettings, view: View) -> None:
    """Listen until cancelled. Of several workers one has the port; when it dies, another takes it."""
    host, port, file = settings.admin_host, settings.admin_port, settings.topology_file
    assert port is not None and file is not None  # noqa: PT018, S101  asked by whoever calls
    config = Config("", log_config=None, access_log=False, server_header=False)
    service = Service({}, make_admin_handler(file, settings.admin_key, view), ConnectionLimits())
    state = ServerState()
    loop = asyncio.get_running_loop()
    is_told = False
    while True:
        try:
            server = await loop.create_server(
                lambda: ClientProtocol(config, state, {SERVICE: service}, loop), host, port, reuse_port=False
            )
        except OSError as exc:
            if settings.workers == 1 and not is_told:
                logger.warning("admin cannot listen on %s:%d: %s; it goes on trying", host, port, exc.strerror)
                is_told = True
            await asyncio.sleep(_TRY_TO_LISTEN_EVERY_S)
            continue
        logger.info("admin listens on http://%s:%d", host, port)
        async with server, asyncio.TaskGroup() as group:
            group.create_task(service.watch())
            group.create_task(view.run())
            group.create_task(server.serve_forever())


def _read(file: Path) -> Topology:
    """Raises RefusedError when the file is no topology now."""
    try:
        return topology.read(file)[0]
    except TopologyError as exc:
        raise RefusedError(str(exc), 409) from exc


def _change(file: Path, change: Callable[[dict[str, Node]], dict[str, Node]], must_exist: str = "") -> JSONObject:
    """Raises RefusedError when the topology would not be one any more."""
    before = _read(file)
    known = {node.name: node for node in before.nodes}
    if must_exist and must_exist not in known:
        raise RefusedError(f"there is no node {must_exist!r}", 404)
    try:
        after = Topology.model_validate(before.model_dump() | {"nodes": tuple(change(known).values())})
    except ValidationError as exc:
        raise RefusedError(_first_of(exc), 400) from exc
    topology.write(file, after)
    return after.model_dump(mode="json")


async def _check_address(url: str) -> None:
    """Nodes live on private networks, so those are fine; what only a machine's own services listen on is not."""
    host = urlsplit(url).hostname or ""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError as exc:
        raise RefusedError(f"{host} has no address", 400) from exc
    for address in {ipaddress.ip_address(str(entry[4][0]).split("%", 1)[0]) for entry in found}:
        if address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved:
            raise RefusedError(f"{host} is {address}, which is no address of a node", 400)


def _first_of(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
