"""The shape of an error, as OpenAI's clients and vLLM know it."""

from ..base import JSONObject


def error_body(message: str, kind: str, status: int, param: str | None = None) -> JSONObject:
    """An error in OpenAI's shape, with the fields vLLM fills."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
