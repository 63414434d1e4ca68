"""A request for several sequences (`n`, a list of prompts), as one request for each, and their answers as one again.

A hand-off carries the KV of one sequence. The numbering, the seeds and the usage are vLLM's own (0.32:
v1/engine/parallel_sampling.py; entrypoints/openai/completion/serving.py and chat_completion/serving.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ..base import JSONObject
from .request import Asked, asked_in
from .routes import CHAT, COMPLETIONS
from .sse import END_OF_EVENT, events

MOST_SHARES = 64
"""A request for more goes to one node as a whole."""

_LEAST_TEMPERATURE = 1e-5
"""Below it vLLM samples greedily, and refuses to make several choices so (sampling_params.py)."""
_GREATEST_SEED = 2**63 - 1
_DONE = b"data: [DONE]\n\n"
_SPLIT_REASONS = ("many-choices", "prompt-list")
_SPLIT_ROUTES = (COMPLETIONS.path, CHAT.path)
_OF_ONE_STREAM = "metrics"
"""Left away of several: it cannot be said of which one it tells."""


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence of a request."""

    index: int
    """Of its choice in the answer."""
    prompt: int
    """Which of the prompts."""
    asked: Asked


def shares(path: str, asked: Asked) -> tuple[Share, ...]:
    """One request for each sequence; empty when there is only one, or one node must answer as a whole.

    What vLLM would refuse of the whole, or what nobody here understands, is left whole: the node says what is wrong.
    """
    if asked.reason not in _SPLIT_REASONS or path not in _SPLIT_ROUTES:
        return ()
    prompts, n, options = _prompts(asked), _n(asked.body), asked.body.get("stream_options")
    if not prompts or n is None or not 1 < len(prompts) * n <= MOST_SHARES or not isinstance(options, dict | None):
        return ()
    found = tuple(
        Share(place * n + choice, place, _one(path, asked, prompt, choice))
        for place, prompt in enumerate(prompts)
        for choice in range(n)
    )
    return () if any(share.asked.reason for share in found) else found


def _prompts(asked: Asked) -> list[Any] | None:
    """None when these are no prompts, or large ones that nobody here looks into. Of a chat there is one, which is not
    in `prompt`.
    """
    prompt = asked.body.get("prompt")
    if isinstance(prompt, orjson.Fragment):
        return [prompt] if asked.reason == "many-choices" else None
    if prompt is None or isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        return None
    if all(isinstance(one, int) for one in prompt):
        return [prompt]
    return prompt if all(isinstance(one, str) or _is_ids(one) for one in prompt) else None


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and set(map(type, prompt)) == {int}


def _n(body: JSONObject) -> int | None:
    """None when vLLM would refuse it, or may."""
    n = body.get("n")
    if n is None or n == 1:
        return 1
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        return None
    temperature, seed = body.get("temperature"), body.get("seed")
    if temperature is not None and not (isinstance(temperature, int | float) and temperature >= _LEAST_TEMPERATURE):
        return None
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed > _GREATEST_SEED - n):
        return None
    return n


def _one(path: str, asked: Asked, prompt: Any, choice: int) -> Asked:
    body = asked.body | {"n": 1}
    if prompt is not None:
        body["prompt"] = prompt
    if choice and body.get("seed") is not None:
        body["seed"] += choice
    if body.get("stream"):
        body["stream_options"] = (body.get("stream_options") or {}) | {"include_usage": True}
    return asked_in(path, body, asked)


class Merged:
    """The answer to a request of which each share has one. Raises ValueError for what is no answer of these routes."""

    def __init__(self, shares: Sequence[Share], *, wants_usage: bool) -> None:
        """`wants_usage`: the client has asked its stream for it."""
        self._shares = shares
        self._wants_usage = wants_usage
        self._head: JSONObject = {}
        self._usages: dict[int, JSONObject] = {}

    def events(self, share: Share, whole: bytes) -> bytes:
        """Whole events of one share's stream, as events of the one stream. Its usage and its end are kept back."""
        told = []
        for event in events(whole):
            if event.data == b"[DONE]":
                continue
            chunk = _object(event.data)
            if not chunk.get("choices") and chunk.get("usage") is not None:
                self._note(share, chunk)
                continue
            told.append(_event(self._numbered(share, chunk)))
        return b"".join(told)

    def ending(self) -> bytes:
        """When every share's stream has come to its end."""
        if not self._wants_usage or not self._usages:
            return _DONE
        return _event(self._head | {"choices": [], "usage": self._usage()}) + _DONE

    def whole(self, bodies: Sequence[bytes]) -> bytes:
        """Of whole answers, in the order of the shares."""
        answers = []
        for share, body in zip(self._shares, bodies, strict=True):
            answer = _object(body)
            self._note(share, answer)
            answers.append(self._numbered(share, answer))
        answer = answers[0] | {"choices": [choice for one in answers for choice in one["choices"]]}
        answer["usage"] = self._usage()
        return orjson.dumps(answer)

    def _numbered(self, share: Share, chunk: JSONObject) -> JSONObject:
        try:
            for choice in chunk["choices"]:
                choice["index"] = share.index
        except (KeyError, TypeError) as exc:
            raise ValueError("this is no answer of this route") from exc
        return chunk | self._common(share, chunk)

    def _common(self, share: Share, chunk: JSONObject) -> JSONObject:
        """What all parts of one answer share: from the first that came."""
        if not self._head:
            self._head = {key: chunk[key] for key in ("id", "object", "created", "model") if key in chunk}
            self._head["id"] = str(chunk.get("id", "")).removesuffix(share_suffix(share))
        return {key: value for key, value in self._head.items() if key in chunk}

    def _note(self, share: Share, answer: JSONObject) -> None:
        answer.pop(_OF_ONE_STREAM, None)
        usage = answer.get("usage")
        if isinstance(usage, dict):
            self._usages[share.index] = usage

    def _usage(self) -> JSONObject | None:
        """Each prompt counts once, whatever is made of it; what is told of the cache is of the first."""
        if not self._usages:
            return None
        places = {share.prompt: share.index for share in reversed(self._shares)}
        prompt = sum(_count(self._usages.get(index), "prompt_tokens") for index in places.values())
        completion = sum(_count(usage, "completion_tokens") for usage in self._usages.values())
        first = self._usages[min(self._usages)]
        merged = first | {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        }  # fmt: skip
        details = [usage["completion_tokens_details"] for usage in self._usages.values()
                   if isinstance(usage.get("completion_tokens_details"), dict)]  # fmt: skip
        if details:
            merged["completion_tokens_details"] = {
                key: sum(_count(one, key) for one in details) if isinstance(value, int) else value
                for key, value in details[0].items()
            }
        return merged


def share_suffix(share: Share) -> str:
    """What a share's request id ends in."""
    return f"-{share.index}"


def _count(usage: JSONObject | None, key: str) -> int:
    value = (usage or {}).get(key)
    return value if isinstance(value, int) else 0


def _object(data: bytes) -> JSONObject:
    found = orjson.loads(data)
    if not isinstance(found, dict):
        raise ValueError("this is no answer of this route")
    return found


def _event(chunk: JSONObject) -> bytes:
    return b"data: " + orjson.dumps(chunk) + END_OF_EVENT
