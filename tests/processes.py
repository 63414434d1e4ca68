"""Real processes for tests: simulated nodes, the proxy, pd-launch itself. All on loopback, all ended by their test."""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
MODEL = "tiny"
PATIENCE_S = 60
"""A limit for hopeless waits, not a measure: tests wait for states."""
MOST_TASKS_AT_REST = 32
"""The proxy's own, of some workers, and those of a probe."""

http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
"""`httpx.get` and its like, but for the 40 ms that each of them takes to read the world's certificates."""

# Below the ephemeral range, clear of pd-launch's own ranges; a run starts anywhere in it so that two seldom meet.
_PORTS = itertools.cycle(range(10_000, 18_900))
for _ in range(random.randrange(8_900)):  # noqa: S311
    next(_PORTS)


def free_port() -> int:
    """A port nobody listens on, not given out before in this run."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        return port


def free_range(size: int) -> str:
    """`first-last` of so many free ports in a row."""
    while True:
        ports = [free_port() for _ in range(size)]
        if ports[-1] - ports[0] == size - 1:
            return f"{ports[0]}-{ports[-1]}"


def wait_until(holds: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The first true value of `holds`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            if value := holds():
                return value
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for: {what}")


@contextmanager
def running(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A child that ends with the test. Its output goes to a file: a pipe that nobody reads would stop it when full."""
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass
class Sim:
    """A simulated node in a process of its own."""

    role: str
    url: str
    bootstrap: str | None
    process: "subprocess.Popen[str]"

    def control(self, **faults: Any) -> None:
        http.post(f"{self.url}/sim", json=faults).raise_for_status()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = http.get(f"{self.url}/sim").json()
        return state

    def received(self, path: str = "/v1/") -> list[dict[str, Any]]:
        return [entry for entry in self.state()["received"] if entry["path"].startswith(path)]

    def metric(self, series: str, **labels: str) -> float:
        return metric(self.url, series, **labels)

    def kv_usage(self) -> float:
        return self.metric("vllm:kv_cache_usage_perc")

    def until_free(self) -> None:
        """No request, no KV held, nobody waiting for KV."""
        wait_until(lambda: self.metric("vllm:num_requests_running") == 0, f"no request to run on {self.role}")
        wait_until(lambda: self.kv_usage() == 0, f"{self.role} KV to be free")
        wait_until(lambda: self.state()["waiting_pulls"] == 0, f"nobody to wait for KV on {self.role}")


@contextmanager
def sim_node(  # noqa: PLR0913  a node's settings
    role: str,
    *,
    policy: str = "recompute",
    timeout_s: float = 10,
    port: int | None = None,
    bootstrap_port: int | None = None,
    connector: str = "MooncakeConnector",
    flags: Sequence[str] = (),
) -> Iterator[Sim]:
    port = port or free_port()
    config = {
        "kv_connector": connector,
        "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}[role],
        "kv_load_failure_policy": policy,
    }
    command = [sys.executable, "-P", "-m", "engines.sim", "--served-model-name", MODEL, "--port", str(port)]
    command += ["--kv-transfer-config", json.dumps(config), *flags]
    env = {"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(timeout_s)}
    bootstrap = None
    if role != "decode":
        bootstrap_port = bootstrap_port or free_port()
        env["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(bootstrap_port)
        bootstrap = f"http://127.0.0.1:{bootstrap_port}"
    with running(command, env) as process:
        node = Sim(role, f"http://127.0.0.1:{port}", bootstrap, process)
        wait_until(lambda: http.get(f"{node.url}/health").is_success, f"{role} simulator")
        yield node


@dataclass
class Proxy:
    """A pd-proxy in a process of its own."""

    url: str
    process: "subprocess.Popen[str]"

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = http.get(f"{self.url}/health").json()
        return health

    def metric(self, series: str, **labels: str) -> float:
        return metric(self.url, series, **labels)

    def until_usable(self, nodes: int) -> None:
        wait_until(
            lambda: sum(node["usable"] for node in self.health()["nodes"]) == nodes, f"{nodes} usable nodes in /health"
        )

    def until_all_take_turns(self, nodes: int) -> None:
        """... and none of them is remembered as failing."""
        self.until_usable(nodes)
        body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
        wait_until(
            lambda: (
                http.post(f"{self.url}/v1/completions", json=body).is_success
                and self.metric("pd_node_breaker_open") == 0
            ),
            "closed breakers",
        )

    def until_at_rest(self) -> None:
        """Nothing in flight, nobody waiting, nothing still to be given back, no task and no connection of a request."""
        busy = ("pd_requests_in_flight", "pd_requests_queued", "pd_releases_pending", "pd_node_in_flight")
        wait_until(lambda: not any(self.metric(series) for series in busy), "the proxy to come to rest")
        wait_until(lambda: self.metric("pd_tasks") <= MOST_TASKS_AT_REST, "the tasks of requests to end")
        wait_until(lambda: not self.connections(), "the clients' connections to be closed")

    def connect(self) -> socket.socket:
        """A bare connection, for what no HTTP client would do."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def connections(self, client_port: int | None = None) -> list[Any]:
        """Those of clients, or of one client, that the proxy has not closed."""
        port, first = int(self.url.rpartition(":")[2]), psutil.Process(self.process.pid)
        found = [one for process in (first, *first.children(recursive=True)) for one in process.net_connections()]
        clients = [one for one in found if one.raddr and one.laddr.port == port]
        return [one for one in clients if client_port in (None, one.raddr.port)]

    def must_leave_nothing(self, nodes: Sequence[Sim]) -> None:
        """What every test is asked in the end: nothing of any request is left, here and on the nodes."""
        living = [node for node in nodes if node.process.poll() is None]
        for node in living:
            wait_until(lambda node=node: node.control() is None, "a node to listen again")  # type: ignore[misc]
        if self.process.poll() is None:
            self.until_at_rest()
        for node in living:
            node.until_free()


@contextmanager
def proxy_in_front_of(
    *nodes: Sim,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    wait: bool = True,
    probe: bool = True,
) -> Iterator[Proxy]:
    """Started with the flags of vLLM's example proxy; nothing of any request may be left in the end.

    The KV canary, whose questions would be counted with a test's own, is off unless `flags` give its interval.
    `probe`: wait until it answers (it speaks no TLS here).
    """
    port = free_port()
    command = [sys.executable, "-P", "-m", "proxy.cli", "--port", str(port), "--canary-interval-s", "0", *flags]
    for node in nodes:
        bootstrap_port = [(node.bootstrap or "").rpartition(":")[2]] if node.bootstrap else []
        command += [f"--{node.role}", node.url, *bootstrap_port]
    with running(command, env) as process:
        proxy = Proxy(f"http://127.0.0.1:{port}", process)
        if probe:
            wait_until(lambda: http.get(f"{proxy.url}/health"), "the proxy")
        if probe and wait:
            proxy.until_usable(len(nodes))
        yield proxy
        if probe:
            proxy.must_leave_nothing(nodes)


def openai_client(url: str) -> openai.OpenAI:
    """To be closed: one left to the garbage collector may lose its sockets first, and that is a warning."""
    no_tls = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=900, http_client=no_tls)


def metric(url: str, series: str, **labels: str) -> float:
    """The sum of a series over the labels not given."""
    families = text_string_to_metric_families(http.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return sum(s.value for s in samples if s.name == series and labels.items() <= s.labels.items())


def events(answer: httpx.Response) -> list[Any]:
    """The parsed events of a stream that was read whole; its end, `[DONE]`, as a string."""
    data = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [event if event == "[DONE]" else json.loads(event) for event in data]
