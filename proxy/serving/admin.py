"""Nodes added, drained and removed at run time: its own listener, its own key.

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
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from engines.base import JSONObject
from engines.openai.errors import error_body
from engines.topology import Node, Topology

from ..nodes import topology
from ..nodes.topology import TopologyError
from .keys import KeyCheck

logger = logging.getLogger("pd_proxy.admin")
_TRY_TO_LISTEN_EVERY_S = 1.0


class RefusedError(Exception):
    """What is asked for cannot be done; the message says why."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def make_admin_app(file: Path, key: str) -> KeyCheck:
    """The ASGI application; every route needs the key."""
    app = FastAPI(title="pd-proxy admin", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        kind = "NotFoundError" if error.status == 404 else "BadRequestError"
        return JSONResponse(error_body(str(error), kind, error.status), error.status)

    @app.get("/nodes")
    async def nodes() -> JSONObject:
        return topology.read(file).model_dump(mode="json")

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

    return KeyCheck(app, [key], open_paths=frozenset())


async def serve(host: str, port: int, file: Path, key: str) -> None:
    """Listen until cancelled. Of several workers one has the port; when it dies, another takes it."""
    config = Config(make_admin_app(file, key), log_config=None, access_log=False, server_header=False, ws="none")
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    while True:
        try:
            server = await loop.create_server(
                lambda: HttpToolsProtocol(config, state, {}, loop), host, port, reuse_port=False
            )
        except OSError:
            await asyncio.sleep(_TRY_TO_LISTEN_EVERY_S)
            continue
        logger.info("admin listens on http://%s:%d", host, port)
        async with server:
            await server.serve_forever()


def _change(file: Path, change: Callable[[dict[str, Node]], dict[str, Node]], must_exist: str = "") -> JSONObject:
    """Raises RefusedError when the topology would not be one any more."""
    try:
        before = topology.read(file)
    except TopologyError as exc:
        raise RefusedError(str(exc), 409) from exc
    known = {node.name: node for node in before.nodes}
    if must_exist and must_exist not in known:
        raise RefusedError(f"there is no node {must_exist!r}", 404)
    try:
        after = Topology(connector=before.connector, nodes=tuple(change(known).values()))
    except ValidationError as exc:
        raise RefusedError(_first_of(exc), 400) from exc
    write(file, after)
    return after.model_dump(mode="json")


def write(file: Path, nodes: Topology) -> None:
    """Whole or not at all: a follower never reads half a file."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(nodes.model_dump_json(indent=1))
    unfinished.replace(file)


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
