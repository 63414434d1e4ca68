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
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
MODEL = "tiny"
PATIENCE_S = 60
"""A limit for hopeless waits, not a measure: tests wait for states."""

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
        httpx.post(f"{self.url}/sim", json=faults).raise_for_status()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = httpx.get(f"{self.url}/sim").json()
        return state

    def received(self, path: str = "/v1/") -> list[dict[str, Any]]:
        return [entry for entry in self.state()["received"] if entry["path"].startswith(path)]

    def metric(self, series: str, **labels: str) -> float:
        return metric(self.url, series, **labels)

    def kv_usage(self) -> float:
        return self.metric("vllm:kv_cache_usage_perc")


@contextmanager
def sim_node(  # noqa: PLR0913  a node's settings
    role: str,
    *,
    policy: str = "recompute",
    timeout_s: float = 60,
    port: int | None = None,
    bootstrap_port: int | None = None,
    connector: str = "MooncakeConnector",
    flags: Sequence[str] = (),
) -> Iterator[Sim]:
    port = port or free_port()
    config = {
        "kv_connector": connector,
        "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
        "kv_load_failure_policy": policy,
    }
    command = [sys.executable, "-P", "-m", "engines.sim", "--served-model-name", MODEL, "--port", str(port)]
    command += ["--kv-transfer-config", json.dumps(config), *flags]
    env = {"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(timeout_s)}
    bootstrap = None
    if role == "prefill":
        bootstrap_port = bootstrap_port or free_port()
        env["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(bootstrap_port)
        bootstrap = f"http://127.0.0.1:{bootstrap_port}"
    with running(command, env) as process:
        node = Sim(role, f"http://127.0.0.1:{port}", bootstrap, process)
        wait_until(lambda: httpx.get(f"{node.url}/health").is_success, f"{role} simulator")
        yield node


@dataclass
class Proxy:
    """A pd-proxy in a process of its own."""

    url: str
    process: "subprocess.Popen[str]"

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = httpx.get(f"{self.url}/health").json()
        return health

    def metric(self, series: str, **labels: str) -> float:
        return metric(self.url, series, **labels)

    def until_usable(self, nodes: int) -> None:
        wait_until(
            lambda: sum(node["usable"] for node in self.health()["nodes"]) == nodes, f"{nodes} usable nodes in /health"
        )

    def until_at_rest(self) -> None:
        """Nothing in flight, nothing still to be given back."""
        busy = ("pd_requests_in_flight", "pd_releases_pending", "pd_node_in_flight")
        wait_until(lambda: not any(self.metric(series) for series in busy), "the proxy to come to rest")


@contextmanager
def proxy_in_front_of(
    *nodes: Sim,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    wait: bool = True,
    probe: bool = True,
) -> Iterator[Proxy]:
    """Started with the flags of vLLM's example proxy. `probe`: wait until it answers (it speaks no TLS here)."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "proxy.cli", "--port", str(port), *flags]
    for node in nodes:
        bootstrap_port = [(node.bootstrap or "").rpartition(":")[2]] if node.role == "prefill" else []
        command += [f"--{node.role}", node.url, *bootstrap_port]
    with running(command, env) as process:
        proxy = Proxy(f"http://127.0.0.1:{port}", process)
        if probe:
            wait_until(lambda: httpx.get(f"{proxy.url}/health"), "the proxy")
        if probe and wait:
            proxy.until_usable(len(nodes))
        yield proxy


def metric(url: str, series: str, **labels: str) -> float:
    """The sum of a series over the labels not given."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return sum(s.value for s in samples if s.name == series and labels.items() <= s.labels.items())


def events(answer: httpx.Response) -> list[Any]:
    """The parsed events of a stream that was read whole; its end, `[DONE]`, as a string."""
    data = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [event if event == "[DONE]" else json.loads(event) for event in data]
