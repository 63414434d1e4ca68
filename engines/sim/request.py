"""A request's body: what vLLM would refuse and in which words, and what it asks for."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..base import JSONObject
from . import timing
from .tokens import VOCABULARY, Sampling, encode, render_chat

MOST_LOGPROBS = 20
MOST_CHOICES = 16_384
"""VLLM_MAX_N_SEQUENCES, as it is set unless somebody sets it."""


class SchemaError(ValueError):
    """Refused before the serving layer sees it: the connector never hears of the request."""


class RefusedError(ValueError):
    """Refused by the serving layer, which tells the connector, which frees the hand-off (vLLM serving.py,
    `_with_kv_transfer_rejection_cleanup`).
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        kind: str = "",
        *,
        late: bool = False,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.kind = kind or ("BadRequestError" if status == 400 else "NotFoundError")
        self.late = late
        """Found when the engine is handed the request: a stream has said 200 by then, and nothing is freed."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One engine request for each (prompt, choice)."""

    chat: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    logprobs: int | None
    tokens_as_ids: bool
    echo: bool
    kv: JSONObject
    rank: int = 0
    own_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    found: list[int] = field(default_factory=list)
    """Tokens of each prompt that were in the node's own prefix cache, once they are computed."""
    sequence: list[timing.Sequence] = field(default_factory=list)
    """In the engine's loop, where it has one, once it runs there."""


def parse(body: object, *, chat: bool, names: tuple[str, ...], max_model_len: int) -> Wanted:
    """Raises SchemaError or RefusedError, in vLLM's order."""
    if not isinstance(body, dict):
        raise SchemaError("Input should be a valid dictionary or object to extract fields from")
    _check_schema(body, chat=chat)
    if body.get("model") not in (None, *names):
        valid = ", ".join(names)
        raise RefusedError(f"The model `{body['model']}` does not exist. Valid aliases: {valid}.", "model", 404)
    if body.get("stream_options") and not body.get("stream"):
        raise RefusedError("Stream options can only be defined when `stream=True`.", "stream_options")
    kv = body.get("kv_transfer_params") or {}
    prompts = _prompts(body, kv, chat=chat)
    sampling = _sampling(body, longest=max(map(len, prompts)), max_model_len=max_model_len)
    logprobs = _logprobs(body, chat=chat)
    n = body.get("n") or 1
    if n > MOST_CHOICES:
        raise RefusedError(f"n must be at most {MOST_CHOICES}, got {n}.", "n")
    if n > 1 and sampling.salt == 0:
        raise RefusedError(f"n must be 1 when using greedy sampling, got {n}.")
    options = body.get("stream_options") or {}
    return Wanted(
        chat=chat,
        prompts=prompts,
        n=n,
        sampling=sampling,
        stop=_strings(body.get("stop")),
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
        return_token_ids=bool(body.get("return_token_ids")),
        logprobs=logprobs,
        tokens_as_ids=bool(body.get("return_tokens_as_token_ids")),
        echo=bool(body.get("echo")),
        kv=kv,
    )


def for_choice(sampling: Sampling, choice: int) -> Sampling:
    return replace(sampling, salt=sampling.salt + choice) if choice else sampling


def _check_schema(body: JSONObject, *, chat: bool) -> None:
    whole = ("max_tokens", "max_completion_tokens", "min_tokens", "n", "seed")
    numbers = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    for name in whole:
        if body.get(name) is not None and (not isinstance(body[name], int) or isinstance(body[name], bool)):
            raise SchemaError(f"{name}: Input should be a valid integer")
    for name in numbers:
        if body.get(name) is not None and not isinstance(body[name], int | float):
            raise SchemaError(f"{name}: Input should be a valid number")
    if chat and not isinstance(body.get("messages"), list):
        raise SchemaError("messages: Input should be a valid list")
    if chat and not all(isinstance(message, dict) for message in body["messages"]):
        raise SchemaError("messages: Input should be a valid dictionary")
    if body.get("stream_options") is not None and not isinstance(body["stream_options"], dict):
        raise SchemaError("stream_options: Input should be a valid dictionary")
    prompt = body.get("prompt")
    if not chat and prompt is not None and not isinstance(prompt, str | list):
        raise SchemaError("prompt: Input should be a valid list")
    if body.get("kv_transfer_params") is not None and not isinstance(body["kv_transfer_params"], dict):
        raise SchemaError("kv_transfer_params: Input should be a valid dictionary")


def _prompts(body: JSONObject, kv: JSONObject, *, chat: bool) -> tuple[tuple[int, ...], ...]:
    if chat:
        if not body["messages"]:
            raise RefusedError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        ids = kv.get("prompt_token_ids") or render_chat(body["messages"], body)
        return (tuple(ids),)
    prompt = body.get("prompt")
    if not prompt:
        raise RefusedError("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(prompt, str) or all(isinstance(item, int) for item in prompt):
        prompt = [prompt]
    return tuple(_prompt_ids(item) for item in prompt)


def _prompt_ids(prompt: object) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(encode(prompt))
    if isinstance(prompt, Sequence) and prompt and all(isinstance(item, int) for item in prompt):
        if any(not 0 <= item < VOCABULARY for item in prompt):
            raise RefusedError("Token id is out of vocabulary", "prompt")
        return tuple(prompt)
    raise SchemaError("prompt: Input should be a valid list")


def _sampling(body: JSONObject, *, longest: int, max_model_len: int) -> Sampling:
    asked = body.get("max_completion_tokens") if body.get("max_completion_tokens") is not None else None
    asked = asked if asked is not None else body.get("max_tokens")
    if asked is not None and asked < 1:
        raise RefusedError(f"max_tokens must be at least 1, got {asked}.", "max_tokens")
    if asked is not None and asked > max_model_len:
        raise RefusedError(
            f"max_tokens={asked} cannot be greater than max_model_len={max_model_len}. "
            "Please request fewer output tokens.",
            "max_tokens",
        )
    default = max_model_len - longest if "messages" in body else 16
    max_tokens = default if asked is None else asked
    if longest + max(1, max_tokens) > max_model_len:
        raise RefusedError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {max_tokens} "
            f"output tokens and your prompt contains {longest} input tokens.",
            "input_tokens",
        )
    min_tokens = body.get("min_tokens") or 0
    if min_tokens > max_tokens:
        raise RefusedError(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.")
    temperature = body.get("temperature")
    if temperature is not None and temperature < 0:
        raise RefusedError(f"temperature must be non-negative, got {float(temperature)}.", "temperature")
    bias = body.get("logit_bias") or {}
    if any(int(token) >= VOCABULARY for token in bias):
        raise RefusedError("token_id(s) in logit_bias contain out-of-vocab token ids.", "logit_bias", late=True)
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=bool(body.get("ignore_eos")),
        stop_token_ids=frozenset(body.get("stop_token_ids") or ()),
        allowed_token_ids=tuple(body.get("allowed_token_ids") or ()),
        logit_bias=tuple((int(token), float(weight)) for token, weight in bias.items()),
        salt=0 if temperature == 0 else 1 + abs(body.get("seed") or 0),
    )


def _logprobs(body: JSONObject, *, chat: bool) -> int | None:
    value = (body.get("top_logprobs") or 0) if chat and body.get("logprobs") else body.get("logprobs")
    if chat and not body.get("logprobs"):
        return None
    if value is None or isinstance(value, bool):
        return None
    if value > MOST_LOGPROBS:
        raise RefusedError(
            f"Requested sample logprobs of {value}, which is greater than max allowed: {MOST_LOGPROBS}",
            "logprobs",
            late=True,
        )
    return int(value)


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else ()
