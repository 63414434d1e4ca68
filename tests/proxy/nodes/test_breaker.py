"""What failures do to a node."""

import time

import pytest

from proxy.nodes.breaker import Breaker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_it_opens_after_some_failures_in_a_row_and_not_before(clock: list[float]) -> None:
    breaker = Breaker()
    breaker.record_failure()
    breaker.record_failure()
    breaker.record_success()
    breaker.record_failure()
    breaker.record_failure()
    assert breaker.admits(clock[0])
    breaker.record_failure()
    assert breaker.is_open
    assert not breaker.admits(clock[0])


def test_after_its_rest_one_request_tries_and_decides(clock: list[float]) -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.record_failure()
    clock[0] += 2.1
    assert breaker.admits(clock[0])
    assert breaker.begin()
    assert not breaker.admits(clock[0])
    breaker.record_failure()
    breaker.end_trial()
    assert not breaker.admits(clock[0] + 3.9)
    assert breaker.admits(clock[0] + 4.1)
    assert breaker.begin()
    breaker.record_success()
    breaker.end_trial()
    assert breaker.admits(clock[0])
    assert not breaker.is_open


def test_half_open_only_one_request_tries_whatever_else_ends_meanwhile(clock: list[float]) -> None:
    """A hundred old streams that end tell nothing of the one that tries."""
    breaker = Breaker()
    assert not breaker.begin()
    for _ in range(3):
        breaker.record_failure()
    clock[0] += 2.1
    assert breaker.begin()
    assert not breaker.begin()
    assert not breaker.admits(clock[0])
    breaker.end_trial()  # it ended without telling anything (its client left)
    assert breaker.admits(clock[0])


def test_no_rest_is_longer_than_half_a_minute(clock: list[float]) -> None:
    breaker = Breaker()
    for _ in range(50):
        breaker.record_failure()
    assert breaker.admits(clock[0] + 30.1)
    breaker.record_success()
    breaker.rest(86_400)
    assert breaker.admits(clock[0] + 30.1)
