"""A stream, put together to a whole answer."""

from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai.collect import Collector, StreamError

FIELDS = ("choices", "index", "text", "delta", "content", "tool_calls", "function", "arguments", "logprobs", "tokens",
          "token_ids", "finish_reason", "usage", "error", "code")  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=3)


def nesting(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    fields = st.dictionaries(st.sampled_from(FIELDS), values, max_size=4)
    return SCALARS | st.lists(values, max_size=3) | fields


JSON = nesting(nesting(nesting(SCALARS)))
CHOICES = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"index": JSON, "delta": JSON, "text": JSON}))}
)


def stream(*events: Any, done: bool = True) -> bytes:
    data = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)
    return data + (b"data: [DONE]\n\n" if done else b"")


def collected(raw: bytes, *, chat: bool) -> dict[str, Any]:
    collector = Collector(chat=chat)
    collector.feed(raw)
    assert collector.is_whole
    return collector.answer()


def delta(index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": "i", "created": 1, "model": "m", "choices": [{"index": index, "finish_reason": None, **fields}]}


TEXT = stream(
    delta(text="a", logprobs={"tokens": ["a"], "text_offset": [0]}, token_ids=[1], prompt_token_ids=[7]),
    delta(text="é", logprobs={"tokens": ["é"], "text_offset": [1]}, token_ids=[2], finish_reason="stop", stop_reason=9),
    {"id": "i", "created": 1, "model": "m", "choices": [], "usage": {"prompt_tokens": 3}, "system_fingerprint": "f"},
)


def test_a_completion() -> None:
    answer = collected(TEXT, chat=False)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("aé", "stop", 9)
    assert choice["logprobs"] == {"tokens": ["a", "é"], "text_offset": [0, 1]}
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([1, 2], [7])
    assert (answer["usage"], answer["system_fingerprint"]) == ({"prompt_tokens": 3}, "f")
    assert (answer["id"], answer["object"], answer["model"]) == ("i", "text_completion", "m")


def test_a_chat_answer() -> None:
    raw = stream(
        delta(delta={"role": "assistant", "content": ""}),
        delta(delta={"reasoning": "well"}),
        delta(delta={"content": "hel"}, logprobs={"content": [1]}),
        delta(delta={"content": "lo"}, logprobs={"content": [2]}, finish_reason="length"),
    )
    choice = collected(raw, chat=True)["choices"][0]
    assert choice["message"] == {"role": "assistant", "refusal": None, "reasoning": "well", "content": "hello"}
    assert choice["logprobs"] == {"content": [1, 2]}


def test_a_chat_answer_that_is_all_reasoning_has_no_content() -> None:
    """As one node puts it; its stream begins with an empty one."""
    raw = stream(
        delta(delta={"role": "assistant", "content": ""}), delta(delta={"reasoning": "well"}, finish_reason="length")
    )
    message = collected(raw, chat=True)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("well", None)


def test_tool_calls_come_in_pieces() -> None:
    raw = stream(
        delta(delta={"role": "assistant", "content": None}),
        delta(delta={"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f"}}]}),
        delta(delta={"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
        delta(delta={"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}, finish_reason="tool_calls"),
    )
    message = collected(raw, chat=True)["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]


def test_choices_are_kept_apart_and_in_order() -> None:
    raw = stream(
        delta(1, text="b", finish_reason="stop"), delta(0, text="a"), delta(0, text="a", finish_reason="length")
    )
    assert [choice["text"] for choice in collected(raw, chat=False)["choices"]] == ["aa", "b"]


@given(st.sets(st.integers(1, len(TEXT) - 1)))
def test_it_does_not_matter_how_the_stream_is_cut(cuts: set[int]) -> None:
    collector = Collector(chat=False)
    edges = [0, *sorted(cuts), len(TEXT)]
    for start, end in zip(edges, edges[1:], strict=False):  # noqa: RUF007  edges, not neighbours
        collector.feed(TEXT[start:end])
    assert collector.answer() == collected(TEXT, chat=False)


def test_keep_alives_and_carriage_returns_change_nothing() -> None:
    assert collected(b": keep-alive\n\n" + TEXT.replace(b"\n", b"\r\n"), chat=False) == collected(TEXT, chat=False)


@pytest.mark.parametrize("raw", [stream(delta(text="a"), done=True), stream(delta(text="a", finish_reason="stop"),
                                 done=False), b"", b"data: [DONE]\n\n"])  # fmt: skip
def test_what_stops_before_its_end_is_not_whole(raw: bytes) -> None:
    collector = Collector(chat=False)
    collector.feed(raw)
    assert not collector.is_whole


@pytest.mark.parametrize(("code", "status"), [(400, 400), (500, 500), ("x", 502), (None, 502), (200, 502)])
def test_an_error_event_is_an_error(code: Any, status: int) -> None:
    with pytest.raises(StreamError, match="no room") as error:
        Collector(chat=True).feed(stream({"error": {"message": "no room", "code": code}}))
    assert error.value.status == status


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "event", [None, [], 7, "error", {}, {"choices": 7}, {"choices": ["x"]}, {"choices": [{"index": 0, "delta": []}]}]
)
def test_what_is_no_event_of_a_stream_is_a_value_error(event: Any, chat: bool) -> None:
    with pytest.raises(ValueError, match="no event"):
        Collector(chat=chat).feed(stream(event))


@given(st.binary() | (JSON | CHOICES).map(orjson.dumps), st.lists(JSON | CHOICES), st.booleans())
def test_whatever_comes_is_read_or_a_value_error(raw: bytes, events: list[Any], chat: bool) -> None:
    for data in (b"data: " + raw + b"\n\n", stream(*events)):
        collector = Collector(chat=chat)
        with suppress(ValueError, StreamError):
            collector.feed(data)
            orjson.dumps(collector.answer())
