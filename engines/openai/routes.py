"""The generation routes of a node: how each says "one token", and how its answer says that it stopped there.

vLLM 0.32: `/v1/responses` and `/v1/messages` have no `min_tokens`, so an EOS as the first token cannot be masked on
every one of them; their answer is checked, and a prompt whose KV was dropped takes the aggregated path.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..base import JSONObject, PrefillRefusedError
from .sse import MESSAGES_EVENTS, OPENAI_EVENTS, RESPONSES_EVENTS, EventRules


@dataclass(frozen=True, slots=True)
class Route:
    """A route whose requests can be handed off."""

    path: str
    one_token: JSONObject
    """Fields of the prefill leg that make it one token, not streamed."""
    ended_by: Callable[[JSONObject], Any]
    """What ended the prefill leg, from its answer."""
    by_length: str
    """... when the token limit did: the one case in which vLLM holds the KV."""
    usage: Callable[[JSONObject], tuple[int, int | None]]
    """The prompt's tokens, and how many of them the node had cached where it says so, from the answer's `usage`."""
    events: EventRules = OPENAI_EVENTS
    """How its stream says that it failed, and that it is complete."""
    forwards_ids_as: Literal["prompt", "kv_transfer_params"] | None = None
    """Where the decode leg takes the prefill node's own token ids; None when its answer has none."""
    takes_rank: bool = True
    """The server heeds `X-data-parallel-rank`. Where it does not, the KV may lie in another rank than is told."""
    collects: bool = False
    """A stream of this route can be put together to its whole answer here (`collect.py`)."""


def _finish_reason(answer: JSONObject) -> Any:
    return answer["choices"][0]["finish_reason"]


def _incomplete_reason(answer: JSONObject) -> Any:
    return (answer.get("incomplete_details") or {}).get("reason") or answer["status"]


def _stop_reason(answer: JSONObject) -> Any:
    return answer["stop_reason"]


def _openai_usage(usage: JSONObject) -> tuple[int, int | None]:
    return int(usage["prompt_tokens"]), _count((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))


def _responses_usage(usage: JSONObject) -> tuple[int, int | None]:
    return int(usage["input_tokens"]), _count((usage.get("input_tokens_details") or {}).get("cached_tokens"))


def _messages_usage(usage: JSONObject) -> tuple[int, int | None]:
    """Anthropic's `input_tokens` are those that were neither read from a cache nor written to one."""
    cached = _count(usage.get("cache_read_input_tokens"))
    return int(usage["input_tokens"]) + (cached or 0) + (_count(usage.get("cache_creation_input_tokens")) or 0), cached


def _count(value: Any) -> int | None:
    """None for what no node should say."""
    return value if type(value) is int else None


COMPLETIONS = Route(
    "/v1/completions",
    {"max_tokens": 1, "min_tokens": 1, "n": 1, "stream": False},
    _finish_reason,
    "length",
    _openai_usage,
    forwards_ids_as="prompt",
    collects=True,
)
CHAT = Route(
    "/v1/chat/completions",
    {"max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 1, "n": 1, "stream": False},
    _finish_reason,
    "length",
    _openai_usage,
    forwards_ids_as="kv_transfer_params",
    collects=True,
)
RESPONSES = Route(
    "/v1/responses",
    {"max_output_tokens": 1, "ignore_eos": True, "stream": False, "store": False},
    _incomplete_reason,
    "max_output_tokens",
    _responses_usage,
    RESPONSES_EVENTS,
    takes_rank=False,
)
MESSAGES = Route(
    "/v1/messages",
    {"max_tokens": 1, "stream": False},
    _stop_reason,
    "max_tokens",
    _messages_usage,
    MESSAGES_EVENTS,
)

HANDED_OFF = {route.path: route for route in (COMPLETIONS, CHAT, RESPONSES, MESSAGES)}

PASSED_ON = (
    "/v1/chat/completions/batch",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/embeddings",
    "/v1/rerank",
    "/rerank",
    "/v2/rerank",
    "/v1/score",
    "/score",
    "/classify",
    "/pooling",
    "/generative_scoring",
    "/v1/systemone",
)
"""Answered by one node as a whole."""

_CONTROL = "it controls an engine, which no client may"
REFUSED = {
    "/invocations": "SageMaker's one route for all others: ask the one that is meant",
    "/load": "it is one node's own figure: /metrics has them all",
    "/kv_event_sources": "it is one node's own business",
    "/scale_elastic_ep": _CONTROL,
    "/is_scaling_elastic_ep": _CONTROL,
    "/sleep": _CONTROL,
    "/wake_up": _CONTROL,
    "/is_sleeping": _CONTROL,
    "/reset_prefix_cache": _CONTROL,
    "/collective_rpc": _CONTROL,
    "/v1/load_lora_adapter": _CONTROL,
    "/v1/unload_lora_adapter": _CONTROL,
    "/v1/audio/transcriptions": "a form with a file in it is not read here",
    "/v1/audio/translations": "a form with a file in it is not read here",
    "/v1/realtime": "a WebSocket is not served here",
}
"""Routes of an engine that are a 404 here, and why. So is every one that is in no list, without a reason."""


def checked_end(route: Route, answer: JSONObject) -> None:
    """Raises PrefillRefusedError unless the prefill leg ended by length."""
    try:
        end = route.ended_by(answer)
    except (KeyError, IndexError, TypeError, AttributeError) as exc:
        raise PrefillRefusedError("the prefill node's answer is not one of this route") from exc
    if end != route.by_length:
        raise PrefillRefusedError(f"the prefill leg ended by {end!r}, not by length, so its KV is gone")
