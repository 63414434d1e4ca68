"""The routes that tell: how the proxy and its nodes are, what they serve, and the figures."""

from collections.abc import Callable

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from engines.base import JSONObject, Role
from engines.openai.errors import error_body

from ..errors import NoNodeError, ProxyError
from ..nodes.fleet import Fleet
from ..nodes.node import Node
from ..nodes.pairs import Outcome
from ..nodes.transfer import TransferWatch
from . import exposition
from .assembly import Components


def add_routes(app: FastAPI, parts: Components) -> None:
    """To the application."""
    fleet, watch, condition = parts.fleet, parts.watch, parts.condition

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """200 when requests are answered; says of each node why it gets none."""
        now = condition.word()
        nodes = [_node_health(node, watch if fleet.connector.moves_kv else None) for node in fleet]
        told: JSONObject = {"status": now, "nodes": nodes}
        if parts.plane.split.is_wanted:
            told["split"] = {"crossover_tokens": parts.plane.split.crossover_tokens}
        if parts.settings.canary_interval_s:
            told["canary"] = _canary_health(fleet)
        if parts.supervisor.down:
            told["tasks_down"] = parts.supervisor.down
        return JSONResponse(told, 503 if now in ("unavailable", "stopping") else 200)

    @app.api_route("/ping", methods=["GET", "HEAD", "POST"])
    @app.api_route("/livez", methods=["GET", "HEAD"])
    async def livez() -> Response:
        """503 when only a restart of the proxy can help. Nodes that are down are no reason."""
        hopeless = parts.supervisor.is_hopeless
        return JSONResponse({"tasks_down": parts.supervisor.down}, 503 if hopeless else 200)

    @app.api_route("/readyz", methods=["GET", "HEAD"])
    async def readyz() -> Response:
        """200 when requests should be sent here."""
        now = condition.word()
        return JSONResponse({"status": now}, 503 if now in ("unavailable", "stopping") else 200)

    _add_model_routes(app, parts, condition.can_serve)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        parts.sharing.share()
        text = exposition.text(parts.plane.metrics, parts.board, fleet, watch, parts.plane.split, parts.supervisor.down)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


STATES = ("/health", "/ping", "/livez", "/readyz", "/metrics")
"""Routes whose answers are no OpenAI API's, and their errors neither."""


def _add_model_routes(app: FastAPI, parts: Components, can_serve: Callable[[], bool]) -> None:
    fleet = parts.fleet

    @app.get("/v1/models")
    async def models() -> Response:
        """The models that both a prefill and a decode node serve."""
        if not can_serve():
            return _error_response(NoNodeError("no usable pair of nodes", "See /health"))
        return JSONResponse({"object": "list", "data": fleet.models()})

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> Response:
        """One of them."""
        if not can_serve():
            return _error_response(NoNodeError("no usable pair of nodes", "See /health"))
        card = next((card for card in fleet.models() if card["id"] == model), None)
        if card is None:
            return JSONResponse(error_body(f"The model `{model}` does not exist.", "NotFoundError", 404, "model"), 404)
        return JSONResponse(card)

    @app.get("/version")
    async def version() -> Response:
        """The version of the engines, as a decode node gives it."""
        found = fleet.version()
        if found is None:
            return _error_response(NoNodeError(f"no usable decode node: {fleet.why_none(Role.DECODE)}", "See /health"))
        return JSONResponse({"version": found})


def _node_health(node: Node, watch: TransferWatch | None) -> JSONObject:
    """`watch`: where KV is to move."""
    health: JSONObject = {
        "name": node.spec.name,
        "role": node.spec.role,
        "usable": node.usable,
        "problem": node.why_not,
        "in_flight": node.load,
    }
    if node.leaning is not None:
        health["leaning"] = node.leaning
    if watch is not None and node.spec.role.does(Role.DECODE):
        health["kv"] = watch.verdict(node)
    return health


def _canary_health(fleet: Fleet) -> JSONObject:
    """How many pairs wait for their first verdict, and of those that were judged what is wrong."""
    found = [(pair, fleet.pairs.verdict(pair)) for pair in fleet.usable_pairs()]
    judged = [(prefill.spec.name, decode.spec.name, verdict) for (prefill, decode), verdict in found if verdict]

    def told(outcome: Outcome) -> list[JSONObject]:
        return [
            {"prefill": prefill, "decode": decode, "problem": verdict.problem}
            for prefill, decode, verdict in judged
            if verdict.outcome == outcome
        ]

    return {
        "waiting": len(found) - len(judged),
        "same": len(told("same")),
        "differs": told("differs"),
        "not_judged": told("not judged"),
    }


def _error_response(error: ProxyError) -> JSONResponse:
    return JSONResponse(error_body(str(error), error.kind, error.status, error.param), error.status)
