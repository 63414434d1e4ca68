"""The shape of an error, as OpenAI's and Anthropic's clients and vLLM know it."""

from typing import Any

import orjson

from ..base import JSONObject
from .routes import MESSAGES, RESPONSES


def error_body(message: str, kind: str, status: int, param: str | None = None) -> JSONObject:
    """An error in OpenAI's shape, with the fields vLLM fills."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_event(path: str, body: JSONObject) -> bytes:
    """The same inside a stream of the route at `path`, in the words of that route."""
    error = body["error"]
    if path == MESSAGES.path:
        told: JSONObject = {"type": "error", "error": {"type": "api_error", "message": error["message"]}}
        return b"event: error\ndata: " + orjson.dumps(told) + b"\n\n"
    if path == RESPONSES.path:
        told = {"type": "error", "code": str(error["code"]), "message": error["message"], "param": error["param"]}
        return b"event: error\ndata: " + orjson.dumps(told) + b"\n\n"
    return b"data: " + orjson.dumps(body) + b"\n\n"


def error_in(raw: bytes) -> JSONObject:
    """The error that an answer's body or an event's data carries; empty when it carries none that can be read."""
    try:
        error: Any = orjson.loads(raw)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}
