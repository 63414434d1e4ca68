"""Log lines of requests."""

import logging

import pytest

from proxy.exchange.record import Record
from proxy.serving.logs import Refusals


def refused(status: int, at: float) -> Record:
    return Record("r", "/v1/completions", status=status, started=at, ended=at)


def test_of_a_flood_of_refusals_one_a_second_is_logged_and_the_next_line_counts_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pd_proxy.requests")
    refusals = Refusals()
    for tenth in range(25):
        refusals.log(refused(401, 100 + tenth / 10))
    assert len(caplog.messages) == 3
    assert ["not_logged=9" in line for line in caplog.messages] == [False, True, True]


def test_one_status_does_not_silence_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pd_proxy.requests")
    refusals = Refusals()
    for status in (401, 429, 401, 429):
        refusals.log(refused(status, 100))
    assert [line.split("status=")[1][:3] for line in caplog.messages] == ["401", "429"]
    refusals.log(refused(429, 200))
    assert "not_logged=1" in caplog.messages[-1]
    refusals.log(refused(429, 300))
    assert "not_logged" not in caplog.messages[-1]
