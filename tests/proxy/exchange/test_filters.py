"""What a stream's bytes go through: whole events, up to an error, and done only with the event that ends it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai.sse import MESSAGES_EVENTS, OPENAI_EVENTS, EventRules
from proxy.exchange.filters import PassBytes, PassEvents
from proxy.upstream.framing import are_whole_events

EVENTS = [b'data: {"text":"%d"}\n\n' % number for number in range(4)]
END = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"Traceback: /opt/engine/worker.py"}}\n\n'


def frame(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@given(st.sets(st.integers(1, 200)))
def test_an_error_is_kept_from_the_client_however_it_is_split(cuts: set[int]) -> None:
    stream = b"".join(EVENTS) + ERROR + END
    through = PassEvents(OPENAI_EVENTS)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    assert b"".join(through.feed(stream[a:b]) for a, b in pairwise(edges)) == b"".join(EVENTS)
    assert through.has_failed
    assert not through.is_done


@pytest.mark.parametrize(
    ("rules", "end"),
    [(OPENAI_EVENTS, END), (MESSAGES_EVENTS, b'event: message_stop\ndata: {"type":"message_stop"}\n\n')],
)
def test_a_stream_is_done_only_with_the_event_that_ends_it(rules: EventRules, end: bytes) -> None:
    through = PassEvents(rules)
    through.feed(b"".join(EVENTS))
    assert not through.is_done
    through.feed(end[:5])
    assert not through.is_done
    through.feed(end[5:])
    assert through.is_done


def test_whole_chunks_of_whole_events_pass_as_they_are_and_all_else_is_parsed() -> None:
    through = PassEvents(OPENAI_EVENTS)
    data = b"".join(map(frame, EVENTS))
    assert through.in_frames(data) == data
    for other in (frame(END), frame(ERROR), frame(EVENTS[0])[:-3], frame(EVENTS[0][:-1]), b"0\r\n\r\n"):
        assert through.in_frames(other) is None
    through.feed(EVENTS[0][:9])
    assert through.in_frames(data) is None


@given(st.lists(st.binary(max_size=20).map(lambda raw: raw + b"\n\n"), min_size=1, max_size=4), st.binary(max_size=8))
def test_chunks_are_known_without_a_parser(events: list[bytes], more: bytes) -> None:
    data = b"".join(map(frame, events))
    assert are_whole_events(data)
    assert not are_whole_events(data[:-1])
    assert not are_whole_events(data + more) or not more


def test_what_is_no_stream_passes_as_it_is() -> None:
    through = PassBytes()
    assert through.feed(ERROR) == ERROR
    assert through.in_frames(frame(ERROR)) is None
    assert through.is_done
    assert not through.has_failed
