"""A stream that lost its node in the middle, continued on another: what was sent, and what is still to be asked for.

The tokens sent are known exactly: the decode node is asked for them (`return_token_ids`), and they are taken out of its
events before the client sees them. The rest is asked for as a completion of the prompt's and the sent tokens' ids, so
with greedy sampling it is the rest that the lost node would have made. Source: vLLM 0.32, whose chunks always carry
`token_ids`, null unless asked for.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson

from ..base import JSONObject
from .routes import CHAT, COMPLETIONS, Route
from .sse import END_OF_EVENT, OPENAI_EVENTS, Splitter, events

_IDS = re.compile(rb'"token_ids":\[([0-9,]*)\]')
_PROMPT_IDS = re.compile(rb'"prompt_token_ids":\[[0-9,]*\]')
_FINISHED = b'"finish_reason":"'
_TEXT = re.compile(rb'"(?:content|text)":"[^"]')
_REASONING = b'"reasoning":"'
_END_OF_CHUNK = b"\n\n\r\n"
_DONE = b"data: [DONE]"
_EVENT = b'data: {"id":'
_NO_TEXT = b':"'
"""How an event without text ends before its text's closing quote; a quote within a text has a backslash before it."""
_ORDINARY = re.compile(rb'("(?:,"[a-z_]+":null)*\}?(?:,"[a-z_]+":null)*,"token_ids":\[)[0-9,]+(\][^\n\[]*\n\n)')
"""From the closing quote of an event's text to its end; nothing but nulls and token ids stand there."""
_LONGEST_CHUNK = 2048
_LONGEST_IDS = 64
_REMEMBERED_READS = 8
_DEFAULT_COMPLETION_TOKENS = 16

_CANNOT = frozenset(
    {
        "tools",
        "functions",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "echo",
        "suffix",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "thinking_token_budget",
    }
)
"""Fields whose meaning depends on what was generated before, or whose output has a place in the whole."""

_NUMBERS = ("max_tokens", "max_completion_tokens", "min_tokens")
"""VLLM reads strings for numbers too; what is counted here must be one."""

_PLAIN_TEXT = {"type": "text"}
"""A `response_format` that asks for nothing."""

_DONE_WITH = frozenset(
    {
        "messages",
        "max_completion_tokens",
        "tool_choice",
        "parallel_tool_calls",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "reasoning_effort",
        "include_reasoning",
        "mm_processor_kwargs",
        "truncate_prompt_tokens",  # done, by the first prefill; so on either route
        "truncation_side",
    }
)


def can_be_continued(route: Route, body: JSONObject) -> bool:
    """Whether a stream of this request can go on elsewhere: plain text, one choice, known tokens."""
    if route not in (CHAT, COMPLETIONS) or not body.get("stream"):
        return False
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or options.get("continuous_usage_stats"):
        return False
    if not all(isinstance(body.get(field), int | None) for field in _NUMBERS):
        return False
    shows_all = body.get("include_reasoning", True) is True  # else a node with a reasoning parser tells no token ids
    return shows_all and not any(body[field] and body[field] != _PLAIN_TEXT for field in _CANNOT & body.keys())


class SentTokens:
    """Sees every byte of a stream on its way, and keeps what a continuation needs.

    A client that did not ask for token ids does not get them: they are blanked, where they stand when the bytes are
    chunks already (their lengths must stay right), else cut out.
    """

    def __init__(self, *, hide: bool, needs_text: bool = False) -> None:
        """`needs_text`: of an answer without any text yet nobody knows whether a parser holds its beginning back."""
        self._hide = hide
        self._needs_text = needs_text
        self._has_text = False
        self._splitter = Splitter()
        self._holds_rest = False
        self._ids = bytearray()
        """Of every event with tokens what stands between its brackets, and the closing one: a stream may be long."""
        self._form: _Form | None = None
        self._reads: list[bytes] = []
        """What `feed` was given since the last ordinary event."""
        self._several_before = False
        """Whether that event had more than one token."""
        self._fed = 0
        """How many of the ids there were when `feed` had read the last of these."""
        self.first_event = b""
        self.is_finished = False
        """The choice has ended: all that can be missing is the usage, and the end mark."""
        self.is_done = False
        self.has_failed = False
        """Its engine died under the node, which then sends an error as an event. The client does not see it."""
        self._has_reasoning = False

    def in_frames(self, data: bytes) -> bytes | None:
        """HTTP chunks as most reads of a stream are: whole, each with one ordinary event: some text and its tokens.

        The same bytes, as many of them. None, and nothing noted, when anything else is among them: that is for an HTTP
        parser, and then for `feed`. This is what a token costs. It runs between system calls, with cold caches, so few
        steps count, and memory that is not touched.
        """
        form = self._form
        if form is None or self._holds_rest:
            return None
        mark, tail, before_tail, blanks = form
        head, _, end = data.rpartition(mark)
        ids = end[:before_tail]
        try:
            if (
                not (ids.isdigit() or ids.replace(b",", b"0").isdigit())
                or not end.endswith(tail)
                or not data.startswith(_CHUNK_HEADS[len(data)])
                or head.count(b"\n") != 1
                or head.endswith(_NO_TEXT)
            ):
                return self._frame_by_frame(data)
            passed = head + blanks[len(ids)] if self._hide else data
        except IndexError:
            return self._frame_by_frame(data)
        if _REASONING in head:
            self._has_reasoning = True
        noted = self._ids
        noted += ids
        noted += b"]"
        return passed

    def _frame_by_frame(self, data: bytes) -> bytes | None:
        *frames, rest = data.split(_END_OF_CHUNK)
        if rest or len(frames) < 2:
            return None
        noted = len(self._ids)
        passed = []
        for frame in frames:
            one = self.in_frames(frame + _END_OF_CHUNK)
            if one is None:
                del self._ids[noted:]
                return None
            passed.append(one)
        return b"".join(passed)

    def feed(self, data: bytes) -> bytes:
        """All events that are complete now. What comes of an event before its end is kept until it is whole."""
        if self.has_failed:
            return b""
        whole = self._splitter.feed(data)
        self._holds_rest = not self._splitter.is_between_events
        if not whole:
            return b""
        if OPENAI_EVENTS.error_in(whole) is not None:
            whole, self.has_failed = OPENAI_EVENTS.before_error(whole), True
        if not self.first_event:
            self.first_event = next((event.data for event in events(whole)), b"")
        self._note(whole)
        shown = _IDS.sub(self._cut if self._hide else self._kept, whole)
        self._fed = len(self._ids)
        return _PROMPT_IDS.sub(b'"prompt_token_ids":null', shown) if self._hide else shown

    @property
    def tokens(self) -> int:
        """Events with tokens so far; with one token an event, as vLLM sends them, that many tokens."""
        return self._ids.count(b"]")

    @property
    def can_resume(self) -> bool:
        """What has been sent is enough to continue from."""
        without_text = self._tokens_without_text()
        if not self.first_event or self._has_reasoning or without_text is None:
            return False
        if self._needs_text and not (self._has_text or len(self._ids) > self._fed):  # an ordinary event has text
            return False
        return self._hide or without_text == 0  # ids that were shown may not come again

    def all_token_ids(self) -> list[int]:
        """Those without text too, as the one that ends an answer is."""
        return [int(number) for number in self._ids.replace(b"]", b",").split(b",") if number]

    def token_ids(self) -> list[int]:
        """The tokens whose text has been sent. The last ones may have none yet (half a character): they come again."""
        ids = self.all_token_ids()
        without_text = self._tokens_without_text() or 0
        return ids[: len(ids) - without_text]

    def _note(self, data: bytes) -> None:
        if len(self._ids) > self._fed:
            self._several_before, self._has_text = self._has_several(), True
            self._reads.clear()
        self._reads.append(data)
        del self._reads[:-_REMEMBERED_READS]
        self._form = _form_of(data) or self._form
        if not self._has_text and _TEXT.search(data):
            self._has_text = True
        if _FINISHED in data:
            self.is_finished = True
        if _REASONING in data:
            self._has_reasoning = True
        if OPENAI_EVENTS.has_end(data):
            self.is_done = True

    def _cut(self, found: "re.Match[bytes]") -> bytes:
        self._ids += found[1] + b"]"
        return b'"token_ids":null'

    def _kept(self, found: "re.Match[bytes]") -> bytes:
        self._ids += found[1] + b"]"
        return found[0]

    def _tokens_without_text(self) -> int | None:
        """At the end of what was sent; None when nobody can tell.

        That is when they go further back than is remembered, and when the last event with text has several tokens: the
        text of the last of them may be held back, half a character, and would come again with all that is before it.
        """
        if len(self._ids) > self._fed:  # the last event was an ordinary one
            return None if self._has_several() else 0
        count = 0
        for read in reversed(self._reads):
            for event in reversed(list(_parsed(read))):
                if not event.get("choices"):
                    continue
                choice = event["choices"][0]
                tokens = len(choice.get("token_ids") or ())
                if choice.get("text") or (choice.get("delta") or {}).get("content"):
                    return count if tokens == 1 else None
                count += tokens
        return None if len(self._reads) == _REMEMBERED_READS or self._several_before else count

    def _has_several(self) -> bool:
        """Whether the last event with tokens has more than one."""
        return self._ids.rfind(b",") > self._ids.rfind(b"]", 0, -1)


_Form = tuple[bytes, bytes, int, tuple[bytes, ...]]
"""What an ordinary event's chunk has after its text: up to the ids, after them, the length of that below 0, and all of
it with ids blanked that take so many bytes."""


def _form_of(events: bytes) -> _Form | None:
    """That of the first ordinary event among these, if there is one; those to come are most likely like it."""
    found = _ORDINARY.search(events)
    if found is None or b'"finish_reason":null' not in found[1]:
        return None
    return _form(found[1], found[2] + b"\r\n")


@lru_cache(maxsize=64)
def _form(mark: bytes, tail: bytes) -> _Form:
    blanks = tuple(mark[:-1] + _blank(length) + tail[1:] for length in range(_LONGEST_IDS))
    return mark, tail, -len(tail), blanks


def _blank(length: int) -> bytes:
    """No token ids, in the place of a list of so many characters between its brackets."""
    return (b"null" if length >= 2 else b"[]").ljust(length + 2)


def _chunk_head(length: int) -> bytes:
    """How an HTTP chunk that has so many bytes in all begins, if it is an event. Nothing does when there is no such."""
    for size in range(max(1, length - 10), length):
        line = b"%x\r\n" % size
        if len(line) + size + 2 == length:
            return line + _EVENT
    return b"no chunk"


_CHUNK_HEADS = tuple(map(_chunk_head, range(_LONGEST_CHUNK)))


def continuation_body(
    route: Route, body: JSONObject, prompt: list[int], sent: list[int], max_model_len: int | None
) -> JSONObject | None:
    """The completions request that makes the rest; None when there is no rest. Raises ValueError when none is known."""
    chat = route is CHAT
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    if asked is None and chat and max_model_len is None:
        raise ValueError("nobody knows how long the answer may become")
    most = asked or ((max_model_len or 0) - len(prompt) if chat else _DEFAULT_COMPLETION_TOKENS)
    left = most - len(sent)
    if left <= 0:
        return None
    rest = {key: value for key, value in body.items() if key not in _DONE_WITH and key not in _CANNOT}
    rest |= {
        "prompt": [*prompt, *sent],
        "max_tokens": left,
        "min_tokens": max(0, (body.get("min_tokens") or 0) - len(sent)),
    }
    return rest


class Splice:
    """Makes the events of a continuation look like those of the stream they continue."""

    def __init__(self, route: Route, body: JSONObject, first_event: bytes, usage: JSONObject, sent: int) -> None:
        """`first_event`: its data; `usage`: prompt tokens and their details, as the first stream's would have been;
        `sent`: tokens so far. Raises ValueError when the first event is none of this route.
        """
        head = orjson.loads(first_event)
        if not isinstance(head, dict):
            raise ValueError("no event of this route")
        self._head = {key: head[key] for key in ("id", "object", "created", "model") if key in head}
        self._chat = route is CHAT
        self._asked_for_ids = bool(body.get("return_token_ids"))
        self._wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._usage = usage
        self._sent = sent

    def spliced(self, whole: bytes) -> bytes:
        """The same events, in the first stream's name; its end mark as it is, and comments dropped.

        Raises ValueError when they are none of a completion.
        """
        try:
            made = [self._event(event) for event in _parsed(whole)]
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError("no events of a completion") from exc
        if OPENAI_EVENTS.has_end(whole):
            made.append(_DONE + END_OF_EVENT)
        return b"".join(made)

    def ending(self, finish_reason: str | None, made: int) -> bytes:
        """What is left to say when all tokens are there: perhaps how it ended, the usage if asked for, the end mark."""
        said = []
        if finish_reason is not None:
            said.append(self._event({"choices": [{"index": 0, "text": "", "finish_reason": finish_reason}]}))
        if self._wants_usage:
            said.append(self._event({"choices": [], "usage": {"completion_tokens": made}}))
        return b"".join([*said, _DONE + END_OF_EVENT])

    def _event(self, event: JSONObject) -> bytes:
        joined: JSONObject = {**self._head, "choices": [self._choice(choice) for choice in event["choices"]]}
        if event.get("usage"):
            made = self._sent + event["usage"]["completion_tokens"]
            total = self._usage["prompt_tokens"] + made
            joined["usage"] = {**self._usage, "completion_tokens": made, "total_tokens": total}
        return b"data: " + orjson.dumps(joined) + END_OF_EVENT

    def _choice(self, choice: JSONObject) -> JSONObject:
        joined = {key: value for key, value in choice.items() if key not in ("text", "prompt_token_ids")}
        joined["token_ids"] = choice.get("token_ids") if self._asked_for_ids else None
        if self._chat:
            joined.pop("prompt_logprobs", None)
            return {**joined, "delta": {"content": choice.get("text", "")}}
        return {**joined, "text": choice.get("text", "")}


def _parsed(whole: bytes) -> Iterator[Any]:
    """The parsed JSON of every event that is an object; others are passed over."""
    for event in events(whole):
        if event.data.startswith(b"{"):
            try:
                yield orjson.loads(event.data)
            except orjson.JSONDecodeError:
                continue
