"""`pd-launch compare` and `size` as a user gives them; what cannot be measured is refused before anything starts."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.launched import at_once

SLO = ("--slo", "ttft=2s,tpot=50ms")
MADE = ("--workload", "input=300,output=20,rate=2")
MODEL = ("--engine", "sim", "--model", "tiny")
CONSTANTS: dict[str, Any] = {
    "constants": {"prefill": [0.02, 1e-4, 0], "decode": [0.01, 5e-4, 0], "hand_off": [0.01, 0], "kv_tokens": 400_000}
}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--arms", "1P1D,2", *SLO), "what is to be sent?"),
        (("--arms", "1P1D,2", *SLO, *MADE, "--trace", "x"), "what is to be sent?"),
        (("--arms", "1P1D,3", *SLO, *MADE), "different numbers of nodes"),
        (("--arms", "1P1D,2", "--slo", "ttft=2", *MADE), "has no number with a unit"),
        (("--arms", "1P1D,2", *SLO, *MADE, "--requests", "50"), "50 requests are too few"),
        (("--arms", "1P1D,2", *SLO, *MADE, "--max-model-len", "200"), "request 1 has 300 + 20 tokens"),
        (("--arms", "1P1D,2", *SLO, *MADE, "--resume", "/nowhere"), "/nowhere holds no comparison"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(given: tuple[str, ...], says: str) -> None:
    result = at_once("compare", *MODEL, *given)
    assert says in result.stderr
    assert result.returncode == 2


def test_the_umask_stays_as_it_was() -> None:
    before = os.umask(0o027)
    try:
        at_once("compare", *MODEL, "--arms", "1P1D,2", *SLO, *MADE, "--resume", "/nowhere")
    finally:
        assert os.umask(before) == 0o027


def test_a_chart_that_could_not_be_drawn_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.cli.comparing.find_spec", lambda _: None)
    result = at_once("compare", *MODEL, "--arms", "1P1D,2", *SLO, *MADE, "--chart", "x.png")
    assert "--chart needs matplotlib" in result.stderr


def test_requests_without_times_need_a_rate(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    row = json.dumps({"timestamp": 0, "input_length": 10, "output_length": 2})
    file.write_text(f"{row}\n" * 300)
    result = at_once("compare", *MODEL, "--arms", "1P1D,2", *SLO, "--trace", str(file))
    assert "have no times, and goodput of a closed loop means nothing" in result.stderr


def test_a_broken_line_of_a_trace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 10, "output_length": 2}\n{"timestamp": 0}\n')
    result = at_once("compare", *MODEL, "--arms", "1P1D,2", *SLO, "--trace", str(file))
    assert f"{file}:2: input_length: Field required" in result.stderr
    assert result.returncode == 2


def test_a_cluster_that_is_not_here_is_sized_by_its_constants(tmp_path: Path) -> None:
    file = tmp_path / "constants.json"
    file.write_text(json.dumps(CONSTANTS))
    given = (*MODEL, "--constants", str(file), "--nodes", "3", *SLO, "--workload", "input=6000,output=20,rate=2")
    told = at_once("size", *given, "--requests", "300")
    assert told.returncode == 0, told.stderr
    assert "Take 2P1D: " in told.stdout
    assert "Nothing was measured here" in told.stdout
    found = json.loads(at_once("size", *given, "--requests", "300", "--json").stdout)
    assert found["arms"][0]["arm"] == "2P1D"
    assert len(found["arms"]) == 3


def test_constants_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "constants.json"
    file.write_text("{}")
    result = at_once("size", *MODEL, "--constants", str(file), "--nodes", "3", *SLO, *MADE)
    assert f"{file}: constants: Field required" in result.stderr
    assert result.returncode == 2
