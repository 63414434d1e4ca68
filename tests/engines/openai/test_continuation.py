"""A stream on its way: what is noted, what the client sees, and what is asked for when its node is lost."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import JSONObject
from engines.openai.continuation import SentTokens, Splice, can_be_continued, continuation_body
from engines.openai.routes import CHAT, COMPLETIONS, MESSAGES

CHUNK = "data: %s\n\n"


def event(text: str, ids: list[int] | None, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish, "token_ids": ids, "prompt_token_ids": None}
    body = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def frame(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def chat_event(delta: JSONObject, ids: list[int] | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": ids}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


STREAM = [event("a", [10]), event('say "token_ids":[1,2]', [11, 12]), event("", [13]), event("é", [14])]


@given(st.sets(st.integers(1, len(b"".join(STREAM)) - 1)))
def test_however_the_bytes_are_split_the_tokens_are_noted_and_hidden(cuts: set[int]) -> None:
    whole = b"".join(STREAM)
    sent = SentTokens(hide=True)
    seen = b"".join(sent.feed(whole[a:b]) for a, b in pairwise([0, *sorted(cuts), len(whole)]))
    assert sent.token_ids() == [10, 11, 12, 13, 14]
    shown = [json.loads(line[6:]) for line in seen.decode().split("\n\n") if line]
    assert [e["choices"][0]["text"] for e in shown] == ["a", 'say "token_ids":[1,2]', "", "é"]
    assert [e["choices"][0]["token_ids"] for e in shown] == [None] * 4


@pytest.mark.parametrize("ids", [[5], [10], [100], [31999], [1, 2, 3]])
def test_bytes_that_are_chunks_already_keep_their_length(ids: list[int]) -> None:
    sent = SentTokens(hide=True)
    sent.feed(STREAM[0])
    data = frame(event("x", ids))
    blanked = sent.in_frames(data)
    assert blanked is not None
    assert len(blanked) == len(data)
    body = json.loads(blanked.split(b"\r\n", 1)[1].removeprefix(b"data: ").removesuffix(b"\n\n\r\n"))
    assert not body["choices"][0]["token_ids"]
    assert body["choices"][0]["text"] == "x"
    assert sent.token_ids() == [10, *ids]


IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=4)
EVENTS = st.builds(event, st.just("") | st.text(max_size=40), IDS | st.just([7]))


@given(
    st.lists(st.lists(EVENTS, min_size=1, max_size=4), min_size=1, max_size=12),
    st.booleans(),
    st.binary(min_size=1, max_size=4),
)
def test_events_in_chunks_are_noted_as_they_are_in_pieces(reads: list[list[bytes]], hide: bool, more: bytes) -> None:
    quick, long = SentTokens(hide=hide), SentTokens(hide=hide)
    for sent in (quick, long):
        sent.feed(STREAM[0])
    for events in reads:
        data = b"".join(map(frame, events))
        assert quick.in_frames(data + more) is None
        assert quick.in_frames(more + data) is None
        passed = quick.in_frames(data)
        assert (passed is None) == any(b'"text":""' in each for each in events)
        pieces = [long.feed(piece) for piece in events]
        if passed is None:
            told = [quick.feed(piece) for piece in events]
        else:
            assert len(passed) == len(data)
            told = [line for line in passed.split(b"\n") if line.startswith(b"data: ")]
        assert [without_ids(each) for each in told] == [without_ids(piece) for piece in pieces]
        assert quick.tokens == long.tokens
        assert quick.can_resume == long.can_resume
        assert quick.token_ids() == long.token_ids()


def without_ids(shown: bytes) -> Any:
    """An event as the client reads it, to whom no ids and an empty list of them are the same."""
    told = json.loads(shown[6:])
    told["choices"][0]["token_ids"] = told["choices"][0]["token_ids"] or None
    return told


ORDINARY = frame(event("a", [1]))


@pytest.mark.parametrize(
    "other",
    [
        frame(b'data: {"error":{"message":"\\"finish_reason\\":null,\\"token_ids\\":[1]"}}\n\n'),
        frame(b'data: {"id":"x","choices":[{"index":0,"text":"","finish_reason":"stop","token_ids":[2]}]}\n\n'),
        frame(b'data: {"id":"x","choices":[{"index":0,"text":"a","finish_reason":null,"token_ids":[]}]}\n\n'),
        frame(b'data: {"id":"x","choices":[{"index":0,"text":"a","finish_reason":null,"token_ids":["1"]}]}\n\n'),
        frame(b'data: {"id":"x","choices":[{"index":0,"text":"a","finish_reason":null,"token_ids":[1'),
        frame(event("a", None)),
        frame(event("a", [1]) + event("b", [2])),
        frame(event("", [1])),
        frame(event("a" * 5000, [1])),
        frame(event("a", [*range(50)])),
        frame(event("a", [1]))[1:],
        b"0" + frame(event("a", [1])),
        frame(event("a", [1])).replace(b"\r\n", b";x\r\n", 1),
        frame(event("a", [1]))[:-2] + b"\n\r",
        frame(b": ping\n\n"),
        frame(b"data: [DONE]\n\n"),
        b"0\r\n\r\n",
        b"\r\n",
    ],
)
def test_what_is_no_ordinary_event_is_not_touched(other: bytes) -> None:
    sent = SentTokens(hide=True)
    sent.feed(event("a", [1]))
    for data in (other, ORDINARY + other, other + ORDINARY):
        assert sent.in_frames(data) is None
        assert sent.tokens == 1


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"content": "a"}, {"content": "b"}),
        ({"reasoning": "a"}, {"reasoning": "b"}),
        ({"content": "a", "reasoning": None}, {"content": None, "reasoning": "b"}),
    ],
)
def test_a_chats_events_have_a_form_of_their_own_and_it_may_change(first: JSONObject, then: JSONObject) -> None:
    sent = SentTokens(hide=True)
    sent.feed(chat_event({"role": "assistant", "content": ""}, None))
    for delta in (first, then):
        sent.feed(chat_event(delta, [1]))
        data = frame(chat_event(delta, [12345]))
        assert sent.in_frames(data) == data.replace(b"[12345]", b"null   ")
    assert sent.token_ids() == [1, 12345, 1, 12345]


def test_before_an_ordinary_event_has_been_parsed_none_is_known() -> None:
    assert SentTokens(hide=True).in_frames(ORDINARY) is None


def test_reasoning_is_noticed_on_its_way() -> None:
    sent = SentTokens(hide=True)
    sent.feed(chat_event({"content": "a"}, [1]))
    assert sent.can_resume
    assert sent.in_frames(frame(chat_event({"reasoning": "so"}, [2]))) is not None
    assert not sent.can_resume


def test_a_client_that_asked_for_ids_gets_the_bytes_unchanged() -> None:
    sent = SentTokens(hide=False)
    assert sent.feed(STREAM[0]) == STREAM[0]
    assert sent.in_frames(frame(STREAM[1])) == frame(STREAM[1])
    assert sent.token_ids() == [10, 11, 12]


def test_tokens_whose_text_has_not_been_sent_come_again() -> None:
    """Half a character: the node holds the text back until the rest of it comes."""
    sent = SentTokens(hide=True)
    for part in (event("a", [10]), event("b", [11]), event("", [12]), event("", [13])):
        sent.feed(part)
    assert sent.can_resume
    assert sent.token_ids() == [10, 11]


def test_tokens_that_were_shown_may_not_come_again() -> None:
    sent = SentTokens(hide=False)
    sent.feed(event("a", [10]))
    assert sent.can_resume
    sent.feed(event("", [11]))
    assert not sent.can_resume


@pytest.mark.parametrize("last", [event("bc", [11, 12]), event("b", None), event("b", [])])
def test_where_the_tokens_are_not_known_one_by_one_nothing_goes_on(last: bytes) -> None:
    sent = SentTokens(hide=True)
    sent.feed(event("a", [10]) + last)
    assert not sent.can_resume


def test_an_engines_death_as_an_event_is_kept_from_the_client() -> None:
    sent = SentTokens(hide=True)
    failed = b'data: {"error":{"message":"EngineCore died","code":500}}\n\ndata: [DONE]\n\n'
    assert sent.in_frames(frame(failed)) is None
    assert sent.feed(STREAM[0] + failed).count(b"data:") == 1
    assert sent.has_failed
    assert not sent.is_done


@pytest.mark.parametrize(
    ("route", "body", "can"),
    [
        (COMPLETIONS, {"prompt": "x", "stream": True}, True),
        (CHAT, {"messages": [], "stream": True, "temperature": 1, "seed": 3}, True),
        (COMPLETIONS, {"prompt": "x"}, False),
        (MESSAGES, {"messages": [], "stream": True}, False),
        (CHAT, {"messages": [], "stream": True, "tools": [{}]}, False),
        (CHAT, {"messages": [], "stream": True, "logprobs": True}, False),
        (CHAT, {"messages": [], "stream": True, "response_format": {"type": "text"}}, True),
        (CHAT, {"messages": [], "stream": True, "response_format": {"type": "json_object"}}, False),
        (CHAT, {"messages": [], "stream": True, "stop": "x"}, False),
        (CHAT, {"messages": [], "stream": True, "stream_options": {"continuous_usage_stats": True}}, False),
        (COMPLETIONS, {"prompt": "x", "stream": True, "repetition_penalty": 1.1}, False),
        (COMPLETIONS, {"prompt": "x", "stream": True, "stream_options": "x"}, False),
        (COMPLETIONS, {"prompt": "x", "stream": True, "stream_options": [1]}, False),
        (CHAT, {"messages": [], "stream": True, "include_reasoning": False}, False),
    ],
)
def test_what_can_be_continued(route: Any, body: dict[str, Any], can: bool) -> None:
    assert can_be_continued(route, body) is can


def test_the_rest_is_asked_for_by_token_ids() -> None:
    body = {"model": "m", "messages": [{}], "max_completion_tokens": 9, "min_tokens": 4, "seed": 3, "stream": True,
            "chat_template_kwargs": {}, "truncate_prompt_tokens": 1, "logprobs": False}  # fmt: skip
    rest = continuation_body(CHAT, body, [1, 2], [3, 4, 5], 100)
    assert rest == {
        "model": "m", "seed": 3, "stream": True, "prompt": [1, 2, 3, 4, 5], "max_tokens": 6, "min_tokens": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "sent", "left"),
    [
        ({"prompt": "x"}, 3, 13),
        ({"prompt": "x", "max_tokens": 3}, 3, None),
        ({"messages": []}, 3, 100 - 2 - 3),
        ({"messages": [], "max_tokens": 5}, 3, 2),
    ],
)
def test_the_limit_counts_what_was_sent(body: dict[str, Any], sent: int, left: int | None) -> None:
    route = CHAT if "messages" in body else COMPLETIONS
    rest = continuation_body(route, body, [1, 2], [7] * sent, 100)
    assert (rest and rest["max_tokens"]) == left


def test_without_any_limit_there_is_no_continuation() -> None:
    with pytest.raises(ValueError, match="how long"):
        continuation_body(CHAT, {"messages": []}, [1], [2], None)


def test_a_continuation_speaks_in_the_name_of_the_stream_it_continues() -> None:
    head = b'{"id":"chatcmpl-9","object":"chat.completion.chunk","created":7,"model":"m","choices":[]}'
    body = {"messages": [], "stream_options": {"include_usage": True}}
    splice = Splice(CHAT, body, head, {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}, sent=3)
    usage = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":10}}\n\n'
    made = splice.spliced(event("b", [9], "length") + usage + b"data: [DONE]\n\n").decode()
    text, counted, done, _ = made.split("\n\n")
    choice = json.loads(text[6:])["choices"][0]
    assert json.loads(text[6:])["id"] == "chatcmpl-9"
    assert (choice["delta"], choice["finish_reason"], choice["token_ids"]) == ({"content": "b"}, "length", None)
    assert json.loads(counted[6:])["usage"] == {
        "prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens": 5, "total_tokens": 10,
    }  # fmt: skip
    assert done == "data: [DONE]"


@given(st.sets(st.integers(1, 200)), st.booleans())
def test_line_ends_of_two_bytes_and_keep_alives_change_nothing(cuts: set[int], crlf: bool) -> None:
    whole = b": keep-alive\n\n" + STREAM[0] + b": keep-alive\n\n" + STREAM[1] + b"data: [DONE]\n\n"
    if crlf:
        whole = whole.replace(b"\n", b"\r\n")
    sent = SentTokens(hide=True)
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    seen = b"".join(sent.feed(whole[a:b]) for a, b in pairwise(edges))
    assert sent.token_ids() == [10, 11, 12]
    assert sent.is_done
    assert sent.can_resume is False or sent.tokens == 2
    assert seen.count(b"data: ") == 3
    assert json.loads(sent.first_event)["choices"][0]["text"] == "a"
    splice = Splice(COMPLETIONS, {}, sent.first_event, {"prompt_tokens": 1}, 1)
    assert splice.spliced(seen).count(b"data: ") == 3


def test_an_answer_without_text_yet_is_not_continued_where_a_parser_may_hold_its_beginning_back() -> None:
    sent = SentTokens(hide=True, needs_text=True)
    sent.feed(chat_event({"role": "assistant", "content": ""}, []))
    sent.feed(chat_event({}, [151667]))
    said_nothing = sent.can_resume
    sent.feed(chat_event({"content": "Hello"}, [9]))
    assert (said_nothing, sent.can_resume) == (False, True)
    by_frames = SentTokens(hide=True, needs_text=True)
    by_frames.feed(STREAM[0])
    assert by_frames.in_frames(frame(event("x", [5]))) is not None
    assert by_frames.can_resume


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "min_tokens"])
def test_a_number_that_is_a_string_is_not_counted_with(field: str) -> None:
    assert not can_be_continued(COMPLETIONS, {"stream": True, field: "12"})
    assert can_be_continued(COMPLETIONS, {"stream": True, field: 12})


def test_of_an_answer_that_has_ended_all_tokens_count() -> None:
    sent = SentTokens(hide=True)
    sent.feed(event("a", [10]) + event("", [2], finish="stop"))
    assert (sent.token_ids(), sent.all_token_ids()) == ([10], [10, 2])
