"""Clients that misbehave on the wire: bounded in size and in time, and nobody else is the worse for it."""

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import trustme

from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node, wait_until

BODY = json.dumps({"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Proxy]:
    """A proxy that waits for nobody."""
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--head-timeout-s", "1", "--body-timeout-s", "1"]) as proxy,
    ):
        yield proxy


def read_all(client: socket.socket) -> bytes:
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"POST /v1/comp", b" 408 "),
        (HEAD, b" 408 "),
        (HEAD + b"Content-Length: 100\r\n\r\n", b" 408 "),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b" 408 "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b" 408 "),
    ],
    ids=["no byte", "half a line", "half a head", "no body", "half a body", "half a chunk"],
)
def test_a_request_that_does_not_go_on_loses_its_connection(impatient: Proxy, sent: bytes, status: bytes) -> None:
    with impatient.connect() as client:
        client.sendall(sent)
        answer = read_all(client)
        assert status in answer.split(b"\r\n")[0]
        if answer:
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "RequestTimeoutError"
    assert http.get(f"{impatient.url}/health").is_success


def test_a_body_without_an_end_is_refused_at_the_limit_and_its_sender_not_heard_for_ever(impatient: Proxy) -> None:
    process = psutil.Process(impatient.process.pid)
    most = 0
    with impatient.connect() as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                client.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
                most = max(most, process.memory_info().rss)
    assert most < 2**29
    wait_until(lambda: impatient.metric("pd_requests_total", status="413") == 1, "the refusal to be counted")


def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_sent(proxy: Proxy) -> None:
    with proxy.connect() as client:
        client.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n")
        assert b" 413 " in client.recv(65536).split(b"\r\n")[0]


def test_half_a_request_behind_a_running_stream_does_not_end_it() -> None:
    body = json.dumps(json.loads(BODY) | {"stream": True, "ignore_eos": True}).encode()
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    flags = ["--head-timeout-s", "1", "--body-timeout-s", "1"]
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=flags) as proxy,
    ):
        decode.control(itl_s=0.8)
        for rest in (b"POST /v1/comp", HEAD + b"Content-Length: 100\r\n\r\n{"):
            with proxy.connect() as client:
                client.sendall(whole + rest)
                answers = read_all(client)
            first, end, second = answers.partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert end
            assert b"408" not in first
            assert second.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_never_reads_its_whole_answer_loses_its_connection() -> None:
    """Once uvicorn has been given an answer nobody waits for it any more, so nobody would notice."""
    long = {"prompt": "x " * 4_000_000, "echo": True, "max_tokens": 1}
    body = json.dumps(json.loads(BODY) | long).encode()
    flags = ("--max-model-len", "10000000")
    with (
        sim_node("prefill", flags=flags) as prefill,
        sim_node("decode", flags=flags) as decode,
        proxy_in_front_of(prefill, decode, flags=["--client-stall-timeout-s", "1"]) as proxy,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = proxy.url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        client.settimeout(60)
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: proxy.metric("pd_requests_total", status="200") == 1, "the answer to be written")
        wait_until(lambda: not proxy.connections(client.getsockname()[1]), "the connection to be closed")


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(5_000)) + b"\r\n",
        b"POST /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["one long header", "many headers", "a long path"],
)
def test_a_head_that_is_too_large_is_refused(proxy: Proxy, head: bytes) -> None:
    with proxy.connect() as client:
        client.sendall(head)
        answer = read_all(client)
    assert b" 431 " in answer.split(b"\r\n")[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 431


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"SSH-2.0-x\r\n", b"\x00" * 50])
def test_what_is_not_http_is_refused_in_openais_shape(proxy: Proxy, garbage: bytes) -> None:
    with proxy.connect() as client:
        client.sendall(garbage)
        answer = read_all(client)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 400


SIZED = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    "request_",
    {
        "another coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
        "a coding after the last": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
        "a space before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKED,
        "two codings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKED,
        "a coding and a length": HEAD + SIZED + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        "a length twice": HEAD + SIZED + SIZED + b"\r\n" + BODY,
        "a list of lengths": HEAD + b"Content-Length: 5, 5\r\n\r\n" + BODY,
        "a signed length": HEAD + b"Content-Length: +5\r\n\r\n" + BODY,
        "an endless length": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
        "bare line feeds": (HEAD + SIZED + b"\r\n").replace(b"\r\n", b"\n") + BODY,
        "a folded header": HEAD + b"X-A: a\r\n b\r\n" + SIZED + b"\r\n" + BODY,
        "a chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        "a chunk of negative size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        "a control character": HEAD + b"X-A: a\x01b\r\n" + SIZED + b"\r\n" + BODY,
        "a null": HEAD + b"X-A: a\x00b\r\n" + SIZED + b"\r\n" + BODY,
        "a carriage return": HEAD + b"X-A: a\rb\r\n" + SIZED + b"\r\n" + BODY,
        "no host": HEAD.replace(b"Host: x\r\n", b"") + SIZED + b"\r\n" + BODY,
        "two hosts": HEAD + b"Host: y\r\n" + SIZED + b"\r\n" + BODY,
        "HTTP/2.0": HEAD.replace(b"1.1", b"2.0") + SIZED + b"\r\n" + BODY,
        "a tunnel": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_request_that_two_servers_could_read_in_two_ways_is_refused_and_its_connection_closed(
    decode: Sim, proxy: Proxy, request_: tuple[str, bytes]
) -> None:
    seen = len(decode.received())
    with proxy.connect() as client:
        client.sendall(request_[1])
        answer = read_all(client)
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert len(decode.received()) == seen


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("framing", ["a length", "chunks"])
def test_who_asks_for_another_protocol_is_served_in_this_one(proxy: Proxy, framing: str, pieces: int) -> None:
    """As Java's client does, and `curl --http2`."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    sized = SIZED + b"\r\n" + BODY
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED
    asked = (HEAD + upgrade + (sized if framing == "a length" else chunked)) * 2
    with proxy.connect() as client:
        for start in range(0, len(asked), len(asked) // pieces):
            client.sendall(asked[start : start + len(asked) // pieces])
        answer = b""
        while answer.count(b'"kv_transfer_params":null}') < 2:
            answer += client.recv(65536)
    assert answer.count(b"HTTP/1.1 200 OK") == 2


def test_a_crowd_of_such_wishes_on_one_connection_is_served_one_after_the_other(proxy: Proxy) -> None:
    """More than Python's stack is deep."""
    wishes = 1500
    wish = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with proxy.connect() as client:
        client.sendall(wish * wishes)
        answered, rest = 0, b""
        while answered < wishes:
            piece = client.recv(2**16)
            assert piece, f"closed after {answered}"
            rest += piece
            answered += rest.count(b"HTTP/1.1 404 ")
            rest = rest[-12:]  # half of what is counted, perhaps


def test_health_may_be_asked_for_its_status_alone(proxy: Proxy) -> None:
    answer = http.head(f"{proxy.url}/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_an_http_1_0_client_gets_a_body_that_ends_with_the_connection(proxy: Proxy) -> None:
    body = json.loads(BODY) | {"stream": True}
    raw = json.dumps(body).encode()
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(raw)
    with proxy.connect() as client:
        client.sendall(head + raw)
        answer = read_all(client)
    head, _, stream = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert stream.startswith(b"data: {")
    assert stream.endswith(b"data: [DONE]\n\n")


def test_a_client_that_waits_for_permission_to_send_gets_it(proxy: Proxy) -> None:
    with proxy.connect() as client:
        client.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(BODY))
        assert client.recv(100).startswith(b"HTTP/1.1 100 Continue")
        client.sendall(BODY)
        assert b" 200 " in read_all(client).split(b"\r\n")[0]


def test_a_client_that_shuts_its_sending_side_has_left(decode: Sim, proxy: Proxy) -> None:
    """It cannot be told from one that has closed, and one that has closed must not go on costing a node its KV."""
    decode.control(fault="hang-after", chunks=1)
    with proxy.connect() as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        wait_until(lambda: decode.metric("vllm:num_requests_running") == 1, "the decode leg")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        wait_until(lambda: decode.metric("vllm:num_requests_running") == 0, "the decode node to stop")


def test_it_speaks_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(key)
    for part in issued.cert_chain_pems:
        part.write_to_path(certificate, append=True)
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with (
            proxy_in_front_of(prefill, decode, flags=flags, probe=False) as proxy,
            httpx.Client(base_url=proxy.url.replace("http:", "https:"), verify=context) as client,
        ):
            wait_until(lambda: client.get("/health").json()["status"] == "ok", "the proxy")
            for stream in (False, True):
                answer = client.post("/v1/completions", json=json.loads(BODY) | {"stream": stream})
                assert answer.is_success
            assert answer.text.endswith("data: [DONE]\n\n")
