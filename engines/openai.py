"""The bodies of one exchange: what the client sent, what each leg is sent.

Every function edits a shallow copy and leaves its argument alone. Fields that nobody here knows pass unchanged.
"""

from dataclasses import dataclass
from typing import Any

from .base import JSONObject

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params")
"""Never taken from a client: the wrong dictionary kills an engine or makes it dial any address (vLLM #47843)."""

_ONLY_SHAPES_THE_OUTPUT = (
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
)
"""Left off the prefill leg: they end the request early, are refused next to its fixed fields, or cost work for the
one token that is thrown away. None of them changes the rendered prompt."""


class InvalidBodyError(ValueError):
    """The client's body cannot be a request; `param` names the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PrefillRefusedError(ValueError):
    """The prefill node answered 200 but holds no KV for a decode leg; the message says why."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What the prefill leg's answer says about the prompt."""

    prompt_tokens: int
    cached_tokens: int | None
    """Tokens the prefill node took from its own prefix cache; None when it does not say."""


def checked_body(parsed: object) -> JSONObject:
    """The client's body as an object, without the keys no client may set.

    Raises InvalidBodyError for anything that is not a JSON object. All else is the node's to judge.
    """
    if not isinstance(parsed, dict):
        raise InvalidBodyError(f"the request body must be a JSON object, not {_json_type(parsed)}")
    return {key: value for key, value in parsed.items() if key not in TRANSFER_KEYS}


def aggregated_reason(body: JSONObject) -> str | None:
    """Why this request must take the aggregated path (one node does both phases), or None.

    A hand-off carries the KV of exactly one sequence, and is skipped or refused by the engine for these fields.
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
    return None


def prefill_body(body: JSONObject, transfer_params: JSONObject) -> JSONObject:
    """The request that makes a prefill node compute a prompt's KV and hold it.

    vLLM holds KV only for a request that ends by length (mooncake_connector.py, `request_finished`), so nothing may
    end it earlier: `min_tokens` masks EOS and stop ids, stop strings are dropped.
    """
    leg = {key: value for key, value in body.items() if key not in _ONLY_SHAPES_THE_OUTPUT}
    leg |= {"max_tokens": 1, "min_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": transfer_params}
    if "messages" in body:
        leg["max_completion_tokens"] = 1  # wins over max_tokens
    return leg


def decode_body(body: JSONObject, transfer_params: JSONObject, prefilled: Prefilled) -> JSONObject:
    """The client's request, with the KV to start from.

    `remote_prefill_cached_tokens` makes the node report the prefill node's cache hits; by itself it would count
    every transferred token as cached (vllm/v1/engine/output_processor.py).
    """
    params = dict(transfer_params)
    if prefilled.cached_tokens is not None:
        params["remote_prefill_cached_tokens"] = prefilled.cached_tokens
    return {**body, "kv_transfer_params": params}


def prefilled(answer: object) -> Prefilled:
    """What a prefill node's 200 answer promises. Raises PrefillRefusedError unless it ended by length."""
    try:
        choice = answer["choices"][0]  # type: ignore[index]
        usage = answer["usage"]  # type: ignore[index]
        reason = choice["finish_reason"]
        prompt_tokens = usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as exc:
        raise PrefillRefusedError("the prefill node's answer is not a completion") from exc
    if reason != "length":
        raise PrefillRefusedError(f"the prefill leg ended by {reason!r}, not by length, so its KV is gone")
    return Prefilled(prompt_tokens=prompt_tokens, cached_tokens=cached)


def error_body(message: str, kind: str, status: int, param: str | None = None) -> JSONObject:
    """An error in OpenAI's shape, with the fields vLLM fills."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _asks_for(body: JSONObject, field: str, usual: int) -> bool:
    value = body.get(field)
    return value is not None and value != usual


def _is_prompt_list(prompt: Any) -> bool:
    """True unless `prompt` is one sequence: a string or a flat list of token ids."""
    return isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
