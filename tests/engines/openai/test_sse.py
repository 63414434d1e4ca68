"""The one reader of server-sent events."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai.sse import (
    MESSAGES_EVENTS,
    OPENAI_EVENTS,
    RESPONSES_EVENTS,
    Event,
    EventRules,
    Splitter,
    events,
)

STREAM = b': ping\n\ndata: {"a":1}\n\nevent: x\ndata: 1\ndata: 2\n\ndata:[DONE]\n\n'
FOUND = [Event(b"", b'{"a":1}'), Event(b"x", b"1\n2"), Event(b"", b"[DONE]")]


@given(st.sets(st.integers(1, 90)), st.booleans())
def test_events_are_the_same_however_bytes_are_split_and_lines_end(cuts: set[int], crlf: bool) -> None:
    stream = STREAM.replace(b"\n", b"\r\n") if crlf else STREAM
    splitter = Splitter()
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    pieces = [splitter.feed(stream[a:b]) for a, b in pairwise(edges)]
    assert [event for piece in pieces for event in events(piece)] == FOUND
    assert b"".join(pieces) == STREAM
    assert all(not piece or piece.endswith(b"\n\n") for piece in pieces)
    assert splitter.is_between_events


@given(st.binary(max_size=60), st.sets(st.integers(1, 59)))
def test_no_byte_is_lost_or_made_up(data: bytes, cuts: set[int]) -> None:
    data = data.replace(b"\r", b"")
    splitter = Splitter()
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    passed = b"".join(splitter.feed(data[a:b]) for a, b in pairwise(edges))
    assert data.startswith(passed)
    assert passed == data[: data.rfind(b"\n\n") + 2] if b"\n\n" in data else passed == b""


def test_an_event_that_never_ends_is_no_event() -> None:
    splitter = Splitter()
    for _ in range(64):
        splitter.feed(b"x" * 2**20)
    with pytest.raises(ValueError, match="an event of more than"):
        splitter.feed(b"x")


@pytest.mark.parametrize(
    ("rules", "raw", "error", "ends"),
    [
        (OPENAI_EVENTS, b'data: {"error":{"code":500}}\n\n', b'{"error":{"code":500}}', False),
        (OPENAI_EVENTS, b'data: {"text":"{\\"error\\"","x":{"error":1}}\n\n', None, False),
        (OPENAI_EVENTS, b'data: {"text":"[DONE]"}\n\n', None, False),
        (OPENAI_EVENTS, b"data: [DONE]\n\n", None, True),
        (
            MESSAGES_EVENTS,
            b'event: error\ndata: {"type":"error","error":{}}\n\n',
            b'{"type":"error","error":{}}',
            False,
        ),
        (MESSAGES_EVENTS, b'data: {"type":"error"}\n\n', b'{"type":"error"}', False),
        (MESSAGES_EVENTS, b'event: content_block_delta\ndata: {"text":"error"}\n\n', None, False),
        (MESSAGES_EVENTS, b'event: message_stop\ndata: {"type":"message_stop"}\n\n', None, True),
        (RESPONSES_EVENTS, b'event: response.failed\ndata: {"x":1}\n\n', b'{"x":1}', False),
        (RESPONSES_EVENTS, b'event: response.completed\ndata: {"error":null}\n\n', None, True),
        (RESPONSES_EVENTS, b"event: response.created\ndata: {}\n\n", None, False),
    ],
)
def test_each_route_has_its_own_signs_of_an_error_and_of_the_end(
    rules: EventRules, raw: bytes, error: bytes | None, ends: bool
) -> None:
    assert rules.error_in(raw) == error
    assert rules.has_end(raw) is ends


def test_what_came_before_an_error_is_whole() -> None:
    whole = b'data: {"a":1}\n\ndata: {"error":{}}\n\ndata: [DONE]\n\n'
    assert OPENAI_EVENTS.before_error(whole) == b'data: {"a":1}\n\n'
    assert OPENAI_EVENTS.before_error(b'data: {"error":{}}\n\n') == b""


@pytest.mark.parametrize(
    ("whole", "has_begun"),
    [
        (b"", False),
        (b": a comment\n\n", False),
        (b"event: response.created\ndata: {}\n\nevent: response.in_progress\ndata: {}\n\n", False),
        (b"event: response.created\ndata: {}\n\nevent: response.output_item.added\ndata: {}\n\n", True),
        (b"event: response.failed\ndata: {}\n\n", True),
    ],
)
def test_a_stream_of_responses_has_begun_when_its_engine_has_the_request(whole: bytes, *, has_begun: bool) -> None:
    assert RESPONSES_EVENTS.has_begun(whole) is has_begun
