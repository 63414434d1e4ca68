"""The bodies of the two legs, and of the requests around them. Checked against vLLM 0.32.

Every function edits a shallow copy and leaves its argument alone.
"""

import orjson

from ..base import JSONObject, Prefilled, PrefillRefusedError
from ..openai.request import Asked
from ..openai.routes import Route, checked_end

_ONLY_SHAPES_THE_OUTPUT = frozenset(
    {
        "stream_options",  # refused without `stream`
        "stop",
        "stop_token_ids",
        "logprobs",
        "top_logprobs",
        "logprob_token_ids",  # refused without `logprobs`
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
"""Left off the prefill leg: they end the request early, are refused next to its fixed fields or without each other, or
cost work for the one token that is thrown away. None of them changes the rendered prompt."""

_IDS = b'"prompt_token_ids":['
_FULL_QUEUE = "Service Unavailable"
_NEVER_FITS = 2**31 - 1
"""More output tokens than any model has room for: vLLM refuses it, and tells the connector so."""


_ONLY_OF_WHAT_IS_SHOWN = frozenset({"stream_options", "echo"})


def prefill_body(
    route: Route, asked: Asked, transfer_params: JSONObject | None, *, judges_all: bool = False
) -> JSONObject:
    """The request that makes a prefill node compute a prompt's KV and hold it.

    `judges_all`: with what only shapes the output, too, though it may end the request early (then nothing is held, and
    one node does both phases): what is wrong in it, this node refuses.

    vLLM holds KV only for a request that ends by length (mooncake_connector.py, `request_finished`), so nothing may
    end it earlier: `min_tokens` masks EOS and stop ids, stop strings are dropped.
    """
    body = asked.body
    left_off = _ONLY_OF_WHAT_IS_SHOWN if judges_all else _ONLY_SHAPES_THE_OUTPUT
    leg = {key: value for key, value in body.items() if key not in left_off}
    leg |= route.one_token
    leg["kv_transfer_params"] = _with_clients_ids(body, transfer_params)
    if route.forwards_ids_as is not None and asked.is_text and not body.get("echo"):
        leg["return_token_ids"] = True
    return leg


def prefilled(route: Route, raw: bytes) -> Prefilled:
    """What a prefill node's 200 answer promises. Raises PrefillRefusedError unless it ended by length."""
    ids, rest = _without_ids(raw)
    try:
        answer = orjson.loads(rest)
        prompt_tokens, cached = route.usage(answer["usage"])
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise PrefillRefusedError("the prefill node's answer is not one of this route") from exc
    checked_end(route, answer)
    return Prefilled(answer, prompt_tokens, cached, ids)


def decode_body(
    route: Route, asked: Asked, transfer_params: JSONObject | None, prefilled: Prefilled, *, stream: bool
) -> JSONObject:
    """The client's request, with the KV to start from, and the prefill node's own token ids.

    Nothing in the engines checks that KV and prompt belong together, so the prompt is tokenized once, by the prefill
    node. `remote_prefill_cached_tokens` makes the node report the prefill node's cache hits; by itself it would count
    every transferred token as cached (vllm/v1/engine/output_processor.py).
    """
    body = asked.body
    leg = dict(body)
    if prefilled.token_ids is not None and route.forwards_ids_as == "prompt":
        leg["prompt"] = orjson.Fragment(prefilled.token_ids)
    params = _with_clients_ids(body, transfer_params)
    if params is not None and transfer_params is not None:
        if prefilled.token_ids is not None and route.forwards_ids_as == "kv_transfer_params":
            params["prompt_token_ids"] = orjson.Fragment(prefilled.token_ids)
        if prefilled.cached_tokens is not None:
            params["remote_prefill_cached_tokens"] = prefilled.cached_tokens
    leg["kv_transfer_params"] = params
    if stream and not body.get("stream"):
        leg |= {"stream": True, "stream_options": {"include_usage": True}}
    return leg


def release_body(model: object, transfer_params: JSONObject) -> JSONObject:
    """A completions request that the decode node's serving layer refuses, which frees the prefill node's KV.

    vLLM answers a refused request that carries a hand-off by an empty pull (entrypoints/generate/base/serving.py,
    `_with_kv_transfer_rejection_cleanup`). Only for a hand-off that no decode node has seen: an empty pull for one
    that is gone keeps one of the prefill node's sender tasks for the whole transfer timeout.
    """
    leg: JSONObject = {"prompt": "x", "max_tokens": _NEVER_FITS, "kv_transfer_params": transfer_params}
    return leg if model is None else leg | {"model": model}


def is_released_by_refusal(status: int, error_kind: str) -> bool:
    """Whether a decode node's error answer means that its serving layer has already freed the hand-off.

    What is refused before (the schema, vLLM's "Bad Request"; a key; a middleware's 503) it never saw. A full queue
    (`--max-num-queued-reqs`) it did see: that is a 503 with vLLM's own type (v1/engine/async_llm.py, check_admission).
    """
    if status == 503:
        return error_kind == _FULL_QUEUE
    return status in (400, 404, 422, 500, 501) and error_kind != "Bad Request"


def _with_clients_ids(body: JSONObject, transfer_params: JSONObject | None) -> JSONObject | None:
    """The client may give its prompt as token ids (`request.TRANSFER_KEYS`); all else is ours."""
    given: JSONObject | None = body.get("kv_transfer_params")
    if given is None:
        return None if transfer_params is None else dict(transfer_params)
    return given | (transfer_params or {})


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
