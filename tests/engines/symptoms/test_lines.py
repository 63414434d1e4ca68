"""One line of a log, whoever collected it."""

import calendar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.symptoms.lines import Clock, read, zone_of

NOW = float(calendar.timegm((2026, 12, 1, 12, 0, 0)))


@pytest.mark.parametrize(
    ("line", "source", "process", "level", "bare"),
    [
        ("(APIServer pid=7) OSError: x", "", "APIServer", "", "OSError: x"),
        ("(EngineCore_DP0 pid=7) ERROR 11-22 05:02:01 [core.py:77] x", "", "EngineCore_DP0", "ERROR", "x"),
        ("ERROR:    [Errno 98] x", "", "", "ERROR", "[Errno 98] x"),
        ("E1130 22:13:07.333177   721 rdma_endpoint.cpp:425] x", "", "", "ERROR", "x"),
        ("F20261130 22:13:07.333177   721 a.cpp:425] x", "", "", "FATAL", "x"),
        ("prefill-1  | OSError: x", "prefill-1", "", "", "OSError: x"),
        ("prefill-1  | 2026-11-30T22:13:07.333177123Z OSError: x", "prefill-1", "", "", "OSError: x"),
        ("[pod/decode-0/vllm] (Worker pid=3) x", "decode-0", "Worker", "", "x"),
        ("Aug 19 18:30:11 gpu1 vllm[8707]: OSError: x", "gpu1 vllm", "", "", "OSError: x"),
        ("3: (Worker pid=3) x", "task 3", "Worker", "", "x"),
        ("\x1b[36m(Worker pid=3)\x1b[0m x", "", "Worker", "", "x"),
        ("2026-11-23 03:01:02,500 WARNING pd_proxy.nodes: x", "", "", "WARNING", "x"),
        ("", "", "", "", ""),
    ],
)  # fmt: skip
def test_prefixes_are_read_through(line: str, source: str, process: str, level: str, bare: str) -> None:
    reading = read(line)
    assert (reading.source, reading.process, reading.level, reading.bare) == (source, process, level, bare)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("INFO 11-22 05:02:01 [core.py:77] x", (2026, 11, 22, 5, 2, 1.0)),
        ("(Worker pid=29326) ERROR 11-22 05:02:01 [multiproc_executor.py:1063] x", (2026, 11, 22, 5, 2, 1.0)),
        ("E1130 22:13:07.333177   721 rdma_endpoint.cpp:425] x", (2026, 11, 30, 22, 13, 7.333177)),
        ("I20251130 22:13:07.333177   721 rdma_endpoint.cpp:425] x", (2025, 11, 30, 22, 13, 7.333177)),
        ("2026-11-23 03:01:02,500 INFO pd_proxy: x", (2026, 11, 23, 3, 1, 2.5)),
        ("2026-11-30T22:13:07.5+01:00 x", (2026, 11, 30, 21, 13, 7.5)),
        ("Aug 19 18:30:11 gpu1 vllm[8707]: x", (2026, 8, 19, 18, 30, 11.0)),
        ("INFO 12-31 23:59:59 [core.py:77] x", (2025, 12, 31, 23, 59, 59.0)),
    ],
)
def test_times_are_read_in_every_writers_form_and_those_without_a_year_are_of_the_last_twelve_months(
    line: str, expected: tuple[int, int, int, int, int, float]
) -> None:
    *whole, seconds = expected
    when = Clock(NOW).when(read(line).stamps[0])
    assert when == pytest.approx(calendar.timegm((*whole, 0)) + seconds)


def test_a_line_with_two_times_tells_the_writers_zone() -> None:
    """Docker's stamp is in UTC, vLLM's of the host: so those of its log that docker did not see can be ordered, too."""
    stamps = read("2026-11-30T22:13:07.123456789Z (Worker pid=3) INFO 12-01 03:43:07 [core.py:77] x").stamps
    assert zone_of(stamps) == 5.5 * 3600
    assert zone_of(stamps[:1]) is None
    assert Clock(NOW, 5.5 * 3600).when(stamps[1]) == pytest.approx(Clock(NOW).when(stamps[0]), abs=1)


@given(st.text(max_size=120))
def test_anything_is_a_line(text: str) -> None:
    reading = read(text)
    assert reading.bare in text or "\x1b" in text
    for stamp in reading.stamps:
        Clock(NOW).when(stamp)
