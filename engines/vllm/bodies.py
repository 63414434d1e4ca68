"""The bodies of one exchange: what the client sent, what each leg is sent.

Every function edits a shallow copy and leaves its argument alone. Fields that nobody here knows pass unchanged.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from ..base import JSONObject, PrefillRefusedError
from ..openai.routes import Route, checked_end

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params")
"""Never taken from a client: the wrong dictionary kills an engine or makes it dial any address (vLLM #47843)."""

_ONLY_SHAPES_THE_OUTPUT = frozenset(
    {
        "stream_options",  # refused without `stream`
        "stop",
        "stop_token_ids",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "echo",
        "stop_sequences",  # the messages route's word for `stop`
    }
)
"""Left off the prefill leg: they end the request early, are refused next to its fixed fields, or cost work for the
one token that is thrown away. None of them changes the rendered prompt."""

_CHARACTERS_A_TOKEN = 4
_IDS = b'"prompt_token_ids":['
_NEVER_FITS = 2**31 - 1
"""More output tokens than any model has room for: vLLM refuses it, and tells the connector so."""


class InvalidBodyError(ValueError):
    """The client's body cannot be a request; `param` names the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What the prefill leg's answer says about the prompt."""

    answer: JSONObject
    prompt_tokens: int
    cached_tokens: int | None = None
    """Tokens the prefill node took from its own prefix cache; None when it does not say."""
    token_ids: bytes | None = None
    """The prompt's token ids as the node wrote them, a JSON array; never parsed, only passed on."""


def checked_body(parsed: object) -> JSONObject:
    """The client's body as an object, without the keys no client may set.

    Raises InvalidBodyError for anything that is not a JSON object. All else is the node's to judge.
    """
    if not isinstance(parsed, dict):
        raise InvalidBodyError(f"the request body must be a JSON object, not {_json_type(parsed)}")
    return {key: value for key, value in parsed.items() if key not in TRANSFER_KEYS}


def aggregated_reason(body: JSONObject, min_prefill_tokens: int = 0) -> str | None:
    """Why this request must take the aggregated path (one node does both phases), or None.

    A hand-off carries the KV of exactly one sequence, and is skipped or refused by the engine for these fields.
    A prompt shorter than `min_prefill_tokens` (estimated) costs less to compute than to hand over.
    """
    if _asks_for(body, "n", 1) or _asks_for(body, "best_of", 1):
        return "many-choices"
    if _is_prompt_list(body.get("prompt")):
        return "prompt-list"
    if body.get("use_beam_search"):
        return "beam-search"
    if body.get("prompt_embeds") is not None:
        return "prompt-embeds"
    if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs") is not None):
        return "prompt-logprobs"
    if body.get("max_tokens") == 0 or body.get("max_completion_tokens") == 0:
        return "no-output"
    if body.get("previous_response_id") is not None or body.get("background"):
        return "stored-response"  # its state lives in one node
    if not body.get("stream") and body.get("stream_options") is not None:
        return "refused"  # by every node; the prefill leg would take it, and hold KV for nothing
    if min_prefill_tokens and estimated_tokens(body) < min_prefill_tokens:
        return "short-prompt"
    return None


def estimated_tokens(body: JSONObject) -> int:
    """About how many tokens the prompt has, without a tokenizer: four characters each, token ids one each."""
    return _size(body.get("prompt")) + _size(body.get("messages")) + _size(body.get("input"))


def prefill_body(route: Route, body: JSONObject, transfer_params: JSONObject | None) -> JSONObject:
    """The request that makes a prefill node compute a prompt's KV and hold it.

    vLLM holds KV only for a request that ends by length (mooncake_connector.py, `request_finished`), so nothing may
    end it earlier: `min_tokens` masks EOS and stop ids, stop strings are dropped.
    """
    leg = {key: value for key, value in body.items() if key not in _ONLY_SHAPES_THE_OUTPUT}
    leg |= route.one_token
    leg["kv_transfer_params"] = transfer_params
    if route.forwards_ids_as is not None and _may_forward_ids(body):
        leg["return_token_ids"] = True
    return leg


def prefilled(route: Route, raw: bytes) -> Prefilled:
    """What a prefill node's 200 answer promises. Raises PrefillRefusedError unless it ended by length."""
    ids, rest = _without_ids(raw)
    try:
        answer = orjson.loads(rest)
        checked_end(route, answer)
        tokens, details = route.usage
        usage = answer["usage"]
        prompt_tokens = int(usage[tokens])
        cached = (usage.get(details) or {}).get("cached_tokens")
    except (KeyError, TypeError, AttributeError, orjson.JSONDecodeError) as exc:
        raise PrefillRefusedError("the prefill node's answer is not one of this route") from exc
    return Prefilled(answer, prompt_tokens, cached, ids)


def decode_body(
    route: Route, body: JSONObject, transfer_params: JSONObject | None, prefilled: Prefilled, *, stream: bool
) -> JSONObject:
    """The client's request, with the KV to start from, and the prefill node's own token ids.

    Nothing in the engines checks that KV and prompt belong together, so the prompt is tokenized once, by the prefill
    node. `remote_prefill_cached_tokens` makes the node report the prefill node's cache hits; by itself it would count
    every transferred token as cached (vllm/v1/engine/output_processor.py).
    """
    leg = dict(body)
    if prefilled.token_ids is not None and route.forwards_ids_as == "prompt":
        leg["prompt"] = orjson.Fragment(prefilled.token_ids)
    params = None if transfer_params is None else dict(transfer_params)
    if params is not None:
        if prefilled.token_ids is not None and route.forwards_ids_as == "kv_transfer_params":
            params["prompt_token_ids"] = orjson.Fragment(prefilled.token_ids)
        if prefilled.cached_tokens is not None:
            params["remote_prefill_cached_tokens"] = prefilled.cached_tokens
    leg["kv_transfer_params"] = params
    if stream and not body.get("stream"):
        leg |= {"stream": True, "stream_options": {"include_usage": True}}
    return leg


def release_body(body: JSONObject, transfer_params: JSONObject) -> JSONObject:
    """A completions request that the decode node's serving layer refuses, which frees the prefill node's KV.

    vLLM answers a refused request that carries a hand-off by an empty pull (entrypoints/generate/base/serving.py,
    `_with_kv_transfer_rejection_cleanup`). Only for a hand-off that no decode node has seen: an empty pull for one
    that is gone keeps one of the prefill node's sender tasks for the whole transfer timeout.
    """
    leg: JSONObject = {"prompt": "x", "max_tokens": _NEVER_FITS, "kv_transfer_params": transfer_params}
    return leg | ({"model": body["model"]} if "model" in body else {})


def is_released_by_refusal(status: int, error_kind: str) -> bool:
    """Whether a decode node's error answer means that its serving layer has already freed the hand-off.

    What is refused before (the schema, vLLM's "Bad Request"; a key; a full queue) it never saw.
    """
    return status in (400, 404, 500) and error_kind != "Bad Request"


def _may_forward_ids(body: JSONObject) -> bool:
    """The decode node renders the prompt itself for `echo`, and for anything but text."""
    messages = body.get("messages")
    return not body.get("echo") and (not isinstance(messages, list) or all(_is_text(message) for message in messages))


def _is_text(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return True
    return all(isinstance(part, str) or (isinstance(part, dict) and "text" in part) for part in content)


def _without_ids(raw: bytes) -> tuple[bytes | None, bytes]:
    """(the array of prompt token ids, the answer without it): a long prompt's ids are cut out, not parsed.

    Inside a JSON string the key's quotes would be escaped, so the first match is the key itself.
    """
    start = raw.find(_IDS)
    end = raw.find(b"]", start)
    if start < 0 or end < 0:
        return None, raw
    ids = raw[start + len(_IDS) - 1 : end + 1]
    return ids, raw[:start] + b'"prompt_token_ids":null' + raw[end + 1 :]


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value) // _CHARACTERS_A_TOKEN
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values())
    if isinstance(value, list):
        return len(value) if value and isinstance(value[0], int) else sum(_size(item) for item in value)
    return 0


def _asks_for(body: JSONObject, field: str, usual: int) -> bool:
    value = body.get(field)
    return value is not None and value != usual


def _is_prompt_list(prompt: Any) -> bool:
    """True unless `prompt` is one sequence: a string or a flat list of token ids."""
    return isinstance(prompt, list) and not set(map(type, prompt)) <= {int}  # in C: there may be a million


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
