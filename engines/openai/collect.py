"""A stream of completions or chat events, put together to the whole answer the client asked for.

A decode node is always spoken to as a stream: when the client of a *whole* answer leaves after the KV came, vLLM's
rejection clean-up pulls once more for a hand-off that is gone, and the prefill node keeps a sender task for it until
the transfer timeout; twenty such clients stop all its transfers (CONTRACT §0.7).
"""

from typing import Any

import orjson

from ..base import JSONObject
from .sse import Splitter, events

_DONE = b"[DONE]"


class StreamError(Exception):
    """The stream carries an error: `status`, `error` as the node gave it."""

    def __init__(self, error: JSONObject) -> None:
        super().__init__(str(error.get("message", "the stream carries an error")))
        self.error = error
        code = error.get("code")
        self.status = code if isinstance(code, int) and 400 <= code <= 599 else 502


class Collector:
    """Feed it a stream's bytes; `answer` is what the node would have said in one piece."""

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat
        self._splitter = Splitter()
        self._head: JSONObject = {}
        self._choices: dict[int, JSONObject] = {}
        self._usage: JSONObject | None = None
        self._done = False

    def feed(self, data: bytes) -> None:
        """Raises StreamError when an event is an error, ValueError when it is no event of this route."""
        for event in events(self._splitter.feed(data)):
            if event.data == _DONE:
                self._done = True
                continue
            try:
                self._add(orjson.loads(event.data))
            except (KeyError, TypeError, AttributeError) as exc:
                raise ValueError("this is no event of a stream of this route") from exc

    @property
    def is_whole(self) -> bool:
        """The stream came to its own end, and every choice to its."""
        finished = all(choice["finish_reason"] is not None for choice in self._choices.values())
        return self._done and bool(self._choices) and finished

    def answer(self) -> JSONObject:
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._choices[index] for index in sorted(self._choices)]
        if self._chat:
            for choice in choices:
                message = choice["message"]
                message.setdefault("content", None)
                if (
                    message["reasoning"] and not message["content"]
                ):  # a stream begins with an empty one, whatever follows
                    message["content"] = None
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage, "kv_transfer_params": None}

    def _add(self, event: JSONObject) -> None:
        if "error" in event:
            raise StreamError(event["error"])
        if not self._head:
            self._head = {"prompt_logprobs": None, "service_tier": None}
            if self._chat:
                self._head["prompt_token_ids"] = None
        self._head |= {key: value for key, value in event.items() if key not in ("choices", "usage", "object")}
        if event.get("usage") is not None:
            self._usage = event["usage"]
        for delta in event["choices"]:
            index = int(delta["index"])
            choice = self._choices.setdefault(index, self._new_choice(index))
            (self._add_chat if self._chat else self._add_text)(choice, delta)
            _add_common(choice, delta)

    def _new_choice(self, index: int) -> JSONObject:
        common: JSONObject = {"logprobs": None, "finish_reason": None, "stop_reason": None, "token_ids": None}
        if self._chat:
            message = {"role": "assistant", "refusal": None, "reasoning": None}
            return {"index": index, "message": message, **common}
        return {"index": index, "text": "", **common, "prompt_logprobs": None, "prompt_token_ids": None}

    def _add_text(self, choice: JSONObject, delta: JSONObject) -> None:
        choice["text"] += delta["text"]
        if delta.get("prompt_token_ids") is not None:
            choice["prompt_token_ids"] = delta["prompt_token_ids"]

    def _add_chat(self, choice: JSONObject, delta: JSONObject) -> None:
        message = choice["message"]
        for key, value in delta["delta"].items():
            if key == "tool_calls":
                _add_tool_calls(message.setdefault("tool_calls", []), value or [])
            elif isinstance(value, str) and key != "role":
                message[key] = (message.get(key) or "") + value
            elif value is not None or key not in message:
                message[key] = value


def _add_common(choice: JSONObject, delta: JSONObject) -> None:
    for key in ("finish_reason", "stop_reason"):
        if delta.get(key) is not None:
            choice[key] = delta[key]
    if delta.get("token_ids") is not None:
        choice["token_ids"] = (choice["token_ids"] or []) + delta["token_ids"]
    if delta.get("logprobs") is not None:
        choice["logprobs"] = _joined(choice["logprobs"], delta["logprobs"])


def _joined(before: JSONObject | None, more: JSONObject) -> JSONObject:
    """Log probabilities: an object of parallel lists (completions: tokens and more, chat: content)."""
    if before is None:
        return dict(more)
    return {key: before.get(key, []) + value if isinstance(value, list) else value for key, value in more.items()}


def _add_tool_calls(calls: list[Any], deltas: list[JSONObject]) -> None:
    """Tool calls come in pieces by index: id and name first, then the arguments' text bit by bit."""
    for delta in deltas:
        index = delta.get("index", len(calls))
        while len(calls) <= index:
            calls.append({"id": None, "type": "function", "function": {"name": None, "arguments": ""}})
        call = calls[index]
        call |= {key: delta[key] for key in ("id", "type") if delta.get(key) is not None}
        function = delta.get("function") or {}
        call["function"]["name"] = function.get("name") or call["function"]["name"]
        call["function"]["arguments"] += function.get("arguments") or ""
