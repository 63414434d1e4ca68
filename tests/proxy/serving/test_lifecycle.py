"""SIGTERM, keys and logs: what an operator relies on."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest

from tests.processes import MODEL, ROOT, Sim, free_port, http, openai_client, proxy_in_front_of, sim_node, wait_until

BODY = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
PD_PROXY = (sys.executable, "-P", "-m", "proxy.cli")
CANARY = "sesame-canary-4711"


def test_running_streams_are_finished_before_it_ends() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode, proxy_in_front_of(prefill, decode) as proxy:
        decode.control(itl_s=0.3)
        with http.stream("POST", f"{proxy.url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as stream:
            chunks = stream.iter_text()
            next(chunks)
            proxy.process.terminate()
            wait_until(lambda: refuses_connections(proxy.url), "the proxy to stop accepting")
            assert "".join(chunks).endswith("data: [DONE]\n\n")
        assert proxy.process.wait(30) == 0


def test_a_load_balancer_is_told_before_connections_are_refused() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--shutdown-delay-s", "600"]) as proxy,
    ):
        proxy.process.terminate()
        wait_until(lambda: http.get(f"{proxy.url}/health").status_code == 503, "/health to say it")
        assert proxy.health()["status"] == "stopping"
        answer = http.post(f"{proxy.url}/v1/completions", json=BODY)
        assert answer.is_success
        assert answer.headers["connection"] == "close"
        proxy.process.terminate()
        assert proxy.process.wait(30) == 0


def test_a_shutdown_delay_ends_by_itself() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--shutdown-delay-s", "1", "--workers", "2"]) as proxy,
    ):
        proxy.process.terminate()
        assert proxy.process.wait(60) == 0


def refuses_connections(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


@pytest.mark.parametrize(("grace_s", "sigterms"), [(1, 1), (600, 2)], ids=["the grace time is over", "told twice"])
def test_streams_that_may_not_go_on_end_as_errors_and_hold_no_kv(grace_s: int, sigterms: int) -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--shutdown-grace-s", str(grace_s)]) as proxy,
    ):
        decode.control(fault="hang-after", chunks=2)
        with openai_client(proxy.url) as client:
            stream = client.completions.create(model=MODEL, prompt="x y z", stream=True, max_tokens=9)
            next(iter(stream))
            for _ in range(sigterms):
                proxy.process.terminate()
                wait_until(lambda: refuses_connections(proxy.url), "the proxy to stop accepting")
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert proxy.process.wait(30) == 0
        for node in (prefill, decode):
            wait_until(lambda node=node: node.kv_usage() == 0, "KV to be free")  # type: ignore[misc]
        assert decode.metric("vllm:num_requests_running") == 0


def output_of(*flags: str, env: dict[str, str], nodes: tuple[Sim, Sim], file: Path) -> str:
    """What a proxy wrote while it answered well, refused, and met a failing node; CANARY in prompt and keys."""
    prefill, decode = nodes
    port = free_port()
    command = [*PD_PROXY, "--port", str(port), "--prefill", prefill.url, str(prefill.bootstrap).rpartition(":")[2]]
    command += ["--decode", decode.url, *flags]
    with (
        file.open("w") as output,
        subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**env, "PATH": ""}
        ) as process,
    ):
        try:
            url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {CANARY}"}
            wait_until(lambda: http.get(f"{url}/health").json()["status"] == "ok", "the proxy")
            asked = BODY | {"prompt": CANARY}
            assert http.post(f"{url}/v1/completions", json=asked, headers=headers).is_success
            assert http.post(f"{url}/v1/completions", json=asked | {"temperature": -1}, headers=headers).is_error
            assert http.post(f"{url}/v1/completions", json=asked, headers={"Authorization": "Bearer no"}).is_error
            assert http.post(f"{url}/v1/completions", content=f'{{"{CANARY}', headers=headers).is_error
            decode.control(fault="drop")
            assert http.post(f"{url}/v1/completions", json=asked, headers=headers).status_code == 502
            decode.control()
            metrics = http.get(f"{url}/metrics").text
            assert CANARY not in metrics
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    return file.read_text()


def test_no_prompt_and_no_key_is_ever_logged(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# the clients'\n{CANARY}  # one of them\n\n")
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        flags = ("--api-keys-file", str(keys), "--log-requests")
        env = {"PD_NODE_API_KEY": CANARY + "-node"}
        log = output_of(*flags, env=env, nodes=(prefill, decode), file=tmp_path / "log")
    assert CANARY not in log
    assert "status=200" in log
    assert "path=disaggregated" in log
    assert "status=502" in log


def test_log_lines_can_be_json(tmp_path: Path) -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        env = {"PD_PROXY_API_KEYS": CANARY}
        log = output_of("--log-format", "json", env=env, nodes=(prefill, decode), file=tmp_path / "log")
    lines = [json.loads(line) for line in log.splitlines()]
    failed = [line for line in lines if line.get("status") == 502]
    assert failed[0]["nodes"][:2] == ["prefill-0", "decode-0"]
    assert failed[0]["level"] == "WARNING"
    assert not any(line.get("status") == 200 for line in lines)


@pytest.mark.parametrize(
    ("flags", "env", "says"),
    [
        (["--admin-port", "1", "--admin-host", "0.0.0.0"], {}, "set PD_PROXY_ADMIN_KEY"),
        (["--admin-port", "1"], {"PD_PROXY_ADMIN_KEY": "k", "PD_PROXY_API_KEYS": "k"}, "must be another"),
        (["--tls-key", "x"], {}, "TLS needs both"),
        (["--api-keys-file", "/no/such"], {}, "cannot read the keys"),
        (["--api-keys-file", "/dev/null"], {}, "has no key in it"),
        (["--without-prefill", "maybe"], {}, "'aggregated' or 'refuse'"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line_and_exit_code_2(
    flags: list[str], env: dict[str, str], says: str
) -> None:
    nodes = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    result = subprocess.run(
        [*PD_PROXY, *nodes, *flags], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env=env
    )
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_listening_to_everybody_without_keys_is_said() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        port = free_port()
        command = [*PD_PROXY, "--host", "0.0.0.0", "--port", str(port), "--decode", decode.url]
        command += ["--prefill", prefill.url, str(prefill.bootstrap).rpartition(":")[2]]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert "anyone who reaches 0.0.0.0" in process.stderr.readline()
            process.terminate()


def test_a_log_that_cannot_be_written_stops_no_request() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode, open("/dev/full", "w") as full:  # noqa: PTH123
        port = free_port()
        command = [*PD_PROXY, "--port", str(port), "--decode", decode.url, "--log-requests"]
        command += ["--prefill", prefill.url, str(prefill.bootstrap).rpartition(":")[2]]
        with subprocess.Popen(command, cwd=ROOT, stdout=full, stderr=full) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                wait_until(lambda: http.get(f"{url}/health").json()["status"] == "ok", "the proxy")
                for stream in (False, True):
                    assert http.post(f"{url}/v1/completions", json=BODY | {"stream": stream}).is_success
                decode.control(fault="drop")
                assert http.post(f"{url}/v1/completions", json=BODY).status_code == 502
            finally:
                process.terminate()
                assert process.wait(60) == 0


def test_it_recovers_when_it_had_no_file_descriptor_left() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode, proxy_in_front_of(prefill, decode) as proxy:
        psutil.Process(proxy.process.pid).rlimit(psutil.RLIMIT_NOFILE, (48, 48))
        host, port = proxy.url.removeprefix("http://").split(":")
        crowd = []
        for _ in range(100):
            client = socket.socket()
            client.setblocking(False)  # noqa: FBT003
            client.connect_ex((host, int(port)))
            crowd.append(client)
        for client in crowd:
            client.close()
        wait_until(lambda: http.post(f"{proxy.url}/v1/completions", json=BODY).is_success, "an answer")
        assert proxy.process.poll() is None
