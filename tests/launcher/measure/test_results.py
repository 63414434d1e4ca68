"""One round in figures, and all rounds in a verdict."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.measure import verdict
from launcher.measure.loadgen import Row
from launcher.measure.results import figures, is_good, percentile
from launcher.measure.slo import Slo

SLO = Slo(ttft=1.0, tpot=0.1)


def row(
    number: int = 0, due: float = 0.0, ttft: float = 0.5, tpot: float = 0.05, tokens: int = 11, **further: Any
) -> Row:
    first = due + ttft
    last = first + tpot * (tokens - 1)
    return Row(number, due, due, first, last, last, 100, tokens, "disaggregated", **further)


def rounds(good: int, bad: int, number: int = 3) -> list[list[Row]]:
    """So many requests in time, and so many too late, in ten seconds."""
    one = [row(n, due=n / 100) for n in range(good)] + [row(n, due=n / 100, ttft=2.0) for n in range(bad)]
    return [[*one, row(due=9.5, ttft=0.5, tpot=0, tokens=1)]] * number


def test_a_good_answer_keeps_every_limit() -> None:
    assert is_good(row(), SLO)
    assert not is_good(row(ttft=1.1), SLO)
    assert not is_good(row(tpot=0.11), SLO)
    assert not is_good(row(problem="500"), SLO)
    assert is_good(row(ttft=9), Slo(tpot=0.1))
    assert not is_good(row(), Slo(e2e=0.9))


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    assert is_good(row(tokens=1, tpot=5), SLO)
    assert figures([row(tokens=1)], SLO).tpot["p50"] == float("inf")


def test_a_request_that_was_sent_late_has_waited() -> None:
    late = row(ttft=1.5)
    late.sent = 1.2
    assert not is_good(late, SLO)


def test_a_round_in_figures() -> None:
    found = figures([row(due=0), row(due=1, ttft=2), row(due=2, problem="500: x")], SLO)
    assert (found.requests, found.errors, found.good) == (3, 1, 1)
    assert found.wall == pytest.approx(3.5)
    assert found.goodput == pytest.approx(1 / 3.5)
    assert found.ttft["p50"] == pytest.approx(1.25)
    assert found.output_tokens == 22


def test_a_round_in_which_nothing_came_is_a_round_too() -> None:
    found = figures([row(problem="refused")], SLO)
    assert (found.good, found.goodput, found.ttft["p99"]) == (0, 0, float("inf"))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_a_percentile_lies_between_the_least_and_the_largest(values: list[float], share: float) -> None:
    values.sort()
    assert values[0] <= percentile(values, share) <= values[-1]


def test_twice_the_goodput_is_a_difference() -> None:
    found = verdict.verdict({"a": rounds(100, 100), "b": rounds(200, 0)}, SLO)
    assert found is not None
    assert (found.best, found.other, found.is_difference) == ("b", "a", True)
    assert found.ratio.low > 1.5
    assert found.in_words(SLO, 20).startswith("b serves 1.99 times (")


def test_a_little_luck_is_none() -> None:
    found = verdict.verdict({"a": rounds(100, 100), "b": rounds(106, 94)}, SLO)
    assert found is not None
    assert not found.is_difference
    assert found.in_words(SLO, 20).startswith("No difference between b and a")


def test_rounds_that_contradict_each_other_are_no_difference() -> None:
    swinging = [*rounds(200, 0, 1), *rounds(60, 140, 1), *rounds(150, 50, 1)]
    found = verdict.verdict({"a": swinging, "b": rounds(110, 90)}, SLO)
    assert found is not None
    assert not found.is_difference


def test_where_only_one_answers_in_time_the_other_is_infinitely_worse() -> None:
    found = verdict.verdict({"a": rounds(200, 0), "b": [[row(ttft=3)] * 200] * 3}, SLO)
    assert found is not None
    assert (found.best, found.is_difference, found.ratio.median) == ("a", True, float("inf"))


def test_nobody_in_time_is_no_verdict() -> None:
    late = [[row(ttft=3)] * 200]
    assert verdict.verdict({"a": late, "b": late}, SLO) is None
    assert verdict.verdict({"a": rounds(10, 0)}, SLO) is None


def test_the_same_rounds_have_the_same_verdict() -> None:
    told = {"a": rounds(100, 100), "b": rounds(120, 80)}
    assert verdict.verdict(told, SLO) == verdict.verdict(told, SLO)


def test_the_map_says_who_wins_for_other_targets() -> None:
    early = [[row(n, due=n / 10, ttft=0.4, tpot=0.09) for n in range(200)]]
    smooth = [[row(n, due=n / 10, ttft=0.9, tpot=0.02) for n in range(200)]]
    found = verdict.slo_map({"early": early, "smooth": smooth}, SLO)
    winner = {(t, p): found.winners[i][j] for i, t in enumerate(found.ttft) for j, p in enumerate(found.tpot)}
    assert winner[0.25, 0.1] == ""
    assert winner[0.5, 0.1] == "early"
    assert winner[1.0, 0.025] == "smooth"
    assert winner[1.0, 0.1] == "="
