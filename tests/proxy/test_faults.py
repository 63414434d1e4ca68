"""What happens to nodes and the proxy from outside: killed, gone, renamed, exchanged, full. Nothing may be left."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gate import Gate
from tests.processes import MODEL, Proxy, Sim, events, http, proxy_in_front_of, sim_node, wait_until

ROUTE = "/v1/completions"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}


def ask(url: str, **fields: Any) -> httpx.Response:
    return http.post(url + ROUTE, json=BODY | fields, timeout=60)


def text(answer: httpx.Response) -> str:
    said: str = answer.json()["choices"][0]["text"]
    return said


# -- a node that is not there


def test_a_decode_node_that_is_gone_costs_no_request_and_without_any_the_answer_comes_at_once() -> None:
    with (
        sim_node("prefill", timeout_s=1) as prefill,
        sim_node("decode") as one,
        sim_node("decode") as other,
        proxy_in_front_of(prefill, one, other) as proxy,
    ):
        one.process.kill()
        one.process.wait()
        answers = [ask(proxy.url) for _ in range(6)]
        assert {text(answer) for answer in answers} == {text(ask(prefill.url))}
        other.process.kill()
        other.process.wait()
        assert ask(proxy.url).status_code in (502, 503)
        wait_until(lambda: proxy.health()["status"] == "unavailable", "the deaths to be seen")
        answer = ask(proxy.url)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "cannot be reached" in answer.json()["error"]["message"]


def test_a_node_whose_name_means_nothing_is_said_to_be_unreachable_and_the_others_serve() -> None:
    lost = ["--decode", "http://no-such-node.invalid:80"]
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=lost) as proxy,
    ):
        assert {ask(proxy.url).status_code for _ in range(3)} == {200}
        assert "cannot be reached" in proxy.health()["nodes"][1]["problem"]


def test_a_node_may_be_given_by_a_name() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        named = replace(decode, url=decode.url.replace("127.0.0.1", "localhost"))
        with proxy_in_front_of(prefill, named) as proxy:
            assert ask(proxy.url).headers["x-pd-path"] == "disaggregated"


# -- a node that dies in the middle of a hand-off


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_prefill_node_that_dies_before_its_kv_is_fetched_costs_no_answer(policy: str) -> None:
    with ExitStack() as stack:
        prefill = stack.enter_context(sim_node("prefill"))
        decode = [stack.enter_context(sim_node("decode", policy=policy)) for _ in range(2)]
        gates = [stack.enter_context(closing(Gate(node.url))) for node in decode]
        gated = [replace(node, url=gate.url) for node, gate in zip(decode, gates, strict=True)]
        proxy = stack.enter_context(proxy_in_front_of(prefill, *gated))
        expected = text(ask(prefill.url))
        for gate in gates:
            gate.shut("request", ROUTE)
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(ask(proxy.url)))
        asking.start()
        wait_until(lambda: any(gate.holds.is_set() for gate in gates), "the decode leg")
        prefill.process.kill()
        prefill.process.wait()
        for gate in gates:
            gate.open()
        asking.join()
        assert text(answers[0]) == expected


def test_a_prefill_that_takes_too_long_is_a_504_that_no_client_should_repeat_and_is_stopped() -> None:
    """Another node would need as long: it is not tried."""
    with (
        sim_node("prefill") as slow,
        sim_node("prefill") as other,
        sim_node("decode") as decode,
        proxy_in_front_of(slow, other, decode, flags=["--prefill-timeout-s", "1"]) as proxy,
    ):
        for node in (slow, other):
            node.control(ttft_s=600)
        answer = ask(proxy.url)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "GatewayTimeoutError")
        assert answer.headers["x-should-retry"] == "false"
        assert len(slow.received()) + len(other.received()) == 1
        slow.until_free()
        other.until_free()


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_a_node_that_does_not_take_the_proxys_key_is_a_502_that_says_how_to_mend_it(
    prefill: Sim, decode: Sim, proxy: Proxy, leg: str
) -> None:
    node = prefill if leg == "prefill" else decode
    node.control(fault="status", status=401, times=1)
    answer = ask(proxy.url)
    assert answer.status_code == 502
    assert "PD_NODE_API_KEY" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("raw", [b"", b"not JSON", b"[]", b'{"choices": []}', b'{"choices": [{"finish_reason": 7}]}'])
def test_a_prefill_answer_that_promises_nothing_is_answered_by_the_decode_node(raw: bytes) -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        closing(Liar(prefill.url, raw)) as liar,
        proxy_in_front_of(replace(prefill, url=liar.url), decode) as proxy,
    ):
        answer = ask(proxy.url)
        assert answer.headers["x-pd-path"] == "aggregated; reason=prefill-stopped"
        assert text(answer) == text(ask(decode.url))


class Liar:
    """A node that is well, but answers every POST with 200 and `raw`."""

    def __init__(self, node_url: str, raw: bytes) -> None:
        self._node = node_url
        self._raw = raw
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            with client:
                asked = client.recv(2**16)
                path = asked.split(b" ", 2)[1].decode()
                raw = http.get(self._node + path).content if asked.startswith(b"GET") else self._raw
                head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(raw)
                client.sendall(head + raw)


# -- the proxy itself


def test_a_proxy_that_is_killed_leaves_no_request_on_its_nodes_and_the_next_one_serves() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        with proxy_in_front_of(prefill, decode) as proxy, ExitStack() as stack:
            decode.control(fault="hang-after", chunks=2)
            request = http.stream("POST", proxy.url + ROUTE, json=BODY | {"stream": True}, timeout=60)
            chunks = stack.enter_context(request).iter_bytes()
            next(chunks)
            prefill.control(ttft_s=600)
            broken: list[httpx.HTTPError] = []
            asking = threading.Thread(target=ask_in_vain, args=(proxy.url, broken))
            asking.start()
            wait_until(lambda: prefill.metric("vllm:num_requests_running") == 1, "a prefill to run")
            proxy.process.kill()
            proxy.process.wait()
            asking.join()
            assert broken
        for node in (prefill, decode):
            node.until_free()
        with proxy_in_front_of(prefill, decode) as proxy:
            assert ask(proxy.url).headers["x-pd-path"] == "disaggregated"


def ask_in_vain(url: str, broken: list[httpx.HTTPError]) -> None:
    try:
        ask(url)
    except httpx.HTTPError as exc:
        broken.append(exc)


# -- nodes exchanged under load


def test_no_request_fails_while_nodes_come_and_go(tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    with ExitStack() as stack:
        prefill = [stack.enter_context(sim_node("prefill")) for _ in range(2)]
        decode = [stack.enter_context(sim_node("decode")) for _ in range(2)]
        for node in decode:
            node.control(itl_s=0.02)
        nodes = [
            {"name": f"{node.role}-{node.url[-5:]}", "role": node.role, "url": node.url, "bootstrap": node.bootstrap}
            for node in (*prefill, *decode)
        ]
        rounds = [nodes, nodes[:3], [nodes[1], nodes[3]], nodes]
        file.write_text(json.dumps({"nodes": nodes}))
        proxy = stack.enter_context(proxy_in_front_of(flags=["--topology", str(file)], wait=False))
        proxy.until_usable(4)
        with asking_for_ever(proxy) as answers:
            for those in (*rounds, *rounds):
                file.write_text('{"nodes": [{"name": "half a fi')  # changes nothing
                file.write_text(json.dumps({"nodes": those}))
                names = [node["name"] for node in those]
                wait_until(lambda names=names: [n["name"] for n in proxy.health()["nodes"]] == names, "the change")  # type: ignore[misc]
                proxy.until_usable(len(those))
                seen = len(answers)
                wait_until(lambda seen=seen: len(answers) > seen + 8, "some answers")  # type: ignore[misc]
        assert {(answer.status_code, answer.text.endswith("data: [DONE]\n\n")) for answer in answers} == {(200, True)}
        proxy.must_leave_nothing([*prefill, *decode])


class asking_for_ever:  # noqa: N801  reads as a function
    """Four clients that stream one answer after the other, until the block ends."""

    def __init__(self, proxy: Proxy) -> None:
        self._url = proxy.url
        self._answers: list[httpx.Response] = []
        self._enough = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(4)]

    def _ask(self) -> None:
        while not self._enough.is_set():
            self._answers.append(ask(self._url, stream=True))

    def __enter__(self) -> list[httpx.Response]:
        for client in self._clients:
            client.start()
        return self._answers

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for client in self._clients:
            client.join()


# -- overload


@pytest.fixture
def narrow() -> Iterator[tuple[Sim, Sim, Proxy]]:
    """Two requests may be inside, two may wait."""
    flags = ["--max-in-flight", "2", "--max-queue", "2", "--queue-timeout-s", "600"]
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=flags) as proxy,
    ):
        yield prefill, decode, proxy


def test_when_it_is_full_requests_wait_then_are_sent_away_and_those_who_leave_are_forgotten(
    narrow: tuple[Sim, Sim, Proxy],
) -> None:
    prefill, decode, proxy = narrow
    decode.control(fault="hang-after", chunks=2, times=2)
    raw = json.dumps(BODY | {"stream": True}).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    with ExitStack() as stack:
        clients = []
        for number in range(4):
            client = stack.enter_context(proxy.connect())
            client.sendall(head.encode() + raw)
            clients.append(client)
            inside, waiting = min(number + 1, 2), max(number - 1, 0)
            wait_until(lambda n=inside: proxy.metric("pd_node_in_flight", role="decode") == n, "its place")  # type: ignore[misc]
            wait_until(lambda n=waiting: proxy.metric("pd_requests_queued") == n, "its place in the queue")  # type: ignore[misc]
        refused = ask(proxy.url)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "TooManyRequestsError")
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["x-request-id"]
        assert proxy.health()["status"] == "ok"
        clients[2].close()
        wait_until(lambda: proxy.metric("pd_requests_queued") == 1, "who left to be forgotten")
        assert len(prefill.received()) == 2
        clients[0].close()
        answer = b""
        while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            answer += clients[3].recv(2**16)
        assert answer.startswith(b"HTTP/1.1 200 ")
    assert len(prefill.received()) == 3


def test_who_has_waited_too_long_is_sent_away() -> None:
    flags = ["--max-in-flight", "1", "--queue-timeout-s", "0.5"]
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=flags) as proxy,
    ):
        decode.control(fault="hang-after", chunks=2, times=1)
        with http.stream("POST", proxy.url + ROUTE, json=BODY | {"stream": True}, timeout=60) as first:
            chunks = first.iter_bytes()
            next(chunks)
            refused = ask(proxy.url)
            assert (refused.status_code, "no room" in refused.json()["error"]["message"]) == (429, True)
        assert events(ask(proxy.url, stream=True))[-1] == "[DONE]"


# -- large bodies


def test_others_are_served_while_a_large_body_comes_in(proxy: Proxy) -> None:
    raw = json.dumps(BODY | {"prompt": "x " * 10_000_000}).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    with proxy.connect() as client:
        client.sendall(head.encode() + raw[: len(raw) // 2])
        assert ask(proxy.url).is_success
        client.sendall(raw[len(raw) // 2 :])
        with http.stream("POST", proxy.url + ROUTE, json=BODY | {"stream": True}, timeout=60) as other:
            assert other.read().endswith(b"data: [DONE]\n\n")
        assert client.recv(2**16).startswith(b"HTTP/1.1 400 ")  # longer than the model's context
