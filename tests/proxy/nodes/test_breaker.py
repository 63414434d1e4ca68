"""What failures do to a node, and to the number of retries."""

import time

import pytest

from proxy.errors import NodeAnsweredError
from proxy.exchange.retry import RetryBudget
from proxy.nodes.breaker import Breaker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_it_opens_after_some_failures_in_a_row_and_not_before(clock: list[float]) -> None:
    breaker = Breaker()
    breaker.failed()
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    breaker.failed()
    assert breaker.admits(clock[0])
    breaker.failed()
    assert breaker.is_open
    assert not breaker.admits(clock[0])


def test_after_its_rest_one_request_tries_and_decides(clock: list[float]) -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed()
    clock[0] += 2.1
    assert breaker.admits(clock[0])
    breaker.taken()
    assert not breaker.admits(clock[0])
    breaker.failed()
    assert not breaker.admits(clock[0] + 3.9)
    assert breaker.admits(clock[0] + 4.1)
    breaker.taken()
    breaker.succeeded()
    assert breaker.admits(clock[0])
    assert not breaker.is_open


def test_a_try_that_tells_nothing_leaves_the_next_one_free(clock: list[float]) -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed()
    clock[0] += 2.1
    breaker.taken()
    breaker.untold()
    assert breaker.admits(clock[0])


def test_no_rest_is_longer_than_half_a_minute(clock: list[float]) -> None:
    breaker = Breaker()
    for _ in range(50):
        breaker.failed()
    assert breaker.admits(clock[0] + 30.1)
    breaker.succeeded()
    breaker.rest(86_400)
    assert breaker.admits(clock[0] + 30.1)


@pytest.mark.usefixtures("clock")
def test_retries_are_a_share_of_traffic_and_a_few_are_free() -> None:
    budget = RetryBudget(share=0.2, a_second=0, most=3)
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]
    for _ in range(5):
        budget.deposit()
    assert [budget.withdraw() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("given", "seconds"), [(b"7", 7), (b" 7 ", 7), (b"soon", None), (b"", None), (b"Thu, 01 Jan 1970 00:00:00 GMT", 0)]
)
def test_retry_after_may_be_a_number_or_a_date(given: bytes, seconds: float | None) -> None:
    assert NodeAnsweredError("n", 503, [(b"retry-after", given)], b"").retry_after_s == seconds
