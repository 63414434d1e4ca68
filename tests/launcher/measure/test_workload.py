"""Which requests are sent, from traces, conversations and generators."""

import json
import statistics
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import ConfigError
from launcher.measure import traces
from launcher.measure.workload import Request, Workload, token_ids
from tests.processes import ROOT

VOCABULARY = list(range(100, 200))
PUBLISHED = ROOT.parent / "shared" / "data" / "mooncake_conversation_trace.jsonl"
lengths = st.integers(1, 5000)
requests_made = st.lists(
    st.tuples(st.floats(0, 100), lengths, st.integers(1, 500), st.integers(0, 3)), min_size=1, max_size=20
)


def workload(rows: list[tuple[float, int, int, int]], piece: int = 64) -> Workload:
    """Prompts that begin with some of the same pieces."""
    made = [
        Request(at, tokens, output, (*range(shared), *range(1000 * n, 1000 * n + 100))[: -(-tokens // piece)])
        for n, (at, tokens, output, shared) in enumerate(sorted(rows), 1)
    ]
    return Workload("made", piece, tuple(made))


def trace(folder: Path, *lines: dict[str, Any] | str) -> Path:
    file = folder / "trace.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


ROW = {"timestamp": 3000, "input_length": 1030, "output_length": 7, "hash_ids": [1, 2, 3]}


def test_a_trace_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    found = traces.from_file(trace(tmp_path, ROW | {"timestamp": 5500}, ROW))
    assert [request.at for request in found.requests] == [0.0, 2.5]
    assert found.requests[0] == Request(0.0, 1030, 7, (1, 2, 3))


def test_what_a_prompt_has_beyond_its_pieces_is_its_own(tmp_path: Path) -> None:
    found = traces.from_file(trace(tmp_path, ROW | {"hash_ids": [1]}, {**ROW, "hash_ids": None}))
    one, other = (request.pieces for request in found.requests)
    assert (len(one), len(other)) == (3, 3)
    assert one[0] == 1
    assert not set(one[1:]) & set(other)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ":2: Invalid JSON"),
        ({"timestamp": 0}, ":2: input_length: Field required"),
        (ROW | {"input_length": 0}, ":2: input_length: .*greater than or equal to 1"),
        (ROW | {"timestamp": -1}, ":2: timestamp"),
        (ROW | {"hash_ids": ["a"]}, ":2: hash_ids.0"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        traces.from_file(trace(tmp_path, ROW, line))


def test_a_file_that_is_none_or_is_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        traces.from_file(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="has no requests"):
        traces.from_file(trace(tmp_path))


def test_each_turn_of_a_conversation_begins_with_those_before(tmp_path: Path) -> None:
    said = [("human", 4000), ("gpt", 400), ("human", 800), ("gpt", 40)]
    turns = [{"from": who, "value": "x" * number} for who, number in said]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([{"conversations": turns}, {"conversations": turns}]))
    first, second, third, _ = traces.from_file(file).requests
    assert (first.tokens, first.output) == (1000, 100)
    assert (second.tokens, second.output) == (1300, 10)
    assert second.pieces[: len(first.pieces)] == first.pieces
    assert not set(third.pieces) & set(second.pieces)
    assert traces.from_file(file).seconds == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "entry 1 has no list of conversations"),
        ('[{"conversations": [{"from": "human"}]}]', "a turn of entry 1 says nothing"),
        ("[", r"chats.json:1"),
    ],
)
def test_what_are_no_conversations_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "chats.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        traces.from_file(file)


def test_lengths_and_a_rate_make_a_workload() -> None:
    made = traces.made("input=600,output=20,rate=5,shared=300", 300, seed=1)
    assert {(request.tokens, request.output) for request in made.requests} == {(600, 20)}
    assert made.rate == pytest.approx(5, rel=0.2)
    assert made.shared == pytest.approx(0.5, abs=0.02)


def test_conversations_of_several_turns_grow() -> None:
    made = traces.made("input=100,output=50,rate=1,turns=3,pause=5", 300, seed=1)
    sessions: dict[int | None, list[Request]] = {}
    for request in made.requests:
        sessions.setdefault(request.session, []).append(request)
    whole = [turns for turns in sessions.values() if len(turns) == 3]
    assert whole
    for turns in whole:
        assert [turn.tokens for turn in turns] == [100, 250, 400]
        assert turns[2].pieces[: len(turns[1].pieces)] == turns[1].pieces


@pytest.mark.parametrize(
    "text", ["input=600", "input=0,output=1", "input=1,output=1,speed=3", "fast", "input=x,output=1"]
)
def test_what_makes_no_workload_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--workload"):
        traces.made(text, 300, seed=1)


def test_the_generator_gives_the_same_for_a_seed_and_another_for_the_next() -> None:
    digests = [traces.made("conversations", 300, seed=seed).digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published trace is not here")
def test_the_generator_is_like_the_published_trace() -> None:
    published, made = traces.from_file(PUBLISHED), traces.made("conversations", 12000, seed=3)
    for of in (attrgetter("tokens"), attrgetter("output")):
        means = [statistics.fmean(map(of, one.requests)) for one in (published, made)]
        assert means[1] == pytest.approx(means[0], rel=0.15)
    assert made.rate == pytest.approx(published.rate, rel=0.1)
    assert made.shared == pytest.approx(published.shared, abs=0.12)


@given(requests_made, st.floats(0.01, 3))
def test_scaled_prompts_have_whole_pieces_and_share_what_they_shared(
    rows: list[tuple[float, int, int, int]], factor: float
) -> None:
    made = workload(rows).scaled(factor)
    for request in made.requests:
        assert request.tokens >= 1
        assert request.output >= 1
        assert len(request.pieces) == -(-request.tokens // made.piece_tokens)


@given(requests_made, st.integers(0, 3))
def test_a_prompt_has_the_tokens_it_should_and_equal_pieces_are_equal(
    rows: list[tuple[float, int, int, int]], draw: int
) -> None:
    made = workload(rows)
    prompts = [token_ids(request, made.piece_tokens, VOCABULARY, draw) for request in made.requests]
    for request, ids in zip(made.requests, prompts, strict=True):
        assert len(ids) == request.tokens
        assert set(ids) <= set(VOCABULARY)
    for request, ids in zip(made.requests, prompts, strict=True):
        first, whole = made.requests[0], made.piece_tokens
        if request.pieces[0] == first.pieces[0]:
            assert ids[:whole] == prompts[0][: len(ids)][:whole] or first.tokens < whole


def test_another_round_has_other_tokens() -> None:
    request = Request(0, 100, 1, (1, 2))
    assert token_ids(request, 64, VOCABULARY, 1) != token_ids(request, 64, VOCABULARY, 2)


def test_a_rate_keeps_the_proportions_of_the_gaps() -> None:
    made = workload([(0, 10, 1, 0), (1, 10, 1, 0), (4, 10, 1, 0)]).at_rate(4, seed=0)
    assert [request.at for request in made.requests] == pytest.approx([0, 0.125, 0.5])
    assert made.rate == pytest.approx(4)


def test_requests_without_times_get_random_ones() -> None:
    made = workload([(0, 10, 1, 0)] * 300).at_rate(4, seed=0)
    assert made.rate == pytest.approx(4, rel=0.2)
    assert made.requests[0].at == 0


def test_it_is_written_as_a_trace_that_is_read_again(tmp_path: Path) -> None:
    made = traces.made("conversations", 200, seed=1)
    file = trace(tmp_path, *made.lines())
    again = traces.from_file(file)
    assert [(one.tokens, one.output, one.pieces) for one in again.requests] == [
        (one.tokens, one.output, one.pieces) for one in made.requests
    ]
