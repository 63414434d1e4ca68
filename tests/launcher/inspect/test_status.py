"""How a run is, seen from outside: alive or not, here or elsewhere."""

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cli import show
from launcher.errors import ConfigError
from launcher.inspect import runs, status
from launcher.inspect.runs import ChildState, Death, RunFolder, RunState, phase_of, this_machine
from launcher.inspect.status import ChildStatus, Pair, Status


def written(folder: Path, **changes: Any) -> RunFolder:
    """A run as its launcher wrote it down."""
    child = ChildState(
        name="decode-0", role="decode", state="ready", pid=None, since=0, restarts=0, url=None, ports=(),
        log=folder / "decode-0.log",
    )  # fmt: skip
    usual: dict[str, Any] = {
        "id": "x", "machine": this_machine(), "host": "gpu01", "launcher": 1, "phase": "ready", "engine": "vllm",
        "connector": "MooncakeConnector", "model": "m", "proxy_url": "http://127.0.0.1:1", "temporary": folder,
        "control": folder / "c", "began": 0, "written": 0, "stops_within_s": 1, "children": (child,),
    }  # fmt: skip
    run = RunFolder(folder)
    run.write(RunState(**(usual | changes)))
    return run


def of(run: RunFolder) -> Status:
    return asyncio.run(status.of(run))


def test_a_run_whose_launcher_was_killed_is_not_said_to_be_ready(tmp_path: Path) -> None:
    found = of(written(tmp_path))
    assert (found.phase, found.health, found.children[0].state) == ("killed", "down", "ended")


def test_of_a_run_on_another_machine_only_that_one_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder may be shared by many."""
    run = written(tmp_path, machine="another boot/1")
    assert of(run).phase == "elsewhere"
    with pytest.raises(ConfigError, match=r"is on another machine or in another container \(gpu01\)"):
        runs.choose(tmp_path, alive=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    written_there = tmp_path / "pd-launch" / "runs" / "one"
    written_there.mkdir(parents=True)
    written(written_there, machine="another boot/1")
    with pytest.raises(ConfigError, match="no run is known"):
        runs.choose(None)


def test_a_run_that_was_stopped_is_stopped_wherever_it_was(tmp_path: Path) -> None:
    run = written(tmp_path, phase="stopped", machine="another boot/1")
    state = run.read()
    assert state is not None
    assert phase_of(run, state) == "stopped"


def test_a_folder_without_a_run_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is known"):
        of(RunFolder(tmp_path))


def child(name: str, **changes: Any) -> ChildStatus:
    usual: dict[str, Any] = {
        "name": name, "role": "decode", "state": "ready", "pid": 4711, "age_s": 93_784, "restarts": 0,
        "url": "http://192.168.100.100:8101", "ports": ("api 8101",), "log": "/l", "usable": True, "in_flight": 3,
        "kv": "unproven", "running": 120, "waiting": 12, "kv_usage": 0.994, "held": 17, "tokens_a_second": 12_345.6,
    }  # fmt: skip
    return ChildStatus(**(usual | changes))


WRONG = "cannot be reached for /health: the connection was refused, and has been since 18:04:33; its log tells why"


def shown(*children: ChildStatus, verbose: bool = False, **changes: Any) -> list[str]:
    usual: dict[str, Any] = {
        "run_dir": "/state/runs/20261126-174410-4740", "phase": "ready", "health": "degraded", "host": "gpu01",
        "proxy_url": "http://127.0.0.1:8000", "page": "http://127.0.0.1:8010/#key=k",
        "model": "m", "engine": "vllm", "connector": "MooncakeConnector",
        "proven": None, "launcher": 1, "age_s": 61, "children": children,
    }  # fmt: skip
    output = io.StringIO()
    show.status(Console(file=output, width=80), Status(**(usual | changes)), verbose=verbose)
    return output.getvalue().splitlines()


def test_a_status_fits_80_columns_and_problems_are_lines_of_their_own() -> None:
    lines = shown(child("decode-10"), child("decode-11", state="restarting", problem=WRONG, restarts=2))
    table = [line for line in lines if "  " in line and not line.startswith("degraded")]
    assert all(len(line) <= 80 for line in table), lines
    assert "decode-10  ready       1d2h  120+12    99.4%   17    12346     unproven" in lines
    assert f"decode-11: {WRONG}" in lines, "whole, however narrow the screen is"
    assert "decode-11: started again 2 times" in lines


def test_what_is_known_besides_is_told_if_asked() -> None:
    deaths = (Death(at=0, how="killed by SIGKILL"),)
    lines = "\n".join(shown(child("decode-0", deaths=deaths, restarts=1), verbose=True))
    assert "decode-0: pid 4711  http://192.168.100.100:8101  api 8101  log /l" in lines
    assert "killed by SIGKILL" in lines


def test_a_node_that_does_not_answer_shows_what_the_proxy_has_there() -> None:
    silent = child("decode-0", running=None, waiting=None, kv_usage=None)
    assert any("(3)" in line for line in shown(silent))


def test_the_figures_are_those_of_the_page() -> None:
    proxy = {
        "in_flight": 12, "queued": 3, "requests_a_second": 4.25, "failed": 1, "ttft_p50_s": 0.25, "ttft_p99_s": None,
    }  # fmt: skip
    pair = Pair(prefill="prefill-0", decode="decode-0", a_second=2.5)
    lines = shown(child("decode-0", error="503: full"), proxy=proxy, pairs=(pair,))
    assert "12 in flight, 3 queued; last minute: 4.25 requests/s, 1 failed, TTFT 250 ms p50" in lines
    assert "page http://127.0.0.1:8010/#key=k" in lines
    assert "decode-0: last error: 503: full" in lines
    assert "prefill-0 → decode-0: 2.5 hand-offs/s" in lines


def test_of_a_run_elsewhere_it_is_said_where() -> None:
    assert "elsewhere on gpu01, where it can be asked for" in shown(phase="elsewhere")[0]
