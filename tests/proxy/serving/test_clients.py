"""What clients in the field do: browsers, Anthropic's SDK, terminals that ask for one model, load balancers."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import NotFoundError

from engines.openai.routes import REFUSED
from tests.conftest import EXPIRY_S
from tests.processes import MODEL, Proxy, http, openai_client, proxy_in_front_of, sim_node

BODY: dict[str, Any] = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
PREFLIGHT = {
    "Origin": "http://chat.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Proxy]:
    """A proxy that wants a key, and lets pages of one origin ask."""
    with (
        sim_node("prefill", timeout_s=EXPIRY_S) as prefill,
        sim_node("decode", timeout_s=EXPIRY_S) as decode,
        proxy_in_front_of(
            prefill,
            decode,
            flags=["--allowed-origins", "http://chat.example,https://b.example"],
            env={"PD_PROXY_API_KEYS": "sk-1"},
        ) as proxy,
    ):
        yield proxy


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "sk-1"}, 200),
        ({"Authorization": "Bearer sk-1"}, 200),
        ({"x-api-key": "sk-1", "Authorization": "Bearer something-else"}, 200),
        ({"x-api-key": "something-else", "Authorization": "Bearer sk-1"}, 200),
        ({"x-api-key": "sk-2"}, 401),
        ({"x-api-key": ""}, 401),
        ({}, 401),
    ],
)
def test_a_key_may_be_where_either_client_puts_it(keyed: Proxy, headers: dict[str, str], status: int) -> None:
    assert http.post(f"{keyed.url}/v1/completions", json=BODY, headers=headers).status_code == status
    assert http.get(f"{keyed.url}/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/models", "/health"])
def test_a_browser_asks_first_and_needs_no_key_for_that(keyed: Proxy, path: str) -> None:
    answer = http.request("OPTIONS", f"{keyed.url}{path}", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://chat.example"
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in answer.headers["access-control-allow-methods"]


def test_a_page_of_another_origin_is_told_no(keyed: Proxy) -> None:
    answer = http.request("OPTIONS", f"{keyed.url}/v1/models", headers=PREFLIGHT | {"Origin": "http://evil.example"})
    assert (answer.status_code, answer.text) == (400, "Disallowed CORS origin")
    key = {"x-api-key": "sk-1", "Origin": "http://evil.example"}
    assert "access-control-allow-origin" not in http.post(f"{keyed.url}/v1/completions", json=BODY, headers=key).headers


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_to_a_page_says_that_it_may_be_read_also_when_it_is_an_error(keyed: Proxy, stream: bool) -> None:
    page = {"Origin": "https://b.example"}
    for headers, status in ((page | {"x-api-key": "sk-1"}, 200), (page, 401)):
        answer = http.post(f"{keyed.url}/v1/completions", json=BODY | {"stream": stream}, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://b.example"
        assert answer.headers["vary"] == "Origin"
    assert http.get(f"{keyed.url}/health", headers=page).headers["access-control-allow-origin"] == "https://b.example"
    plain = http.get(f"{keyed.url}/health")
    assert "access-control-allow-origin" not in plain.headers


def test_without_origins_no_page_of_another_origin_may_ask(proxy: Proxy) -> None:
    """As with vLLM 0.32."""
    answer = http.request("OPTIONS", f"{proxy.url}/v1/completions", headers=PREFLIGHT)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


def test_every_origin_may_be_let_in() -> None:
    with (
        sim_node("prefill", timeout_s=EXPIRY_S) as prefill,
        sim_node("decode", timeout_s=EXPIRY_S) as decode,
        proxy_in_front_of(prefill, decode, flags=["--allowed-origins", "*", "--allow-credentials"]) as proxy,
    ):
        cookie = {"Origin": "http://x", "Cookie": "a=b"}
        answer = http.get(f"{proxy.url}/v1/models", headers=cookie)
        assert answer.headers["access-control-allow-origin"] == "http://x"
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert (
            http.get(f"{proxy.url}/v1/models", headers={"Origin": "http://x"}).headers["access-control-allow-origin"]
            == "*"
        )


def test_one_model_can_be_asked_for(proxy: Proxy) -> None:
    with openai_client(proxy.url) as client:
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(NotFoundError) as error:
            client.models.retrieve("Qwen/Qwen3-8B")
    assert error.value.body == {
        "message": "The model `Qwen/Qwen3-8B` does not exist.", "type": "NotFoundError", "param": "model", "code": 404,
    }  # fmt: skip


def test_a_slash_at_the_end_is_the_same_route_and_no_redirect(proxy: Proxy) -> None:
    answer = http.post(f"{proxy.url}/v1/completions/", json=BODY)
    assert answer.headers["x-pd-path"] == "disaggregated"
    assert http.get(f"{proxy.url}/v1/models/").json()["object"] == "list"
    assert http.get(f"{proxy.url}/health//").status_code == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_sagemaker_asks_whether_the_proxy_lives(proxy: Proxy, method: str) -> None:
    assert http.request(method, f"{proxy.url}/ping").status_code == 200


@pytest.mark.parametrize("path", REFUSED)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_route_that_is_not_served_says_why(proxy: Proxy, path: str, method: str) -> None:
    answer: httpx.Response = http.request(method, f"{proxy.url}{path.replace('{response_id}', 'resp_1')}", json={})
    assert answer.status_code == 404
    assert REFUSED[path] in answer.json()["error"]["message"]


def test_an_adapter_that_some_nodes_have_goes_to_those_on_both_legs() -> None:
    """Loaded at run time on one replica: a router that does not look sends every other request to a 404."""
    both = ["--served-model-name", MODEL, "ad1"]
    with (
        sim_node("prefill", timeout_s=EXPIRY_S) as bare_prefill,
        sim_node("prefill", timeout_s=EXPIRY_S, flags=both) as prefill,
        sim_node("decode", timeout_s=EXPIRY_S, flags=both) as decode,
        sim_node("decode", timeout_s=EXPIRY_S) as bare_decode,
        proxy_in_front_of(bare_prefill, prefill, decode, bare_decode) as proxy,
    ):
        for _ in range(8):
            answer = http.post(f"{proxy.url}/v1/completions", json=BODY | {"model": "ad1"})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-pd-path"] == "disaggregated"
        assert {card["id"] for card in http.get(f"{proxy.url}/v1/models").json()["data"]} == {MODEL, "ad1"}


def test_a_decode_node_with_another_block_size_gets_nothing_and_health_says_why() -> None:
    with (
        sim_node("prefill", timeout_s=EXPIRY_S) as prefill,
        sim_node("decode", timeout_s=EXPIRY_S) as decode,
        sim_node("decode", timeout_s=EXPIRY_S, flags=["--block-size", "32"]) as other,
        proxy_in_front_of(prefill, decode, other, wait=False) as proxy,
    ):
        proxy.until_usable(2)
        problems = [node["problem"] for node in proxy.health()["nodes"]]
        assert problems == [None, None, "its KV cache has block_size 32, while 16 is expected"]
        assert http.post(f"{proxy.url}/v1/completions", json=BODY).headers["x-pd-path"] == "disaggregated"
