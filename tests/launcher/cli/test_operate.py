"""A run that goes on by itself: `up -d`, status, logs, scale, restart, stop, clean, with simulated engines."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from launcher.inspect.runs import RunFolder
from tests.launched import PD_LAUNCH, Page, at_once, own_ports, run_to_end
from tests.processes import PATIENCE_S, ROOT, http, wait_until

SIM = ("--engine", "sim", "--model", "tiny")


@dataclass
class Run:
    """A detached run and the folder its commands are given."""

    folder: Path
    url: str

    def do(self, *command: str, code: int = 0) -> str:
        result = run_to_end([*command, "--run-dir", str(self.folder)])
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(at_once("status", "--json", "--run-dir", str(self.folder)).stdout)
        return status

    def child(self, name: str) -> dict[str, Any]:
        return next(child for child in self.status()["children"] if child["name"] == name)

    def names(self) -> list[str]:
        return sorted(child["name"] for child in self.status()["children"])

    def ask(self) -> httpx.Response:
        return http.post(f"{self.url}/v1/completions", json={"prompt": "hello", "max_tokens": 4})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    ports = own_ports(3)
    folder = tmp_path / "state" / "pd-launch" / "runs" / "this"
    result = run_to_end(["up", "-d", *SIM, "--run-dir", str(folder), *ports])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "KV moved" in result.stdout
    try:
        yield Run(folder, f"http://127.0.0.1:{ports[-1]}")
    finally:
        run_to_end(["stop", "--run-dir", str(folder)])
        run_to_end(["clean", "--yes"])


def test_it_outlives_its_terminal_and_is_found_shown_and_stopped(run: Run) -> None:
    assert run.ask().is_success
    status = run.status()
    assert (status["phase"], status["health"]) == ("ready", "ok")
    assert status["proven"]
    assert [child["state"] for child in status["children"]] == ["ready"] * 3
    shown = run_to_end(["status"]).stdout  # the only one that is alive: found without being named
    assert "prefill-0" in shown
    assert str(run.url) in shown
    logs = run_to_end(["logs", "proxy", "decode-0"]).stdout
    assert "proxy    | " in logs
    assert "decode-0 on http" in run_to_end(["logs", "launcher", "--grep", "decode-0"]).stdout
    assert "this" in at_once("ls").stdout
    assert "node decode-0 is usable" in logs
    assert at_once("doctor").stdout.startswith("Nothing known to be wrong")
    children = [psutil.Process(child["pid"]) for child in status["children"]]
    assert "Stopped." in run.do("stop")
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert at_once("stop").stdout == "Nothing is running.\n"
    assert at_once("status").returncode == 1
    assert run.status()["phase"] == "stopped"


def test_one_request_is_explained_by_its_id(run: Run) -> None:
    body = {"prompt": "hello", "max_tokens": 4}
    assert http.post(f"{run.url}/v1/completions", json=body, headers={"x-request-id": "explain-me"}).is_success
    wait_until(lambda: "decode-0" in run_to_end(["trace", "explain-me"]).stdout, "the proxy to have written it down")
    told = run.do("trace", "explain-me")
    assert "200; disaggregated" in told
    assert [line.split()[2] for line in told.splitlines() if " ms  " in line] == [
        "queue", "read", "prefill", "hand-off", "decode",
    ]  # fmt: skip
    assert json.loads(run.do("trace", "explain-me", "--json"))["requests"][0]["status"] == 200
    assert "no request 'unheard-of'" in run.do("trace", "unheard-of", code=1)
    run.do("stop")
    assert "the run is over" in run.do("trace", "unheard-of", code=1)


def test_what_is_drained_on_the_page_stays_so_and_a_death_is_explained_there(run: Run) -> None:
    page = Page(run.folder)
    assert "Prefill" in http.get(page.url).text
    assert http.get(f"{page.url}/state").status_code == 401, "it is not every user's of this machine"
    run.do("scale", "--decode", "2")
    assert page.ask("POST", "/nodes/decode-1/drain").is_success
    os.kill(run.child("decode-0")["pid"], signal.SIGKILL)
    wait_until(lambda: "SIGKILL" in page.node("decode-0")["finding"], "the death to be told of")
    wait_until(lambda: page.node("decode-0")["usable"], "its next life", 120)
    assert page.node("decode-1")["state"] == "draining"
    assert page.ask("POST", "/nodes/decode-1/undrain").is_success
    run.do("restart", "prefill-0")
    wait_until(lambda: page.node("decode-1")["usable"], "the end of the drain")
    assert "decode-0" in run.do("logs", "launcher")
    assert page.ask("GET", "/nodes/decode-0/log").text


def test_nodes_come_and_go_while_it_serves(run: Run) -> None:
    assert "decode-1 is ready." in run.do("scale", "--decode", "2")
    assert run.names() == ["decode-0", "decode-1", "prefill-0", "proxy"]
    wait_until(lambda: len(http.get(f"{run.url}/health").json()["nodes"]) == 3, "the proxy to be told")
    assert run.ask().is_success
    assert "nothing to do" in run.do("scale", "--decode", "2")
    assert "decode-1 was removed." in run.do("scale", "--decode", "1")
    assert run.names() == ["decode-0", "prefill-0", "proxy"]
    assert run.ask().headers["x-pd-path"] == "disaggregated"
    assert "at least one decode" in run.do("scale", "--prefill", "2", "--decode", "0", code=2)
    assert "prefill-1" not in run.names()
    assert "no free port is left" in run.do("scale", "--decode", "9", code=3)
    assert run.names() == ["decode-0", "prefill-0", "proxy"], "all of it or nothing"
    run.do("scale", "--decode", "2")
    lock = json.loads((run.folder / "lock.json").read_text())
    assert (lock["config"]["decode"], len(lock["seats"])) == (2, 3), "the run as it is now can be repeated"
    assert "decode-1 was removed." in run.do("scale", "--decode", "1")  # at once: the proxy hardly knows it yet
    assert run.status()["health"] == "ok"


def test_a_node_and_the_proxy_are_started_again_when_asked(run: Run) -> None:
    for name in ("prefill-0", "decode-0", "proxy"):
        before = run.child(name)["pid"]
        assert f"{name} is ready again." in run.do("restart", name)
        assert run.child(name)["pid"] != before
        wait_until(lambda: run.ask().headers.get("x-pd-path") == "disaggregated", "hand-offs to go on")
    assert "no node 'decode-7'" in run.do("restart", "decode-7", code=2)
    assert run.status()["phase"] == "ready"


def test_a_run_elsewhere_is_found_without_being_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.log").write_text("not of this run")
    (elsewhere / "config.yaml").write_text("mine: too")
    result = run_to_end(["up", "-d", *SIM, "--run-dir", str(elsewhere), *own_ports(2), "--env", "MY_TOKEN=canary-4711"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "prefill-0" in run_to_end(["status"]).stdout
    assert run_to_end(["stop"]).stdout.endswith("Stopped.\n")
    assert run_to_end(["stop", "--run-dir", str(elsewhere)]).stdout == "Nothing is running.\n"
    assert (elsewhere / "mine.log").read_text() == "not of this run"
    assert (elsewhere / "config.yaml").read_text() == "mine: too"
    told = [path for path in elsewhere.iterdir() if path.is_file() and "canary-4711" in path.read_text()]
    assert told == []
    readable = [path.name for path in elsewhere.iterdir() if path.stat().st_mode & 0o077]
    assert set(readable) == {"mine.log", "config.yaml"}


def test_a_second_run_in_the_same_folder_is_refused(run: Run) -> None:
    for detach in ([], ["-d"]):
        result = run_to_end(["up", *detach, *SIM, "--run-dir", str(run.folder), *own_ports(2)])
        assert result.returncode == 2
        assert "another run uses" in result.stderr
    assert run.ask().is_success


def test_what_a_killed_launcher_leaves_is_pointed_out_and_cleaned_up_by_ownership(run: Run) -> None:
    status = run.status()
    children = [psutil.Process(child["pid"]) for child in status["children"]]
    for child in children:
        child.suspend()  # so that none of them hears that its launcher has gone
    os.kill(status["launcher"], signal.SIGKILL)
    wait_until(lambda: run.status()["phase"] == "killed", "the launcher to be gone")
    assert {child["state"] for child in run.status()["children"]} == {"left behind"}
    assert at_once("stop").stdout.startswith("No launcher is running, but 3 processes of one that was killed are")
    listed = at_once("clean").stdout
    assert all(f"pid {child.pid}" in listed for child in children)
    assert "pd-launch clean --yes" in listed
    assert all(child.is_running() for child in children)
    refused = run_to_end(["up", *SIM, "--http-ports", "8100-8100"])
    assert "An earlier run left 3 processes" in refused.stderr
    assert "removed" in at_once("clean", "--yes").stdout
    gone = psutil.wait_procs(children, timeout=30)[1]
    assert [child for child in gone if child.status() != psutil.STATUS_ZOMBIE] == []
    assert at_once("clean").stdout == "Nothing is left behind.\n"


def test_what_is_asked_of_a_run_that_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for command in (["status"], ["logs"], ["doctor"], ["restart", "x"], ["scale", "--decode", "2"]):
        result = at_once(*command)
        assert result.returncode == 2
        assert "no run is" in result.stderr
    assert "how many?" in at_once("scale").stderr
    assert "no such file or folder" in at_once("doctor", "/no/such").stderr
    assert at_once("ls").stdout == "No runs are known here.\n"
    assert at_once("stop", "--all").stdout == "Nothing is running.\n"


def test_a_detached_start_that_is_asked_to_end_ends_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [*PD_LAUNCH, "up", "-d", *SIM, *own_ports(2), "--run-dir", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as starting:
        wait_until((folder / "state.json").exists, "the launcher to begin")
        starting.terminate()
        starting.communicate(timeout=PATIENCE_S)
    assert starting.returncode == 130
    state = json.loads((folder / "state.json").read_text())
    assert state["phase"] == "stopped"
    assert not RunFolder(folder).is_alive


def test_a_flag_goes_before_a_variable_in_the_background_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_LAUNCH_SERVED_MODEL_NAME", "of-the-variable")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "run"
    flags = ["--served-model-name", "of-the-flag", "--run-dir", str(folder)]
    result = run_to_end(["up", "-d", *SIM, *own_ports(2), *flags])
    try:
        assert result.returncode == 0, result.stdout + result.stderr
        assert json.loads((folder / "state.json").read_text())["model"] == "of-the-flag"
    finally:
        run_to_end(["stop", "--run-dir", str(folder)])


def test_a_detached_start_that_fails_gives_its_exit_code_and_its_reason(tmp_path: Path) -> None:
    flags = ["--prefill-args=--max-model-len", "--prefill-args=many", "--run-dir", str(tmp_path / "run")]
    result = run_to_end(["up", "-d", *SIM, *own_ports(2), *flags])
    assert result.returncode == 6
    assert "prefill-0 ended: exit code 2" in result.stdout
    assert "[bad-argument]" in result.stdout
