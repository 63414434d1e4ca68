"""Bytes between node and client: nothing held back, nothing piled up, nothing mixed up."""

import json
import socket
import time
from typing import Any

import httpx
import psutil
import pytest

from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node, wait_until

BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}


def request(body: dict[str, Any], *headers: str) -> bytes:
    raw = json.dumps(body).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    if not any(header.lower().startswith("transfer-encoding") for header in headers):
        head.append(f"Content-Length: {len(raw)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + raw


def read_until(client: socket.socket, mark: bytes, times: int = 1) -> bytes:
    data = b""
    while data.count(mark) < times:
        piece = client.recv(65536)
        assert piece, f"the connection ended before {mark!r}: {data!r}"
        data += piece
    return data


def test_a_chunk_that_has_come_is_not_held_back_for_the_next(decode: Sim, proxy: Proxy) -> None:
    decode.control(fault="hang-after", chunks=3)
    with proxy.connect() as client:
        client.sendall(request(BODY | {"stream": True}))
        assert read_until(client, b"data: ", times=3).count(b"data: ") == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 4}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4, "stop": "y"}),
    ],
)
def test_a_stream_that_begins_with_an_error_in_its_routes_own_shape_is_no_answer(
    decode: Sim, proxy: Proxy, path: str, body: dict[str, Any]
) -> None:
    failures = proxy.metric("pd_node_errors_total")
    decode.control(fault="error-first")
    answer = http.post(f"{proxy.url}{path}", json={"model": MODEL, "stream": True, **body}, timeout=60)
    assert answer.status_code == 502
    assert "worker.py" not in answer.text
    assert proxy.metric("pd_node_errors_total") > failures
    decode.control(fault=None)
    answer = http.post(f"{proxy.url}{path}", json={"model": MODEL, "stream": True, **body}, timeout=60)
    assert answer.is_success
    assert answer.headers["x-accel-buffering"] == "no"


def test_a_client_that_leaves_before_the_first_chunk_stops_its_node(decode: Sim, proxy: Proxy) -> None:
    """The node has said 200 and nothing more."""
    decode.control(fault="hang-after", chunks=0)
    with proxy.connect() as client:
        client.sendall(request(BODY | {"stream": True}))
        wait_until(lambda: decode.metric("vllm:num_requests_running") == 1, "the decode leg")
    wait_until(lambda: decode.metric("vllm:num_requests_running") == 0, "the decode node to stop")


def test_a_reader_that_stops_stops_its_node_and_not_the_proxys_memory() -> None:
    long = ["--max-model-len", "100000000"]
    with (
        sim_node("prefill", flags=long) as prefill,
        sim_node("decode", flags=long) as decode,
        proxy_in_front_of(prefill, decode) as proxy,
        socket.socket() as client,
    ):
        process = psutil.Process(proxy.process.pid)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        host, port = proxy.url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        before = process.memory_info().rss
        client.sendall(request(BODY | {"stream": True, "max_tokens": 90_000_000, "ignore_eos": True}))
        read_until(client, b"data: ")
        counted = [decode.state()["chunks"], -1]
        while counted[0] != counted[-1]:  # until the node is made to wait
            time.sleep(0.5)
            counted = [decode.state()["chunks"], *counted[:1]]
        assert process.memory_info().rss - before < 32 * 2**20
        wait_until(lambda: client.recv(2**20) and decode.state()["chunks"] > counted[0], "the node to go on when read")


def test_requests_sent_at_once_on_one_connection_are_answered_in_turn(prefill: Sim, proxy: Proxy) -> None:
    prompts = ["first one", "second one", "third one"]
    with proxy.connect() as client:
        client.sendall(b"".join(request(BODY | {"prompt": prompt}) for prompt in prompts))
        answers = read_until(client, b'"kv_transfer_params":null}', times=3)
    places = []
    for prompt in prompts:
        alone = http.post(f"{prefill.url}/v1/completions", json=BODY | {"prompt": prompt}).json()
        places.append(answers.index(json.dumps(alone["choices"][0]["text"]).encode()))
    assert places == sorted(places)


def test_a_body_may_come_slowly_and_in_chunks(prefill: Sim, proxy: Proxy) -> None:
    raw = json.dumps(BODY).encode()
    head, _, _ = request(BODY, "Transfer-Encoding: chunked").partition(b"\r\n\r\n")
    with proxy.connect() as client:
        client.sendall(head + b"\r\n\r\n")
        for start in range(0, len(raw), 16):
            piece = raw[start : start + 16]
            client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(0.01)
        client.sendall(b"0\r\n\r\n")
        answer = read_until(client, b'"kv_transfer_params":null}')
    text = http.post(f"{prefill.url}/v1/completions", json=BODY).json()["choices"][0]["text"]
    assert json.dumps(text).encode() in answer


def test_two_lengths_for_one_body_are_refused(decode: Sim, proxy: Proxy) -> None:
    seen = len(decode.received())
    for smuggled in (["Content-Length: 5", "Content-Length: 6"], ["Transfer-Encoding: chunked", "Content-Length: 6"]):
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *smuggled, "", ""]
        with proxy.connect() as client:
            client.sendall("\r\n".join(head).encode() + b"{}{}{}")
            assert b" 400 " in client.recv(65536).split(b"\r\n")[0]
    assert len(decode.received()) == seen


def test_a_kept_connection_serves_request_after_request(proxy: Proxy) -> None:
    with httpx.Client(base_url=proxy.url) as client:
        for stream in (True, False) * 5:
            assert client.post("/v1/completions", json=BODY | {"stream": stream}).is_success
