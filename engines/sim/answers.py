"""Bodies and stream events in vLLM's shape."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from ..base import JSONObject
from .request import Wanted
from .tokens import token_text

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """One generated sequence."""

    index: int
    prompt: tuple[int, ...]
    prefix: str = ""
    """Text of the prompt, when the client asked for `echo`."""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every event and body of one answer shares."""

    id: str
    created: int
    model: str
    wanted: Wanted

    def event(self, choice: Choice, text: str, ids: Sequence[int], *, first: bool) -> bytes:
        """One chunk. vLLM's chunks always carry `token_ids`, null unless asked for."""
        asked = self.wanted.return_token_ids
        body: JSONObject = {"index": choice.index, "logprobs": self._logprobs(ids), "finish_reason": None}
        chunk = self._head("chat.completion.chunk" if self.wanted.chat else "text_completion")
        if self.wanted.chat:
            body["delta"] = {"role": "assistant", "content": ""} if first else {"content": text}
            if first:
                chunk |= {"prompt_token_ids": list(choice.prompt) if asked else None, "prompt_text": None}
            else:
                body["token_ids"] = list(ids) if asked else None
        else:
            body |= {"text": text, "stop_reason": None, "token_ids": list(ids) if asked else None}
            body["prompt_token_ids"] = list(choice.prompt) if asked and first else None
        if not (self.wanted.chat and first):
            body |= {"finish_reason": choice.finish_reason}
            if choice.finish_reason is not None:
                body["stop_reason"] = choice.stop_reason
        chunk["choices"] = [body]
        return sse(chunk)

    def usage_event(self, choices: Sequence[Choice], cached: int | None) -> bytes:
        chunk = self._head("chat.completion.chunk" if self.wanted.chat else "text_completion")
        return sse(chunk | {"choices": [], "usage": usage(choices, self.wanted, cached)})

    def body(self, choices: Sequence[Choice], cached: int | None) -> JSONObject:
        answer = self._head("chat.completion" if self.wanted.chat else "text_completion")
        answer["choices"] = [self._whole(choice) for choice in choices]
        answer["usage"] = usage(choices, self.wanted, cached)
        answer |= {"prompt_logprobs": None, "kv_transfer_params": None, "ec_transfer_params": None}
        if self.wanted.chat:
            answer["prompt_token_ids"] = list(choices[0].prompt) if self.wanted.return_token_ids else None
        return answer

    def _whole(self, choice: Choice) -> JSONObject:
        asked = self.wanted.return_token_ids
        body: JSONObject = {
            "index": choice.index,
            "logprobs": self._logprobs(choice.ids),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.ids if asked else None,
        }
        text = choice.prefix + choice.text
        if self.wanted.chat:
            return body | {"message": {"role": "assistant", "content": text, "reasoning": None}}
        return body | {"text": text, "prompt_token_ids": list(choice.prompt) if asked else None}

    def _head(self, kind: str) -> JSONObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, ids: Sequence[int]) -> JSONObject | None:
        """Made up: enough to see that the field arrives, which tokens are meant, and that there are others."""
        if self.wanted.logprobs is None:
            return None
        texts = [f"token_id:{token}" if self.wanted.tokens_as_ids else token_text(token) for token in ids]
        if self.wanted.chat:
            return {"content": [{"token": text, "logprob": -0.5, "bytes": list(text.encode())} for text in texts]}
        top = [{text: -0.5, "another": -5.0} for text in texts] if self.wanted.logprobs else None
        return {"tokens": texts, "token_logprobs": [-0.5] * len(texts), "top_logprobs": top}


def usage(choices: Sequence[Choice], wanted: Wanted, cached: int | None) -> JSONObject:
    prompt = sum(len(ids) for ids in wanted.prompts)
    completion = sum(len(choice.ids) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
    }


def sse(chunk: JSONObject) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"
