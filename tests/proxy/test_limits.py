"""What a client may cost before it is let in, and while it is: bounded, whatever it sends."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest

from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node, wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4}).encode()
MIB = 2**20
BUDGET_MIB = 64


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Sim, Sim]]:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        yield prefill, decode


@pytest.fixture
def small(nodes: tuple[Sim, Sim]) -> Iterator[Proxy]:
    flags = ["--max-request-memory-bytes", str(BUDGET_MIB * MIB), "--body-timeout-s", "5"]
    with proxy_in_front_of(*nodes, flags=flags) as proxy:
        yield proxy


@pytest.fixture
def one_at_a_time(nodes: tuple[Sim, Sim]) -> Iterator[Proxy]:
    with proxy_in_front_of(*nodes, flags=["--max-in-flight", "1", "--max-queue", "0"]) as proxy:
        yield proxy


class Memory:
    """The largest that a process has become meanwhile, in MiB above what it was."""

    def __init__(self, proxy: Proxy) -> None:
        self._process = psutil.Process(proxy.process.pid)
        self._before = self._rss()

    def _rss(self) -> float:
        family = [self._process, *self._process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family) / MIB

    @property
    def growth(self) -> float:
        return self._rss() - self._before


def test_bodies_in_memory_are_bounded_together(small: Proxy) -> None:
    """Forty unfinished bodies of 16 MB: as many as the budget has room for are read, the others get a 429 at once."""
    memory = Memory(small)
    with ExitStack() as stack:
        clients = [stack.enter_context(small.connect()) for _ in range(40)]
        for client in clients:
            with suppress(ConnectionError):
                client.sendall(HEAD + b"Content-Length: 16000000\r\n\r\n" + b" " * 15_000_000)
        answered = sum(client.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 429" for client in clients[4:])
        assert answered == 36
        assert memory.growth < 3 * BUDGET_MIB
        wait_until(lambda: small.metric("pd_request_memory_bytes") > 0, "the budget to be in use")
    wait_until(lambda: small.metric("pd_request_memory_bytes") == 0, "the budget to be free again")


def test_the_worst_body_there_is_takes_what_the_reference_says(small: Proxy) -> None:
    """Empty objects grow 24 times when they are parsed: in a process of its own, which may take 2 GiB and no more."""
    memory = Memory(small)
    body = b'{"model": "nobody", "prompt": [' + b"{}," * 10_000_000 + b"{}]}"
    answer = http.post(f"{small.url}/v1/completions", content=body, timeout=60)
    assert answer.status_code in (404, 413)
    assert memory.growth < 2048 + 3 * BUDGET_MIB
    assert http.post(f"{small.url}/v1/completions", content=BODY).is_success


def test_who_is_not_let_in_is_told_so_before_its_body(one_at_a_time: Proxy) -> None:
    with one_at_a_time.connect() as first:
        first.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        wait_until(lambda: one_at_a_time.metric("pd_requests_in_flight") == 1, "the first to be inside")
        with one_at_a_time.connect() as second:
            second.sendall(HEAD + b"Content-Length: 60000000\r\n\r\n")
            answer = second.recv(65536)
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"retry-after: 2" in answer
            assert b"connection: close" in answer
    wait_until(lambda: one_at_a_time.metric("pd_requests_in_flight") == 0, "the first to have left")


def test_a_flood_of_requests_on_one_connection_takes_no_memory(small: Proxy) -> None:
    """Whoever sends and never waits is not read ahead of what it is answered."""
    memory = Memory(small)
    with small.connect() as client:
        client.settimeout(1)

        def drain() -> None:
            with suppress(OSError):
                while client.recv(2**16):
                    pass

        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        sent = 0
        flood = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 7000
        with suppress(OSError):
            while sent < 30 * MIB and memory.growth < 100:
                sent += client.send(flood)
        assert memory.growth < 32
    reader.join()


def test_without_a_key_nothing_of_a_body_is_read(nodes: tuple[Sim, Sim]) -> None:
    with proxy_in_front_of(*nodes, env={"PD_PROXY_API_KEYS": "k"}) as proxy, proxy.connect() as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        with suppress(ConnectionError):
            for _ in range(200):
                client.sendall(b"1\r\na\r\n" * 10_000)
        wait_until(lambda: not proxy.connections(client.getsockname()[1]), "the connection to be closed")
        assert proxy.metric("pd_requests_total", status="401") == 1


def test_a_key_in_a_trailer_is_none(nodes: tuple[Sim, Sim]) -> None:
    """It would beat any front that filters headers."""
    with proxy_in_front_of(*nodes, env={"PD_PROXY_API_KEYS": "k"}) as proxy, proxy.connect() as client:
        chunk = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer k\r\n\r\n" % (len(BODY), BODY)
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
