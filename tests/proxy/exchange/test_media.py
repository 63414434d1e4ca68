"""Media in messages: fetched once, within limits."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node

PICTURE = b"\x89PNG not really"


class Shelf(BaseHTTPRequestHandler):
    """A web server with a picture, a huge file and a redirect; counts what it is asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "image/png; charset=x")
        self.end_headers()
        sizes = {"/huge": 40_000_000, "/large": 16_000_000}
        with suppress(ConnectionError):
            self.wfile.write(b"x" * sizes.get(self.path.split("?")[0], 0) or PICTURE)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def shelf() -> Iterator[str]:
    Shelf.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Shelf) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def open_to_private() -> Iterator[tuple[Sim, Sim, Proxy]]:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--allow-private-media"]) as proxy,
    ):
        yield prefill, decode, proxy


def look_at(proxy: Proxy, *urls: str) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [{"type": "text", "text": "what is this?"}, *parts]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return http.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=60)


def test_a_picture_is_fetched_once_and_both_legs_get_the_same_bytes(
    open_to_private: tuple[Sim, Sim, Proxy], shelf: str
) -> None:
    prefill, decode, proxy = open_to_private
    assert look_at(proxy, f"{shelf}/picture", f"{shelf}/picture").is_success
    assert Shelf.asked == ["/picture"]
    expected = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    for node in (prefill, decode):
        parts = node.received()[-1]["body"]["messages"][0]["content"]
        assert [part["image_url"]["url"] for part in parts[1:]] == [expected, expected]
    assert "prompt_token_ids" not in decode.received()[-1]["body"]["kv_transfer_params"]


SHAPES: dict[str, tuple[str, Any]] = {
    "an object": ("/v1/chat/completions", {"type": "image_url", "image_url": {"url": "URL"}}),
    "a string": ("/v1/chat/completions", {"type": "image_url", "image_url": "URL"}),
    "without a type": ("/v1/chat/completions", {"video_url": {"url": "URL"}}),
    "with an id": ("/v1/chat/completions", {"type": "x", "uuid": "u", "audio_url": "URL"}),
    "input_image": ("/v1/chat/completions", {"type": "input_image", "image_url": "URL"}),
    "a source": ("/v1/messages", {"type": "image", "source": {"type": "url", "url": "URL"}}),
    "in a tool's result": (
        "/v1/messages",
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "URL"}}]},
    ),
    "in a batch": ("/v1/chat/completions/batch", [[{"role": "user", "content": [{"image_url": {"url": "URL"}}]}]]),
    "in what is scored": ("/v1/score", {"content": [{"type": "image_url", "image_url": {"url": "URL"}}]}),
    "in what is ranked": ("/rerank", {"content": [{"type": "image_url", "image_url": {"url": "URL"}}]}),
    "in escapes": ("/v1/chat/completions", {"image\\u005furl": {"url": "URL"}}),
    "in an input": ("/v1/responses", {"type": "input_image", "image_url": "URL"}),
}


@pytest.mark.parametrize("scheme", ["http", "HTTP", " http"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_media_makes_a_node_dial_what_a_client_names(
    prefill: Sim, decode: Sim, proxy: Proxy, shape: str, scheme: str
) -> None:
    route, part = SHAPES[shape]
    messages = [{"role": "user", "content": [part]}]
    field = {"/v1/responses": "input", "/v1/score": "data_1", "/rerank": "query"}.get(route, "messages")
    body = {"model": MODEL, "max_tokens": 4, field: messages}
    raw = json.dumps(body).replace("URL", f"{scheme}://169.254.169.254/latest").replace("\\\\u", "\\u")
    seen = len(prefill.received()) + len(decode.received())
    headers = {"Content-Type": "application/json"}
    answer = http.post(f"{proxy.url}{route}", content=raw, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert "media in the messages" in answer.json()["error"]["message"]
    assert len(prefill.received()) + len(decode.received()) == seen


def test_what_only_looks_like_media_is_left_alone(prefill: Sim, proxy: Proxy) -> None:
    """A tool's schema may call a field `image_url`."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"image_url": "http://10.0.0.1/x"}}}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "tools": tools, "max_tokens": 4}
    assert http.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=60).is_success
    assert prefill.received()[-1]["body"]["tools"] == tools


def test_the_media_of_a_request_are_bounded_together(open_to_private: tuple[Sim, Sim, Proxy], shelf: str) -> None:
    """In number, and in bytes: a picture of 16 MB may come twice, and not thirty times."""
    proxy = open_to_private[2]
    answer = look_at(proxy, *(f"{shelf}/picture?{number}" for number in range(40)))
    assert (answer.status_code, "more than 32" in answer.json()["error"]["message"]) == (400, True)
    Shelf.asked.clear()
    answer = look_at(proxy, *(f"{shelf}/large?{number}" for number in range(30)))
    assert (answer.status_code, "larger than" in answer.json()["error"]["message"]) == (400, True)
    assert len(Shelf.asked) < 10


def test_media_that_is_already_inline_is_left_alone(proxy: Proxy, prefill: Sim) -> None:
    assert look_at(proxy, "data:image/png;base64,AAAA").is_success
    part = prefill.received()[-1]["body"]["messages"][0]["content"][1]
    assert part["image_url"]["url"] == "data:image/png;base64,AAAA"


def test_private_addresses_are_not_fetched_from(proxy: Proxy, prefill: Sim, shelf: str) -> None:
    seen = len(prefill.received())
    for url in (f"{shelf}/picture", "http://169.254.169.254/latest/meta-data", "http://[::1]:1/x", "http://10.0.0.1/"):
        answer = look_at(proxy, url)
        assert answer.status_code == 400
        assert "private address" in answer.json()["error"]["message"]
    assert Shelf.asked == []
    assert len(prefill.received()) == seen


@pytest.mark.parametrize(("path", "says"), [("/moved", "its server says 302"), ("/huge", "larger than 33554432 bytes")])
def test_redirects_and_too_much_are_refused(
    open_to_private: tuple[Sim, Sim, Proxy], shelf: str, path: str, says: str
) -> None:
    answer = look_at(open_to_private[2], shelf + path)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_a_server_that_is_not_there_is_a_400(open_to_private: tuple[Sim, Sim, Proxy]) -> None:
    answer = look_at(open_to_private[2], "http://127.0.0.1:9/picture")
    assert answer.status_code == 400
    assert "cannot be fetched" in answer.json()["error"]["message"]
