"""How soon a node is through with its prefills."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.backlog import Backlog


def test_it_takes_as_long_as_its_tokens_take() -> None:
    backlog = Backlog()
    backlog.begin(300, now=10)
    backlog.begin(200, now=10)
    assert backlog.seconds(rate=100, now=10) == 5


def test_what_the_first_has_had_is_behind_it() -> None:
    backlog = Backlog()
    backlog.begin(300, now=10)
    backlog.begin(200, now=11)
    assert backlog.seconds(rate=100, now=12) == 3
    assert backlog.seconds(rate=100, now=60) == 2, "one that takes longer than it should is through any moment"


def test_the_next_begins_when_the_first_has_ended() -> None:
    backlog = Backlog()
    first = backlog.begin(300, now=10)
    backlog.begin(200, now=10)
    backlog.end(first, now=20, tokens=300)
    assert backlog.seconds(rate=100, now=21) == 1


def test_a_rate_is_that_of_the_time_in_which_it_was_busy() -> None:
    backlog = Backlog()
    first, second = backlog.begin(300, now=10), backlog.begin(300, now=10)
    backlog.end(first, now=11, tokens=300)
    backlog.end(second, now=12, tokens=300)
    backlog.end(backlog.begin(300, now=100), now=101, tokens=300)
    assert backlog.rate == pytest.approx(300)


def test_prompts_that_end_in_one_step_do_not_make_it_seem_quick() -> None:
    """As of an engine that computes several in one step."""
    backlog = Backlog()
    for step in range(20):
        together = [backlog.begin(100, now=step) for _ in range(5)]
        for number in together:
            backlog.end(number, now=step + 1, tokens=100)
    assert backlog.rate == pytest.approx(500, rel=0.15)


def test_neither_a_failure_nor_a_prompt_that_was_cached_measures_anything() -> None:
    backlog = Backlog()
    backlog.end(backlog.begin(300, now=0), now=1)
    backlog.end(backlog.begin(300, now=2), now=3, tokens=5)
    assert backlog.rate is None


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 10), st.booleans()), max_size=40))
def test_whatever_ends_first_it_is_never_negative_and_empty_in_the_end(played: list[tuple[float, float, bool]]) -> None:
    backlog, open_numbers, now = Backlog(), list[int](), 0.0
    for tokens, later, oldest in played:
        now += later
        open_numbers.append(backlog.begin(tokens, now))
        assert backlog.seconds(1000, now) >= -1e-6
        if later > 5:
            backlog.end(open_numbers.pop(0 if oldest else -1), now, tokens)
    for number in open_numbers:
        backlog.end(number, now)
    assert backlog.seconds(1000, now) == 0
