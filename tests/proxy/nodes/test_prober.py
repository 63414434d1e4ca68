"""What a probe makes of a node."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from engines.base import Role
from engines.topology import Node, Topology
from proxy.nodes import prober
from proxy.nodes.fleet import Fleet
from proxy.nodes.pauses import Pauses
from proxy.nodes.prober import Prober
from proxy.nodes.transfer import TransferWatch
from proxy.settings import ProxySettings

Answers = dict[str, Callable[[], bytes]]
CARD = {"id": "m", "max_model_len": 100}


def late() -> bytes:
    raise prober._LateError("no answer to /health in 2 s")


def gone() -> bytes:
    raise prober._ProbeError("cannot be reached for /health")


def models(**changes: Any) -> Callable[[], bytes]:
    return lambda: json.dumps({"data": [CARD | changes]}).encode()


class Probed:
    """A prefill node and two decode nodes, whose answers are given by address and path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nodes = (
            Node(name="p", role=Role.PREFILL, url="http://p:1", bootstrap="http://p:2"),
            Node(name="d", role=Role.DECODE, url="http://d:1"),
            Node(name="e", role=Role.DECODE, url="http://e:1"),
        )
        self.fleet = Fleet(Topology(nodes=nodes))
        self.answers: Answers = {}
        settings = ProxySettings(decode_silence_timeout_s=0.001, prefill_timeout_s=1000)
        self.pauses = Pauses()
        self.prober = Prober(settings, self.fleet, TransferWatch(self.fleet), [], self.pauses, lambda: None)
        query = {"0": {"engine_id": "e1", "worker_addr": {"0": {"0": "tcp://x"}}}}
        usual: Answers = {
            "/health": lambda: b"",
            "/v1/models": models(),
            "/metrics": lambda: b"",
            "/version": lambda: b'{"version": "0.32.0"}',
            "/query": lambda: json.dumps(query).encode(),
        }

        async def get(base: str, path: str, headers: Any = None) -> bytes:
            del headers
            return self.answers.get(base + path, usual[path])()

        monkeypatch.setattr(self.prober, "_get", get)

    def round(self) -> dict[str, str | None]:
        asyncio.run(self.prober.probe_all(list(self.fleet)))
        return {node.spec.name: node.why_not for node in self.fleet}


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Probed:
    return Probed(monkeypatch)


def test_nodes_that_answer_as_they_should_are_usable(probed: Probed) -> None:
    assert set(probed.round().values()) == {None}
    assert probed.fleet.of(Role.PREFILL)[0].ranks[0].engine_id == "e1"


def test_one_late_answer_is_forgiven_and_three_in_a_row_are_not(probed: Probed) -> None:
    probed.round()
    probed.answers["http://d:1/health"] = late
    assert [probed.round()["d"] for _ in range(3)] == [None, None, "no answer to /health in 2 s"]
    del probed.answers["http://d:1/health"]
    assert probed.round()["d"] is None
    probed.answers["http://d:1/health"] = late
    assert probed.round()["d"] is None


def test_a_node_that_has_not_been_well_yet_is_not_forgiven(probed: Probed) -> None:
    probed.answers["http://d:1/health"] = late
    assert probed.round()["d"] == "no answer to /health in 2 s"


def test_a_node_that_is_gone_is_out_at_once(probed: Probed) -> None:
    probed.round()
    probed.answers["http://d:1/health"] = gone
    assert probed.round()["d"] == "cannot be reached for /health"


def test_a_node_that_is_unlike_the_others_is_refused_with_the_difference(probed: Probed) -> None:
    probed.answers["http://e:1/v1/models"] = models(max_model_len=50)
    assert probed.round()["e"] == "serves m up to 50 tokens, while 100 are expected"
    probed.answers["http://e:1/v1/models"] = models(id="other")
    assert probed.round()["e"] == "serves other, while m is expected"


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"data": 7}', b"<html>"])
def test_a_server_that_is_no_vllm_is_said_to_be_none(probed: Probed, raw: bytes) -> None:
    probed.answers["http://d:1/v1/models"] = lambda: raw
    assert probed.round()["d"] == "answers, but not as a vLLM server does"


def test_a_prefill_node_without_workers_or_identity_is_not_used(probed: Probed) -> None:
    probed.answers["http://p:2/query"] = lambda: b"{}"
    assert probed.round()["p"] == "its bootstrap server knows no worker yet"


def test_a_decode_node_that_has_requests_and_makes_no_token_is_hung_and_a_prefill_node_is_busy(probed: Probed) -> None:
    for base in ("http://p:1", "http://d:1"):
        probed.answers[f"{base}/metrics"] = lambda: b'vllm:num_requests_running{model_name="m"} 1\n'
    probed.round()
    time.sleep(0.01)
    found = probed.round()
    assert "made no token" in str(found["d"])
    assert found["p"] is None


class Rude:
    """An answer that no parser expects."""

    def __call__(self) -> bytes:
        raise RecursionError("nobody thought of this")


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/models", b'{"data": [{"id": ["x"]}]}'),
        ("/metrics", b"vllm:num_requests_running{\n"),
        ("/metrics", b"vllm:kv_cache_usage_perc\n"),
        ("/version", b"not json"),
    ],
)
def test_an_odd_answer_is_that_nodes_problem_and_nobody_elses(probed: Probed, path: str, answer: bytes) -> None:
    probed.answers["http://d:1" + path] = lambda: answer
    assert probed.round() == {"p": None, "d": "answers, but not as a vLLM server does", "e": None}


def test_nothing_that_a_node_answers_ends_the_prober(probed: Probed) -> None:
    probed.answers["http://d:1/metrics"] = Rude()
    assert probed.round() == {"p": None, "d": "its answers cannot be understood; the proxy's log tells more", "e": None}
    del probed.answers["http://d:1/metrics"]
    assert set(probed.round().values()) == {None}


def test_while_the_machine_itself_stood_still_nobody_is_late(probed: Probed) -> None:
    """Both healthy nodes were once declared unreachable in the same instant (seen on real nodes)."""
    probed.round()
    probed.pauses._last_beat -= 3  # its heartbeat is three seconds late
    for url in ("http://p:1", "http://d:1", "http://e:1"):
        probed.answers[url + "/health"] = late
    for _ in range(5):
        assert set(probed.round().values()) == {None}
    probed.pauses._last_beat = time.monotonic()
    for _ in range(3):
        found = probed.round()
    assert set(found.values()) == {"no answer to /health in 2 s"}


def test_the_engines_version_is_asked_for_once_a_life(probed: Probed) -> None:
    probed.round()
    assert {node.version for node in probed.fleet} == {"0.32.0"}
    probed.answers["http://d:1/version"] = gone
    assert probed.round()["d"] is None


def test_a_node_that_hangs_delays_the_probes_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = tuple(Node(name=name, role=Role.DECODE, url=f"http://{name}:1") for name in ("a", "b"))
    fleet = Fleet(Topology(connector="NixlConnector", nodes=nodes))
    settings = ProxySettings(probe_interval_s=0.01)
    asking = Prober(settings, fleet, TransferWatch(fleet), [], Pauses(), lambda: None)
    asked = {"a": 0, "b": 0}

    async def probe(node: Any) -> None:
        asked[node.spec.name] += 1
        if node.spec.name == "a":
            await asyncio.Event().wait()

    monkeypatch.setattr(asking, "probe", probe)

    async def story() -> None:
        running = asyncio.create_task(asking.run())
        while asked["b"] < 5:
            await asyncio.sleep(0.01)
        running.cancel()
        await asking.close()

    asyncio.run(asyncio.wait_for(story(), 30))
    assert asked["a"] == 1


def test_a_node_that_dies_between_two_probes_is_noticed_at_once() -> None:
    """Started again in between, it would be given hand-offs under the identity of its last life."""
    answers = {"/health": b"", "/v1/models": models()(), "/metrics": b"", "/version": b'{"version": "0.32.0"}'}
    connections: list[asyncio.StreamWriter] = []

    async def until(it_is_so: Callable[[], bool]) -> None:
        while not it_is_so():
            await asyncio.sleep(0.01)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while head := await reader.readuntil(b"\r\n\r\n"):
            raw = answers[head.split()[1].decode()]
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw))

    async def story() -> str | None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        fleet = Fleet(Topology(connector="NixlConnector", nodes=(Node(name="d", role=Role.DECODE, url=address),)))
        (node,) = fleet
        asking = Prober(ProxySettings(probe_interval_s=1000), fleet, TransferWatch(fleet), [], Pauses(), lambda: None)
        running = asyncio.create_task(asking.run())
        await until(lambda: node.usable)
        node.probed_at = 0  # long ago
        server.close()
        for connection in connections:
            connection.transport.abort()
        await until(lambda: not node.usable)
        running.cancel()
        await asking.close()
        return node.why_not

    assert asyncio.run(asyncio.wait_for(story(), 30)) == "cannot be reached for /health"


def test_newcomers_are_probed_to_the_end_though_they_are_not_in_the_fleet_yet() -> None:
    """Their connections were closed under the probe, and a probe that hung then would have hung for ever."""
    nodes = (Node(name="d", role=Role.DECODE, url="http://127.0.0.1:1"),)
    fleet = Fleet(Topology(connector="NixlConnector", nodes=nodes))

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    connections: list[asyncio.StreamWriter] = []

    async def story() -> str | None:
        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        (newcomer,) = fleet.newcomers(Topology(nodes=(Node(name="e", role=Role.DECODE, url=url),)))
        settings = ProxySettings(probe_interval_s=0.01, probe_timeout_s=0.5)
        asking = Prober(settings, fleet, TransferWatch(fleet), [], Pauses(), lambda: None)
        running = asyncio.create_task(asking.run())
        await asking.probe_all([newcomer])
        running.cancel()
        await asking.close()
        server.close()
        for connection in connections:
            connection.transport.abort()
        return newcomer.why_not

    assert asyncio.run(asyncio.wait_for(story(), 30)) == "no answer to /health in 0.5 s"
