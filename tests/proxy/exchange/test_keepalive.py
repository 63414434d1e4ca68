"""Comments in a stream whose prompt is still computed, for load balancers that cut what is silent."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import EXPIRY_S
from tests.processes import MODEL, Proxy, Sim, http, openai_client, proxy_in_front_of, sim_node

COMMENT = ": the prompt is being computed\n\n"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def _kept() -> Iterator[tuple[Sim, Sim, Proxy]]:
    with (
        sim_node("prefill", timeout_s=EXPIRY_S) as prefill,
        sim_node("decode", timeout_s=EXPIRY_S) as decode,
        proxy_in_front_of(prefill, decode, flags=["--sse-keep-alive-s", "0.2"]) as proxy,
    ):
        yield prefill, decode, proxy


@pytest.fixture
def kept(_kept: tuple[Sim, Sim, Proxy]) -> Iterator[tuple[Sim, Sim, Proxy]]:
    """A pair whose prefill node takes a second, behind a proxy that keeps streams alive."""
    prefill, decode, proxy = _kept
    proxy.until_usable(2)
    prefill.control(ttft_s=1)
    yield _kept
    prefill.control(ttft_s=0, fault=None)
    decode.control(fault=None)
    proxy.must_leave_nothing([prefill, decode])


def ask(proxy: Proxy, path: str = "/v1/completions", **changes: Any) -> httpx.Response:
    return http.post(f"{proxy.url}{path}", json=BODY | changes, timeout=60)


def test_a_stream_begins_with_comments_and_goes_on_as_any_other(kept: tuple[Sim, Sim, Proxy]) -> None:
    prefill, _, proxy = kept
    answer = ask(proxy, stream=True)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-request-id"]
    assert answer.text.startswith(COMMENT * 2)
    events = answer.text.replace(COMMENT, "")
    prefill.control(ttft_s=0)
    plain = ask(proxy, stream=True).text
    assert COMMENT not in plain
    assert events.count("data: ") == plain.count("data: ")
    assert events.endswith("data: [DONE]\n\n")


def test_openais_client_passes_over_the_comments(kept: tuple[Sim, Sim, Proxy]) -> None:
    _, _, proxy = kept
    with openai_client(proxy.url) as client:
        chunks = list(client.completions.create(model=MODEL, prompt="the quick brown fox", max_tokens=4, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def test_a_whole_answer_has_none(kept: tuple[Sim, Sim, Proxy]) -> None:
    _, _, proxy = kept
    answer = ask(proxy)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-pd-path"] == "disaggregated"


def test_what_fails_after_a_comment_fails_as_an_event(kept: tuple[Sim, Sim, Proxy]) -> None:
    _, decode, proxy = kept
    decode.control(fault="status", status=500)
    told = bytearray()

    def read() -> None:
        with http.stream("POST", f"{proxy.url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as answer:
            for piece in answer.iter_raw():
                told.extend(piece)

    with pytest.raises(httpx.RemoteProtocolError):  # no end of an answer that is none
        read()
    assert b'data: {"error":{"message":"node ' in told
    assert b"[DONE]" not in told


def test_a_refusal_after_a_comment_is_the_nodes_own_as_an_event(kept: tuple[Sim, Sim, Proxy]) -> None:
    _, _, proxy = kept
    answer = ask(proxy, stream=True, max_tokens=1_000_000)
    assert answer.text.startswith(COMMENT)
    assert '"code":400' in answer.text
    assert "max_tokens" in answer.text
    assert "[DONE]" not in answer.text


def test_before_the_first_event_another_try_is_still_possible(kept: tuple[Sim, Sim, Proxy]) -> None:
    _, decode, proxy = kept
    retries = proxy.metric("pd_retries_total")
    decode.control(fault="drop", times=1)
    answer = ask(proxy, stream=True)
    assert answer.text.startswith(COMMENT)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert proxy.metric("pd_retries_total") == retries + 1


def test_http_1_0_knows_no_stream_without_an_end(kept: tuple[Sim, Sim, Proxy]) -> None:
    _, _, proxy = kept
    raw = b'{"prompt": "hello", "max_tokens": 2, "stream": true}'
    head = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw)
    with proxy.connect() as client:
        client.sendall(head + raw)
        told = b""
        while piece := client.recv(65536):
            told += piece
    assert COMMENT.encode() not in told
    assert told.endswith(b"data: [DONE]\n\n")
