"""`pd-launch up`, `plan` and `setup` as a user runs them, with simulated engines."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.launched import PD_LAUNCH, at_once, own_ports, run_to_end, up
from tests.processes import PATIENCE_S, ROOT, free_port, free_range, http, metric, wait_until

SIM = ("--engine", "sim", "--model", "tiny")


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_it_brings_up_the_nodes_proves_that_kv_moves_and_answers(tmp_path: Path) -> None:
    no_canary = "--proxy-args=--canary-interval-s=0"  # its tokens are counted by the nodes, too
    with up(tmp_path, *SIM, "--prefill", "2", "--decode", "2", no_canary, nodes=4) as run:
        run.until("Ready:", PATIENCE_S)
        assert "KV moved" in run.output
        moved = sum(
            metric(url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
            for url in run.nodes("decode")
        )
        assert f"{moved:.0f} of {moved:.0f} prompt tokens" in run.output
        assert http.get(f"{run.url}/health").status_code == 200
        answer = http.post(f"{run.url}/v1/completions", json={"model": "tiny", "prompt": "hello"})
        assert answer.headers["x-pd-path"] == "disaggregated"
        assert sorted(path.name for path in run.run_dir.iterdir()) == [
            ".lock", "decode-0.log", "decode-1.log", "launcher.log", "lock.json", "prefill-0.log", "prefill-1.log",
            "proxy.log", "state.json", "topology.json",
        ]  # fmt: skip


def test_without_a_connector_ordinary_nodes_answer(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--connector", "none", "--decode", "2") as run:
        run.until("Ready:", PATIENCE_S)
        assert "KV moved" not in run.output
        assert http.get(f"{run.url}/health").json()["status"] == "ok"
        answer = http.post(f"{run.url}/v1/completions", json={"model": "tiny", "prompt": "hello"})
        assert answer.headers["x-pd-path"] == "aggregated; reason=no-prefill"
        assert "no KV connector" in at_once("status", "--run-dir", str(run.run_dir)).stdout
        assert {child["kv"] for child in run.status()["children"]} == {None}


def test_flags_and_keys_for_the_proxy_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_API_KEYS", "a-key,another")
    with up(tmp_path, *SIM, "--proxy-args=--min-prefill-tokens", "--proxy-args=40") as run:
        run.until("Ready:", PATIENCE_S)
        assert http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}).status_code == 401
        key = {"Authorization": "Bearer a-key"}
        answer = http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}, headers=key)
        assert answer.headers["x-pd-path"] == "aggregated; reason=short-prompt"


def test_clients_keys_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("anna sk-1\n")
    with up(tmp_path, *SIM, f"--proxy-args=--api-keys-file={tmp_path}/keys") as run:
        run.until("Ready:", PATIENCE_S)
        assert "Authorization: Bearer YOUR_KEY" in run.output
        assert http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}).status_code == 401
        key = {"Authorization": "Bearer sk-1"}
        assert http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}, headers=key).is_success


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_all_down_in_order_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    shared = set(os.listdir("/dev/shm"))  # noqa: PTH208
    with up(tmp_path, *SIM) as run:
        run.until("Ready:", PATIENCE_S)
        children = run.descendants()
        assert len(children) == 3
        assert run.end(number) == 0
        assert alive(children) == []
    assert "Stopping: proxy, decode nodes, prefill nodes" in run.output
    assert set(os.listdir("/dev/shm")) <= shared  # noqa: PTH208
    assert not run.temporary.exists()
    with pytest.raises(httpx.ConnectError):
        http.get(f"{run.url}/health")


def test_ctrl_c_while_it_starts_ends_it_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    with up(tmp_path, *SIM) as run:
        run.until("prefill-0", PATIENCE_S)
        children = run.descendants()
        assert run.end() == 130
        assert alive(children) == []
    assert "interrupted before everything was up" in run.output


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--stop-timeout-s", "600") as run:
        run.until("Ready:", PATIENCE_S)
        children = run.descendants()
        for child in children:
            child.suspend()  # none of them will hear a SIGTERM
        run.process.send_signal(signal.SIGINT)
        run.until("Stopping", PATIENCE_S)
        assert run.end() == 0
        assert alive(children) == []


def test_a_node_that_dies_at_start_ends_everything_with_its_last_words(tmp_path: Path) -> None:
    """The argument parser of the simulator, like vLLM's, refuses a bad number."""
    with up(tmp_path, *SIM, "--prefill-args=--max-model-len", "--prefill-args=many") as run:
        code = run.process.wait(PATIENCE_S)
    assert code == 6
    assert "prefill-0 ended: exit code 2" in run.output
    assert "argument --max-model-len: invalid int value: 'many'" in run.output
    assert str(run.run_dir / "prefill-0.log") in run.output
    assert "All stopped" in run.output


def test_a_node_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--ready-timeout-s", "0.05") as run:
        assert run.process.wait(PATIENCE_S) == 5
    assert "was not ready after 0.05 s" in run.output


def test_a_node_that_dies_is_started_again_and_used_in_its_new_life(tmp_path: Path) -> None:
    with up(tmp_path, *SIM) as run:
        run.until("Ready:", PATIENCE_S)
        for name in ("prefill-0", "decode-0"):
            run.child(name).kill()
            run.until(f"{name} ended: killed by SIGKILL", PATIENCE_S)
            run.until(f"{name} is ready again.", PATIENCE_S)
            wait_until(lambda: http.get(f"{run.url}/health").json()["status"] == "ok", "the proxy to use it")
            answer = http.post(f"{run.url}/v1/completions", json={"prompt": "hello"})
            assert answer.headers["x-pd-path"] == "disaggregated"


def may_write_files(processes: Iterable[psutil.Process], *, may: bool) -> None:
    """A disk that is full, for these processes and those they start from now on."""
    for one in processes:
        one.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY if may else 0, psutil.RLIM_INFINITY))


def test_a_run_outlives_a_full_disk_and_starts_a_dead_node_again_meanwhile(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--prefill", "2", "--drain-timeout-s", "2", nodes=3) as run:
        run.until("Ready:", PATIENCE_S)
        launcher = psutil.Process(run.process.pid)
        may_write_files((launcher, *run.descendants()), may=False)
        run.until(f"cannot write to {run.run_dir}: File too large", PATIENCE_S)
        run.child("decode-0").kill()
        run.until("decode-0 is ready again.", PATIENCE_S)
        run.until_well()
        answer = http.post(f"{run.url}/v1/completions", json={"prompt": "hello"})
        assert answer.headers["x-pd-path"] == "disaggregated"
        gone = run.nodes("prefill")[1]
        assert "was removed" in run_to_end(["scale", "--prefill", "1", "--run-dir", str(run.run_dir)]).stdout
        assert gone in run.nodes("prefill")  # nobody could write it down
        may_write_files((launcher, *run.descendants()), may=True)
        run.until("can be written to again", PATIENCE_S)
        assert gone not in run.nodes("prefill")
        assert run.output.count("cannot write to") == 1
        assert run.end() == 0


def test_an_answer_that_runs_when_the_run_is_stopped_is_finished(tmp_path: Path) -> None:
    """The proxy lets it: its own grace time counts, not the time that nodes have to stop."""
    with up(tmp_path, *SIM, "--stop-timeout-s", "0.5") as run:
        run.until("Ready:", PATIENCE_S)
        http.post(f"{run.nodes('decode')[0]}/sim", json={"itl_s": 0.3}).raise_for_status()
        body = {"prompt": "hello", "max_tokens": 10, "stream": True}
        with http.stream("POST", f"{run.url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            run.process.send_signal(signal.SIGINT)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert run.process.wait(60) == 0


def test_a_screen_that_knows_no_tick_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with up(tmp_path, *SIM) as run:
        run.until("Ready:", PATIENCE_S)
        assert "? decode-0" in run.output
        assert run.end() == 0


def test_the_proxy_is_started_again_too(tmp_path: Path) -> None:
    with up(tmp_path, *SIM) as run:
        run.until("Ready:", PATIENCE_S)
        run.child("proxy").kill()
        run.until("proxy is ready again.", PATIENCE_S)
        wait_until(lambda: http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}).is_success, "an answer")


def test_a_node_whose_port_is_taken_while_it_is_down_is_told_so_and_given_up(tmp_path: Path) -> None:
    """Its port is kept while it is down; whoever shares the address gets it all the same, as here."""
    exact = ("--decode", "2", "--http-ports", free_range(3))
    with up(tmp_path, *SIM, *exact, nodes=3) as run:
        run.until("Ready:", PATIENCE_S)
        host, port = run.nodes("decode")[1].removeprefix("http://").split(":")
        run.child("decode-1").kill()
        with wait_until(lambda: _listener((host, int(port))), "the port"):
            run.until("It could not be started 4 times.", 3 * PATIENCE_S)
            run.until("Going on without it.", PATIENCE_S)
        assert run.output.count("decode-1 ended: killed by SIGKILL") == 1, "it has ended once"
        assert f"could not be started: api port {port} on {host} is taken by pid {os.getpid()}" in run.output
        assert http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}).is_success


def test_nobody_who_lets_the_kernel_choose_gets_a_port_while_its_node_is_down(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--decode", "2", nodes=3) as run:
        run.until("Ready:", PATIENCE_S)
        host, port = run.nodes("decode")[1].removeprefix("http://").split(":")
        run.child("decode-1").kill()
        run.until("Starting decode-1 again", PATIENCE_S)
        with socket.socket() as stranger:
            wait_until(lambda: stranger.connect_ex((host, int(port))) != 0, "it to be down")
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((host, int(port)))
        run.until("decode-1 is ready again.", PATIENCE_S)
        assert run.nodes("decode")[1] == f"http://{host}:{port}"


def test_a_node_that_hangs_is_said_to_and_its_recovery_too(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--decode", "2", "--hung-after-s", "1", nodes=3) as run:
        run.until("Ready:", PATIENCE_S)
        node = run.child("decode-1")
        node.suspend()
        run.until("decode-1 is hung: it has answered nothing for", PATIENCE_S)
        assert "`pd-launch restart decode-1`" in run.output
        assert {child["name"]: child["state"] for child in run.status()["children"]}["decode-1"] == "hung"
        node.resume()
        run.until("decode-1 works again.", PATIENCE_S)
        assert run.output.count("decode-1 is hung") == 1


def test_a_node_that_hangs_is_started_again_if_asked_for(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--hung-after-s", "1", "--restart-hung", "--stop-timeout-s", "1") as run:
        run.until("Ready:", PATIENCE_S)
        run.child("decode-0").suspend()
        run.until("decode-0 is hung: it has answered nothing for", PATIENCE_S)
        run.until("decode-0 is ready again.", PATIENCE_S)
        run.until_well()
        assert http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}).is_success


def _listener(address: tuple[str, int]) -> socket.socket | None:
    try:
        return socket.create_server(address)
    except OSError:
        return None


def test_it_goes_on_without_a_node_that_has_a_twin_and_stops_without_the_last(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--no-restart", "--decode", "2", nodes=3) as run:
        run.until("Ready:", PATIENCE_S)
        nodes = {node.environ()["PD_LAUNCH_NODE"]: node for node in run.descendants()}
        nodes["decode-1"].kill()
        run.until("Going on without it", PATIENCE_S)
        assert "decode-1 ended: killed by SIGKILL" in run.output
        wait_until(lambda: "cannot be reached" in http.get(f"{run.url}/health").text, "the proxy to notice")
        assert http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}).is_success
        nodes["decode-0"].kill()
        assert run.process.wait(PATIENCE_S) == 1


def test_a_busy_port_is_named_with_its_holder_and_nothing_is_started(tmp_path: Path) -> None:
    first, last = free_range(2).split("-")
    with socket.create_server(("127.0.0.1", int(last))):
        flags = [*own_ports(2), "--http-ports", f"{first}-{last}"]
        result = run_to_end(["up", *SIM, "--run-dir", str(tmp_path / "run"), *flags])
    assert result.returncode == 3
    assert f"{last} is taken by pid {os.getpid()}" in result.stderr
    assert f"no free port is left in --http-ports {first}-{last}" in result.stderr
    assert "--http-ports" in result.stderr
    assert not list((tmp_path / "run").glob("*.log"))


def test_flags_that_the_proxy_does_not_take_are_refused_before_the_nodes_start(tmp_path: Path) -> None:
    result = run_to_end(["up", *SIM, *own_ports(2), "--run-dir", str(tmp_path / "run"), "--proxy-args=--fast"])
    assert result.returncode == 4
    assert "--proxy-args: " in result.stderr
    assert "--fast" in result.stderr
    assert not (tmp_path / "run").exists(), "nothing is left of a start that was refused"


def test_what_the_launcher_tells_is_in_its_log_with_times_and_programs_can_read_it(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--json") as run:
        wait_until(lambda: '"kind": "ready"' in run.output, "the event")
        assert run.end() == 0
    events = [json.loads(line) for line in run.lines]
    ready = next(event for event in events if event["kind"] == "ready")
    assert (ready["url"], ready["model"]) == (f"{run.url}/v1", "tiny")
    assert [event["text"] for event in events if event["kind"] == "done"][-1].startswith("proxy on")
    log = (run.run_dir / "launcher.log").read_text()
    assert re.search(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ✓ decode-0 on http", log)
    assert re.search(r"(?m)^\d{4}.*All stopped\.", log)


def test_the_nodes_logs_can_be_on_the_screen_too(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--logs") as run:
        run.until("Ready:", PATIENCE_S)
        run.until("node decode-0 is usable", PATIENCE_S)
        assert re.search(r"(?m)^proxy +\| .*node decode-0 is usable", run.output)


def test_nodes_can_be_kept_when_it_is_not_proven_that_kv_moves(tmp_path: Path) -> None:
    """They may have taken a quarter of an hour to load."""
    alone = ("--proxy-args=--min-prefill-tokens", "--proxy-args=1000000")
    with up(tmp_path, *SIM, *alone) as run:
        assert run.process.wait(PATIENCE_S) == 7
    with up(tmp_path / "kept", *SIM, *alone, "--keep") as run:
        run.until("Ready:", PATIENCE_S)
        assert "the proxy hands over no prompt, however long" in run.output
        assert "The nodes stay up, as --keep says." in run.output
        assert run.status()["proven"] is None
        assert run.end() == 0


def test_several_names_of_a_model_are_all_served(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--served-model-name", "one,two") as run:
        run.until("Ready:", PATIENCE_S)
        for name in ("one", "two"):
            body = {"model": name, "prompt": "hello"}
            answer = http.post(f"{run.url}/v1/completions", json=body)
            assert answer.headers["x-pd-path"] == "disaggregated"
        assert {card["id"] for card in http.get(f"{run.url}/v1/models").json()["data"]} == {"one", "two"}


def test_a_node_whose_port_is_stolen_between_check_and_bind_goes_on_with_the_next(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, nodes=4) as run:
        run.until("prefill-0 on http://127.0.0.1:", PATIENCE_S)
        port = int(run.output.split("prefill-0 on http://127.0.0.1:")[1].split()[0])
        with socket.create_server(("127.0.0.1", port)):  # it shares the address, and listens first
            run.until("Ready:", PATIENCE_S)
            assert f"port {port} was taken by pid {os.getpid()}" in run.output
            assert f"going on with http://127.0.0.1:{port + 2}" in run.output
            assert http.post(f"{run.url}/v1/completions", json={"prompt": "hello"}).is_success


def test_a_run_can_be_repeated_from_its_lock_file(tmp_path: Path) -> None:
    with up(tmp_path, *SIM) as run:
        run.until("Ready:", PATIENCE_S)
        first = json.loads((run.run_dir / "lock.json").read_text())
    again = tmp_path / "again"
    locked = ["--locked", str(run.run_dir / "lock.json"), "--run-dir", str(again)]
    result = at_once("plan", "--json", *locked)
    plan = json.loads(result.stdout)
    assert [node["seat"] for node in plan["nodes"]] == first["seats"]
    assert plan["run_dir"] == str(again)
    assert "does not go with --decode" in at_once("plan", *locked, "--decode", "2").stderr
    (tmp_path / "none.json").write_text("{}")
    assert "is not a lock file" in at_once("plan", "--locked", str(tmp_path / "none.json")).stderr
    with socket.create_server(("127.0.0.1", first["seats"][0]["http_port"])):
        result = run_to_end(["up", *locked])
        assert result.returncode == 3
        assert f"is taken by pid {os.getpid()}" in result.stderr


def test_the_plan_as_a_shell_script_starts_the_same_and_ends_nothing_else(tmp_path: Path) -> None:
    """Whoever runs it goes on when it ends: a Makefile, say."""
    port, run_dir = free_port(), tmp_path / "run"
    own = [*own_ports(2), "--proxy-port", str(port), "--run-dir", str(run_dir)]
    script = tmp_path / "start.sh"
    result = at_once("plan", *SIM, *own, "--shell", "--env", "NAME=it's a value", "--env", "HF_TOKEN=secret")
    script.write_text(result.stdout)
    bare = {"PATH": os.environ["PATH"]}
    refused = subprocess.run(["/bin/bash", script], env=bare, capture_output=True, text=True, check=False, timeout=60)
    assert (refused.returncode != 0, "HF_TOKEN" in refused.stderr) == (True, True)
    program = f"bash {script} & echo $! > {tmp_path}/pid; wait; echo went on > {tmp_path}/after"
    with subprocess.Popen(["/bin/bash", "-c", program], env=os.environ | {"HF_TOKEN": "secret"}) as caller:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: http.get(f"{url}/readyz").is_success, "the proxy")
        wait_until(lambda: http.get(f"{url}/health").json()["status"] == "ok", "the nodes")
        started = psutil.Process(caller.pid).children(recursive=True)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        assert caller.wait(60) == 0
    assert (tmp_path / "after").exists()
    assert len(psutil.wait_procs(started, 30)[0]) == len(started) >= 4


GARBLING = ["--node-args", "decode-1=--faults", "--node-args", 'decode-1={"garble_transfers": true}']


def test_a_decode_node_that_reads_kv_wrong_is_found_before_anybody_uses_it(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--decode", "2", *GARBLING, nodes=3) as run:
        assert run.process.wait(PATIENCE_S) == 7
    assert "other answers come of it: prefill-0 to decode-1: token 1 is" in run.output


def test_every_pair_is_compared_before_the_run_is_ready(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--prefill", "2", "--decode", "2", nodes=4) as run:
        run.until("Ready:", PATIENCE_S)
        assert "compared  4 pairs answer as their decode node does alone" in run.output


def test_a_run_that_is_kept_in_spite_of_it_serves_by_the_other_pair(tmp_path: Path) -> None:
    with up(tmp_path, *SIM, "--decode", "2", "--keep", *GARBLING, nodes=3) as run:
        run.until("Ready:", PATIENCE_S)
        assert "The nodes stay up, as --keep says." in run.output
        for _ in range(4):
            answer = http.post(f"{run.url}/v1/completions", json={"model": "tiny", "prompt": "hello"})
            assert answer.headers["x-pd-path"] == "disaggregated"
        assert http.get(f"{run.url}/health").json()["status"] == "degraded"


def test_pairs_that_cannot_be_compared_are_named_and_the_run_goes_on(tmp_path: Path) -> None:
    no_logprobs = [
        "--node-args",
        "decode-0=--faults",
        "--node-args",
        'decode-0={"fault": "status", "status": 400, "times": 1}',
    ]
    with up(tmp_path, *SIM, *no_logprobs) as run:
        run.until("Ready:", PATIENCE_S)
        assert (
            "not compared with the decode node's own answer: prefill-0 to decode-0: decode-0 answered 400" in run.output
        )


def test_the_self_test_names_the_pair_that_gives_other_answers(tmp_path: Path) -> None:
    flags = [*SIM, "--decode", "2", "--run-dir", str(tmp_path / "run"), *own_ports(3), *GARBLING]
    result = run_to_end(["test", *flags])
    assert result.returncode == 8
    assert "stage 4, hand-off: KV moves, but other answers come of it: prefill-0 to decode-1" in result.stderr


def test_the_self_test_passes_stage_by_stage(tmp_path: Path) -> None:
    result = run_to_end(["test", *SIM, "--run-dir", str(tmp_path / "run"), *own_ports(2)])
    assert result.returncode == 0, result.stdout + result.stderr
    for stage in ("✓ 2 nodes", "✓ 3 addresses", "1 of 1 pairs answer as their", "All stages passed."):
        assert stage in result.stdout


def test_the_self_test_stops_at_the_first_stage_that_fails_and_says_what_that_proves(tmp_path: Path) -> None:
    flags = ["--decode-args=--max-model-len", "--decode-args=8"]  # too short for the question
    result = run_to_end(["test", *SIM, "--run-dir", str(tmp_path / "run"), *own_ports(2), *flags])
    assert result.returncode == 8
    assert "stage 2, nodes" in result.stderr
    assert "cannot be greater than max_model_len=8" in result.stderr
    assert "The transfer engines work by themselves" in result.stderr
    assert "proxy" not in [path.stem for path in (tmp_path / "run").glob("*.log")]


def test_a_screen_that_has_gone_is_not_the_end_of_the_order(tmp_path: Path) -> None:
    """`pd-launch up | tee`, and a Ctrl-C that ends the reader too."""
    command = [*PD_LAUNCH, "up", *SIM, "--run-dir", str(tmp_path / "run"), *own_ports(2)]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while "Ready:" not in process.stdout.readline():
            pass
        children = psutil.Process(process.pid).children(recursive=True)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        assert alive(children) == []
    assert json.loads((tmp_path / "run" / "state.json").read_text())["phase"] == "stopped"
