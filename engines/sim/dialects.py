"""The responses and messages routes, spoken as chat inside: a body becomes a chat body, an answer its own shape."""

from collections.abc import Iterator
from typing import Any, Literal

import orjson

from ..base import JSONObject
from .request import SchemaError

Dialect = Literal["responses", "messages"]


def as_chat(dialect: Dialect, body: Any) -> JSONObject:
    """Raises SchemaError. Neither route has `min_tokens` or `n`; responses has `ignore_eos`."""
    if not isinstance(body, dict):
        raise SchemaError("Input should be a valid dictionary")
    keep = ("model", "stream", "temperature", "kv_transfer_params", "ignore_eos", "stop_token_ids", "logit_bias")
    chat: JSONObject = {key: body[key] for key in keep if key in body}
    if dialect == "responses":
        chat["messages"] = _input_messages(body.get("input"))
        chat["max_tokens"] = body.get("max_output_tokens")
        return chat
    if not isinstance(body.get("messages"), list) or not isinstance(body.get("max_tokens"), int):
        raise SchemaError("messages and max_tokens: Field required")
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    chat["messages"] = [*system, *body["messages"]]
    chat["max_tokens"] = body["max_tokens"]
    return chat


def answer(dialect: Dialect, chat: JSONObject) -> JSONObject:
    """A whole chat answer, in the dialect's shape."""
    choice = chat["choices"][0]
    text, stopped = choice["message"]["content"], choice["finish_reason"] != "length"
    asked, told = chat["usage"]["prompt_tokens"], chat["usage"]["prompt_tokens_details"]
    usage = {"input_tokens": asked, "output_tokens": chat["usage"]["completion_tokens"]}
    if dialect == "messages":
        body: JSONObject = {"id": chat["id"], "type": "message", "role": "assistant", "model": chat["model"]}
        reason = "end_turn" if stopped else "max_tokens"
        if told is not None:
            cached = told["cached_tokens"]
            usage |= {"input_tokens": asked - cached, "cache_read_input_tokens": cached}
        return body | {"content": [{"type": "text", "text": text}], "stop_reason": reason, "usage": usage}
    usage["input_tokens_details"] = told
    output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}]
    body = {"id": chat["id"], "object": "response", "model": chat["model"], "output": output, "usage": usage}
    details = None if stopped else {"reason": "max_output_tokens"}
    return body | {"status": "completed" if stopped else "incomplete", "incomplete_details": details}


def events(dialect: Dialect, whole: JSONObject) -> Iterator[bytes]:
    """A stream of the whole answer: one delta and an end."""
    if dialect == "messages":
        text = whole["content"][0]["text"]
        yield _event("message_start", {"message": {**whole, "content": []}})
        yield _event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}})
        yield _event("message_delta", {"delta": {"stop_reason": whole["stop_reason"]}, "usage": whole["usage"]})
        yield _event("message_stop", {})
        return
    text = whole["output"][0]["content"][0]["text"]
    yield _event("response.created", {"response": {**whole, "output": []}})
    yield _event("response.output_text.delta", {"delta": text})
    yield _event("response.completed", {"response": whole})


def opening() -> bytes:
    """What a stream of responses begins with, before the engine has the request."""
    return _event("response.created", {"response": {"status": "in_progress", "output": []}})


def error(dialect: Dialect, message: str) -> bytes:
    """An error inside a stream (vllm/entrypoints/anthropic/serving.py)."""
    if dialect == "messages":
        return _event("error", {"error": {"type": "internal_error", "message": message}})
    return _event("response.failed", {"response": {"status": "failed", "error": {"message": message}}})


def _event(kind: str, data: JSONObject) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **data}) + b"\n\n"


def _input_messages(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list):
        return value
    raise SchemaError("input: Field required")
