"""Whether a decode node alone would be faster."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.split import MOST_TOKENS, Line, Outlook, Split


def learned(*, prefill: float = 0.001, hand_off: float = 0.1, alone: float | None = None) -> Split:
    """Prefill: 20 ms and so much a token; hand-off: so long; alone: so much a token."""
    split = Split(is_wanted=True)
    for tokens in (10, 50, 100, 400, 1000, 1500, 2000, 3000):
        split.prefill.add(tokens, 0.02 + prefill * tokens)
        split.hand_off.add(tokens, hand_off)
        if alone is not None:
            split.alone.add(tokens, alone * tokens)
    return split


def outlook(tokens: float, *, backlog_s: float = 0, streams: int = 0, cached_at_decode: float = 0) -> Outlook:
    return Outlook(tokens, tokens, backlog_s, tokens - cached_at_decode, streams)


def test_a_line_goes_through_what_was_measured() -> None:
    line = Line()
    for tokens in (1, 10, 100):
        line.add(tokens, 0.5 + 0.01 * tokens)
    assert line.at(0) == pytest.approx(0.5)
    assert line.at(1000) == pytest.approx(10.5)


def test_a_line_follows_what_changes() -> None:
    line = Line()
    for _ in range(300):
        line.add(100, 1.0)
    for _ in range(300):
        line.add(100, 3.0)
    assert line.at(100) == pytest.approx(3.0, rel=0.01)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1000)), min_size=1, max_size=50), st.integers(0, 10**6))
def test_a_line_never_falls_and_is_never_below_zero(measured: list[tuple[int, float]], tokens: int) -> None:
    line = Line()
    for count, seconds in measured:
        line.add(count, seconds)
    assert 0 <= line.at(tokens) <= line.at(tokens + 1000)


def test_a_short_prompt_goes_alone_where_the_hand_off_costs_more_than_its_work() -> None:
    split = learned(prefill=0.001, hand_off=0.1, alone=0.002)
    assert split.is_faster_alone(outlook(50))
    assert not split.is_faster_alone(outlook(200))
    assert split.crossover_tokens == pytest.approx(80, abs=2), "0.8 * (0.12 + 0.001 n) = 0.002 n"


def test_not_beside_streams_that_it_would_hold_up() -> None:
    assert learned().is_faster_alone(outlook(50))
    assert not learned().is_faster_alone(outlook(50, streams=10))


def test_a_queue_at_the_prefill_node_makes_alone_worth_more() -> None:
    assert not learned(hand_off=0.0, alone=0.002).is_faster_alone(outlook(500))
    assert learned(hand_off=0.0, alone=0.002).is_faster_alone(outlook(500, backlog_s=5))


def test_what_the_decode_node_has_cached_counts() -> None:
    assert not learned(alone=0.002).is_faster_alone(outlook(2000))
    assert learned(alone=0.002).is_faster_alone(outlook(2000, cached_at_decode=1990))


def test_nothing_is_decided_before_enough_was_measured() -> None:
    split = Split(is_wanted=True)
    for _ in range(7):
        split.prefill.add(1000, 9.0)
        split.hand_off.add(1000, 9.0)
    assert (split.is_faster_alone(outlook(1)), split.crossover_tokens) == (False, None)
    split.prefill.add(1000, 9.0)
    split.hand_off.add(1000, 9.0)
    assert split.crossover_tokens is not None


def test_nothing_is_decided_unless_it_is_wanted() -> None:
    split = learned()
    split.is_wanted = False
    assert not split.is_faster_alone(outlook(1))
    assert split.crossover_tokens is None


def test_never_more_than_a_step_of_work_however_long_the_queue() -> None:
    split = learned(prefill=0.0001, alone=0.0001)
    assert split.is_faster_alone(outlook(MOST_TOKENS, backlog_s=1000))
    assert not split.is_faster_alone(outlook(MOST_TOKENS + 1, backlog_s=1000))
    assert (split.crossover_tokens or 0) <= MOST_TOKENS


def test_prompts_at_the_border_do_not_go_this_way_and_that() -> None:
    """Their lengths and the measurements waver by a tenth."""
    chance, split = random.Random(1), learned(alone=0.002)
    ways = [split.is_faster_alone(outlook(80 * chance.uniform(0.9, 1.1))) for _ in range(200)]
    turns = sum(one is not other for one, other in zip(ways[1:], ways, strict=False))
    assert turns <= 2


def test_a_decode_node_that_turns_out_slow_is_left_alone() -> None:
    split = learned()
    assert split.is_faster_alone(outlook(60))
    for _ in range(5):
        split.alone.add(60, 2.0)
    assert not split.is_faster_alone(outlook(60))
