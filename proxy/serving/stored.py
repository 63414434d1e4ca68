"""Routes of a stored response: told, followed and cancelled by the node that has it."""

from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from engines.openai.errors import error_body

from ..errors import ProxyError
from ..exchange.stored import StoredResponses
from ..nodes.node import Node
from ..upstream.client import Answer
from ..upstream.deadline import Deadline

_WANTS_STREAM = frozenset({"true", "1", "yes", "on", "t", "y"})
"""What pydantic takes for a boolean."""


def add_stored_routes(app: FastAPI, stored: StoredResponses, silence_s: float) -> None:
    """`silence_s`: how long a stream's node may say nothing."""

    @app.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, request: Request) -> Response:
        """As it is now; with `stream`, its events, those that were and those that come."""
        try:
            if request.query_params.get("stream", "").lower() not in _WANTS_STREAM:
                told = await stored.get(response_id)
                return _unknown(response_id) if told is None else Response(told, media_type="application/json")
            node = await stored.node_of(response_id)
            if node is None:
                return _unknown(response_id)
            return await _followed(node, response_id, request.url.query.encode())
        except ProxyError as exc:
            return _refused(exc)

    async def _followed(node: Node, response_id: str, query: bytes) -> Response:
        answer = await stored.stream(node, response_id, query)
        if answer.status == 200:
            return StreamingResponse(_chunks(answer, silence_s), media_type="text/event-stream")
        try:
            return Response(await answer.load(), answer.status, media_type="application/json")
        finally:
            answer.close()

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        """Of one that is made in the background."""
        try:
            node = await stored.node_of(response_id)
            if node is None:
                return _unknown(response_id)
            status, body = await stored.cancel(node, response_id)
        except ProxyError as exc:
            return _refused(exc)
        return Response(body, status, media_type="application/json")


async def _chunks(answer: Answer, silence_s: float) -> AsyncIterator[bytes]:
    try:
        while chunk := await answer.chunk(Deadline(silence_s, "send anything")):
            yield chunk
    finally:
        answer.close()


def _unknown(response_id: str) -> Response:
    """In vLLM's words (entrypoints/openai/responses/serving.py)."""
    message = f"Response with id '{response_id}' not found."
    return JSONResponse(error_body(message, "invalid_request_error", 404, "response_id"), 404)


def _refused(error: ProxyError) -> Response:
    return JSONResponse(error_body(str(error), error.kind, error.status, error.param), error.status)
