"""Nodes come and go at run time, through a door of their own."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import MODEL, Proxy, Sim, free_port, http, proxy_in_front_of, sim_node, wait_until

BODY = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}
KEY = "the-admin-key"


@dataclass
class Administered:
    """A proxy with an admin listener, its nodes, and one that it does not know."""

    url: str
    proxy: Proxy
    prefill: Sim
    decode: Sim
    stranger: Sim

    def call(self, method: str, path: str, key: str = KEY, **options: Any) -> httpx.Response:
        return http.request(method, f"{self.url}{path}", headers={"Authorization": f"Bearer {key}"}, **options)

    def names(self) -> list[str]:
        return [node["name"] for node in self.proxy.health()["nodes"]]

    def ask(self) -> httpx.Response:
        return http.post(f"{self.proxy.url}/v1/completions", json=BODY, timeout=60)


@pytest.fixture(scope="module")
def _administered() -> Iterator[Administered]:
    port = free_port()
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        sim_node("decode") as stranger,
        proxy_in_front_of(prefill, decode, flags=["--admin-port", str(port)], env={"PD_PROXY_ADMIN_KEY": KEY}) as proxy,
    ):
        made = Administered(f"http://127.0.0.1:{port}", proxy, prefill, decode, stranger)
        wait_until(lambda: made.call("GET", "/nodes").is_success, "the admin listener")
        yield made


@pytest.fixture
def administered(_administered: Administered) -> Administered:
    _administered.call("DELETE", "/nodes/decode-1")
    _administered.call("POST", "/nodes/decode-0/undrain")
    wait_until(lambda: _administered.names() == ["prefill-0", "decode-0"], "the nodes of the beginning")
    _administered.proxy.until_usable(2)
    return _administered


def test_a_node_is_added_used_and_removed(administered: Administered) -> None:
    added = administered.call("PUT", "/nodes/decode-1", json={"role": "decode", "url": administered.stranger.url})
    assert added.is_success
    assert [node["name"] for node in added.json()["nodes"]] == ["prefill-0", "decode-0", "decode-1"]
    administered.proxy.until_usable(3)
    for _ in range(2):
        assert administered.ask().is_success
    assert administered.stranger.received()
    assert administered.call("DELETE", "/nodes/decode-1").is_success
    wait_until(lambda: administered.names() == ["prefill-0", "decode-0"], "the removal")


def test_a_drained_node_finishes_what_it_has_and_gets_no_more(administered: Administered) -> None:
    administered.call("PUT", "/nodes/decode-1", json={"role": "decode", "url": administered.stranger.url})
    administered.proxy.until_usable(3)
    administered.decode.control(itl_s=0.3)
    administered.stranger.control(itl_s=0.3)
    with ExitStack() as stack:
        request = "POST", f"{administered.proxy.url}/v1/completions"
        streams = [
            stack.enter_context(http.stream(*request, json=BODY | {"stream": True}, timeout=60)) for _ in range(2)
        ]
        assert administered.call("POST", "/nodes/decode-0/drain").is_success
        wait_until(lambda: administered.proxy.health()["nodes"][1]["problem"] == "draining", "the drain")
        for stream in streams:
            assert stream.read().endswith(b"data: [DONE]\n\n")
    administered.decode.control()
    administered.stranger.control()
    before = administered.decode.received()[-1]["headers"]["x-request-id"]
    for _ in range(3):
        assert administered.ask().is_success
    assert administered.decode.received()[-1]["headers"]["x-request-id"] == before


def test_without_the_key_nothing_is_told_and_nothing_done(administered: Administered) -> None:
    for key in ("none", "wrong"):
        for method, path in (("GET", "/nodes"), ("DELETE", "/nodes/decode-0"), ("GET", "/health"), ("GET", "/docs")):
            assert administered.call(method, path, key=key).status_code == 401
    assert administered.names() == ["prefill-0", "decode-0"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"role": "decode"}', "url"),
        ('{"role": "boss", "url": "http://127.0.0.1:1"}', "role"),
        ('{"role": "decode", "url": "file:///etc/passwd"}', "not of the form"),
        ('{"role": "decode", "url": "https://127.0.0.1:1"}', "not of the form"),
        ('{"role": "decode", "url": "http://user:secret@127.0.0.1:1"}', "leave the rest away"),
        ('{"role": "decode", "url": "http://169.254.169.254"}', "no address of a node"),
        ('{"role": "decode", "url": "http://0.0.0.0:1"}', "no address of a node"),
        ('{"role": "decode", "url": "http://224.0.0.1:1"}', "no address of a node"),
        ('{"role": "decode", "url": "http://[fe80::1]:1"}', "no address of a node"),
        ('{"role": "prefill", "url": "http://127.0.0.1:1"}', "needs 'bootstrap'"),
        ('{"name": "other", "role": "decode", "url": "http://127.0.0.1:1"}', "in the path"),
        ('{"role": "decode", "url": "http://127.0.0.1:1", "admin": true}', "admin"),
    ],
)
def test_a_node_that_cannot_be_one_is_refused(administered: Administered, body: str, says: str) -> None:
    answer = administered.call("PUT", "/nodes/decode-1", content=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert administered.names() == ["prefill-0", "decode-0"]


def test_a_body_that_is_too_long_is_a_413(administered: Administered) -> None:
    assert administered.call("PUT", "/nodes/decode-1", content=b" " * (2**20 + 1)).status_code == 413
    assert administered.names() == ["prefill-0", "decode-0"]


def test_a_second_name_for_the_same_address_is_refused(administered: Administered) -> None:
    again = administered.call("PUT", "/nodes/decode-9", json={"role": "decode", "url": administered.decode.url})
    assert (again.status_code, "more than one node" in again.text) == (400, True)


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/nodes/x"), ("POST", "/nodes/x/drain")])
def test_a_node_that_is_not_there_is_a_404(administered: Administered, method: str, path: str) -> None:
    answer = administered.call(method, path)
    assert (answer.status_code, "there is no node 'x'" in answer.text) == (404, True)


def test_a_topology_file_of_ones_own_is_what_changes(tmp_path: Path) -> None:
    file, port = tmp_path / "nodes.json", free_port()
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        nodes = [
            {"name": "p", "role": "prefill", "url": prefill.url, "bootstrap": prefill.bootstrap},
            {"name": "d", "role": "decode", "url": decode.url},
        ]
        file.write_text(json.dumps({"nodes": nodes}))
        flags = ["--topology", str(file), "--admin-port", str(port), "--workers", "2"]
        with proxy_in_front_of(flags=flags, env={"PD_PROXY_ADMIN_KEY": KEY}, wait=False) as proxy:
            headers = {"Authorization": f"Bearer {KEY}"}
            drain = f"http://127.0.0.1:{port}/nodes/d/drain"
            wait_until(lambda: http.post(drain, headers=headers).is_success, "the drain")
            assert json.loads(file.read_text())["nodes"][1]["drain"] is True
            for _ in range(8):  # every worker follows
                wait_until(lambda: proxy.health()["status"] == "unavailable", "the drain to be known")
