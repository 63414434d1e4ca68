"""A client's body, looked through once: what it is, and what stands in the way of a hand-off.

The body is edited, never re-modelled: fields and numbers nobody here knows pass unchanged.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from ..base import JSONObject
from .routes import CHAT, RESPONSES

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params")
"""Never taken from a client: the wrong dictionary kills an engine or makes it dial any address (vLLM #47843)."""

_EXTRA_ARGUMENTS = "vllm_xargs"
"""vLLM's own way in: what a client puts there is where the engine looks for the transfer keys as well."""

_HARMLESS_TRANSFER_KEY = "prompt_token_ids"
"""The one key of them that vLLM documents for clients: the prompt, tokenized by them (renderers/online_renderer.py)."""

_TAKES_TOKEN_IDS = (CHAT.path, RESPONSES.path)
_CHARACTERS_A_TOKEN = 4
_TRUE = frozenset({"true", "1", "1.0", "yes", "y", "on", "t"})
_FALSE = frozenset({"false", "0", "0.0", "no", "n", "off", "f"})
"""What pydantic takes for a boolean."""
_LARGE_VALUE_BYTES = 64 * 1024


class InvalidBodyError(ValueError):
    """The client's body cannot be a request; `param` names the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(slots=True)
class Asked:
    """A client's request body and what was found in it.

    Large values of `body` may be `orjson.Fragment`s (`without_large_values`): passed on, never looked into.
    """

    body: JSONObject
    reason: str | None
    """Why it must take the aggregated path (one node does both phases), or None."""
    is_text: bool
    """No media in it, so that its prompt is known by its token ids alone."""
    tokens: int
    """About how many tokens its prompt has, without a tokenizer."""

    @property
    def prompt_bytes(self) -> int:
        """About how much its prompt takes in a body."""
        return self.tokens * _CHARACTERS_A_TOKEN

    def forget_prompt(self) -> None:
        """Let go of what a running answer has no more use for; a prompt may be long, and a stream may last."""
        for key in ("prompt", "messages", "input", "system", "instructions", "tools"):
            self.body.pop(key, None)


def asked(path: str, raw: bytes) -> Asked:
    """The request in a body's bytes. Raises InvalidBodyError for anything that is not a JSON object.

    All else is the node's to judge. Keys that no client may set are dropped.
    """
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise InvalidBodyError(f"the request body is not valid JSON: {exc}") from exc
    if not isinstance(parsed, dict):
        raise InvalidBodyError(f"the request body must be a JSON object, not {_json_type(parsed)}")
    body = _without_transfer_keys(path, parsed)
    _unwrap_single_prompt(body)
    _read_stream(body)
    return Asked(body, _reason(path, body), _is_text_only(body.get("messages")), _tokens(body, len(raw)))


def asked_in(path: str, body: JSONObject, of: Asked) -> Asked:
    """A request that was made of another one's body: of one of its prompts, say."""
    return Asked(body, _reason(path, body), of.is_text, _tokens(body, of.prompt_bytes))


def without_large_values(request: Asked) -> Asked:
    """The same request with every large value as JSON text: quick to hand to another process, and to write again."""
    own = request.body.get(TRANSFER_KEYS[0])
    for values in _dictionaries(request.body):
        for key, value in values.items():
            if isinstance(value, str | list | dict) and value is not own:
                text = orjson.dumps(value)
                if len(text) > _LARGE_VALUE_BYTES:
                    values[key] = text
    return request


def with_fragments(request: Asked) -> Asked:
    """What `without_large_values` made, in a form that `orjson.dumps` takes."""
    for values in _dictionaries(request.body):
        for key, value in values.items():
            if isinstance(value, bytes):
                values[key] = orjson.Fragment(value)
    return request


def _dictionaries(body: JSONObject) -> tuple[JSONObject, ...]:
    """The body, and the client's token ids in it, which stay a dictionary: the legs add keys of their own there."""
    given = body.get(TRANSFER_KEYS[0])
    return (body, given) if given else (body,)


def _without_transfer_keys(path: str, parsed: JSONObject) -> JSONObject:
    given = parsed.get("kv_transfer_params")
    extra = parsed.get(_EXTRA_ARGUMENTS)
    for key in TRANSFER_KEYS:
        parsed.pop(key, None)
        if isinstance(extra, dict):
            extra.pop(key, None)
    if path in _TAKES_TOKEN_IDS and isinstance(given, dict) and given.get(_HARMLESS_TRANSFER_KEY) is not None:
        parsed["kv_transfer_params"] = {_HARMLESS_TRANSFER_KEY: given[_HARMLESS_TRANSFER_KEY]}
    return parsed


def _unwrap_single_prompt(body: JSONObject) -> None:
    """A list of one prompt is one prompt: its answer is the same."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        body["prompt"] = prompt[0]


def _read_stream(body: JSONObject) -> None:
    """VLLM takes "false" and 0 for False, so they must be that here too. What it does not take stays."""
    given = body.get("stream")
    if not isinstance(given, bool | str | int | float):
        return
    word = str(given).lower()
    if word in _TRUE or word in _FALSE:
        body["stream"] = word in _TRUE


def _reason(path: str, body: JSONObject) -> str | None:
    """A hand-off carries the KV of exactly one sequence, and is skipped or refused by the engine for these fields."""
    if _is_prompt_list(body.get("prompt")):
        return "prompt-list"
    if _asks_for(body, "n", 1) or _asks_for(body, "best_of", 1):
        return "many-choices"  # of one prompt, then
    if body.get("use_beam_search"):
        return "beam-search"
    if body.get("prompt_embeds") is not None:
        return "prompt-embeds"
    if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs") is not None):
        return "prompt-logprobs"
    if _is_zero(body.get("max_tokens")) or _is_zero(body.get("max_completion_tokens")):
        return "no-output"
    if body.get("previous_response_id") is not None or body.get("background"):
        return "stored-response"  # its state lives in one node
    if path == RESPONSES.path and _has_built_in_tools(body.get("tools")):
        return "built-in-tools"  # the node asks its engine again for each turn, with the same hand-off
    if not isinstance(body.get("stream"), bool | None):
        return "refused"
    if not body.get("stream") and body.get("stream_options") is not None:
        return "refused"  # by every node; the prefill leg would take it, and hold KV for nothing
    return None


def _tokens(body: JSONObject, size: int) -> int:
    """Four characters each, all of the body taken for prompt: tools and system prompts are. Token ids one each."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt) if is_ids(prompt) else size // _CHARACTERS_A_TOKEN
    return len(prompt) // _CHARACTERS_A_TOKEN if isinstance(prompt, str) else size // _CHARACTERS_A_TOKEN


def _has_built_in_tools(tools: Any) -> bool:
    return isinstance(tools, list) and any(
        not isinstance(tool, dict) or tool.get("type") != "function" for tool in tools
    )


def _is_zero(value: Any) -> bool:
    """As vLLM reads a number."""
    try:
        return not isinstance(value, dict | list) and value is not None and float(value) == 0
    except ValueError:
        return False


def _asks_for(body: JSONObject, field: str, usual: int) -> bool:
    value = body.get(field)
    return value is not None and value != usual


def _is_prompt_list(prompt: Any) -> bool:
    """True unless `prompt` is one sequence: a string or a flat list of token ids."""
    return isinstance(prompt, list) and not is_ids(prompt)


def is_ids(prompt: list[Any]) -> bool:
    """Whether it is a prompt of token ids, if it is one prompt at all."""
    return set(map(type, prompt)) <= {int}  # in C: there may be a million


def _is_text_only(messages: Any) -> bool:
    return not isinstance(messages, list) or all(_is_text(message) for message in messages)


def _is_text(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return True
    return all(isinstance(part, str) or (isinstance(part, dict) and "text" in part) for part in content)


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
