"""What happens to a hand-off: released when it is not used, one for each data-parallel rank, one kind a connector."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.gate import Gate
from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node, wait_until

PROMPT = "the quick brown fox jumps over the lazy dog"
BODY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}


def ask(url: str, timeout: float = 60, **fields: Any) -> httpx.Response:
    return http.post(f"{url}/v1/completions", json=BODY | fields, timeout=timeout)


def chat(url: str, timeout: float = 60, **fields: Any) -> httpx.Response:
    return http.post(f"{url}/v1/chat/completions", json=CHAT | {"temperature": 0} | fields, timeout=timeout)


def text(answer: httpx.Response) -> str:
    result: str = answer.json()["choices"][0]["text"]
    return result


# -- release


def test_what_is_refused_after_a_stream_of_responses_has_begun_holds_no_kv(
    prefill: Sim, decode: Sim, proxy: Proxy
) -> None:
    """That stream begins before the engine has the request, so the prefill node is asked to judge all of it first."""
    body = {"model": MODEL, "input": PROMPT, "max_output_tokens": 4, "stream": True}
    answer = http.post(f"{proxy.url}/v1/responses", json=body | {"logit_bias": {"99999999": 1}})
    assert answer.status_code == 502
    for node in (prefill, decode):
        node.until_free()
    proxy.until_usable(2)
    assert http.post(f"{proxy.url}/v1/responses", json=body).headers["x-pd-path"] == "disaggregated"


@pytest.mark.parametrize(
    ("fault", "status"),
    [({"fault": "status", "status": 503}, 503), ({"fault": "status", "status": 401}, 502)],
    ids=["full", "its key"],
)
def test_a_hand_off_that_its_decode_node_never_took_is_released(
    prefill: Sim, decode: Sim, proxy: Proxy, fault: dict[str, Any], status: int
) -> None:
    done = proxy.metric("pd_releases_total", outcome="done")
    decode.control(**({"times": 1} | fault))
    assert ask(proxy.url).status_code == status
    wait_until(lambda: proxy.metric("pd_releases_total", outcome="done") == done + 1, "the release")
    assert prefill.kv_usage() == 0
    assert ask(proxy.url).is_success


def test_a_hand_off_that_its_decode_node_may_have_taken_is_not_released_and_expires(
    prefill: Sim, decode: Sim, proxy: Proxy
) -> None:
    """A second pull for one that is gone would keep one of the prefill node's sender tasks for the whole timeout."""
    unknown = proxy.metric("pd_hand_offs_total", outcome="unknown")
    released, expired = proxy.metric("pd_releases_total"), prefill.state()["expired"]
    decode.control(fault="drop", times=1)
    assert ask(proxy.url).is_success  # tried again, with a new hand-off
    assert proxy.metric("pd_hand_offs_total", outcome="unknown") == unknown + 1
    wait_until(lambda: prefill.state()["expired"] == expired + 1, "the KV to expire")
    assert proxy.metric("pd_releases_total") == released
    assert prefill.state()["waiting_pulls"] == 0


def test_a_leg_is_sent_once_whatever_becomes_of_its_connection() -> None:
    """Twenty kept connections, all closed by the node when a request is read: that is one prefill, and one retry."""
    with (
        sim_node("prefill", timeout_s=3) as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode) as proxy,
    ):
        prefill.control(ttft_s=0.3)
        with ThreadPoolExecutor(20) as clients:
            assert all(answer.is_success for answer in clients.map(lambda _: ask(proxy.url), range(20)))
        seen = len(prefill.received())
        prefill.control(fault="drop", ttft_s=0)
        assert ask(proxy.url).status_code in (200, 502)
        ids = [entry["body"]["kv_transfer_params"]["transfer_id"] for entry in prefill.received()[seen:]]
        assert len(ids) == len(set(ids)) <= 3
        assert prefill.state()["leaked_blocks"] == 0


def test_a_connection_lost_between_a_prefills_end_and_its_answer_leaks_nothing() -> None:
    with sim_node("prefill", timeout_s=3) as prefill, sim_node("decode") as decode:
        gate = Gate(prefill.url)
        with proxy_in_front_of(replace(prefill, url=gate.url), decode) as proxy:
            assert ask(proxy.url).is_success  # one kept connection
            gate.shut("answer", "/v1/completions")
            with ThreadPoolExecutor(1) as client:
                answer = client.submit(ask, proxy.url)
                wait_until(gate.holds.is_set, "the prefill node's answer")
                gate.drop()
                assert answer.result().is_success
            ids = [entry["body"]["kv_transfer_params"]["transfer_id"] for entry in prefill.received()]
            assert len(ids) == len(set(ids)) == 2  # tried again where no prefill node is left to fail
            assert proxy.metric("pd_retries_total") == 1
            prefill.until_free()
            assert prefill.state()["leaked_blocks"] == 0
        gate.close()


def test_short_deadlines_of_clients_take_no_sender_task(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    """The client hears 504 at its deadline; the leg that cannot be cut ends behind its back."""
    decode.control(itl_s=0.1)
    tools = [{"type": "function", "function": {"name": "f"}}]

    def hasty(_: int) -> int:
        body = CHAT | {"tools": tools, "max_tokens": 30, "ignore_eos": True}
        headers = {"x-request-timeout": "0.7"}
        return http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers).status_code

    with ThreadPoolExecutor(22) as clients:
        assert list(clients.map(hasty, range(22))) == [504] * 22
    assert prefill.state()["waiting_pulls"] == 0
    decode.control()
    assert ask(proxy.url).is_success
    wait_until(lambda: decode.metric("vllm:num_requests_running") == 0, "the decode node to finish")
    assert prefill.state()["waiting_pulls"] == 0


def test_a_release_that_is_answered_late_is_not_sent_again() -> None:
    with (
        sim_node("prefill", timeout_s=20) as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode) as proxy,
    ):
        prefill.control(ttft_s=0.6)
        with pytest.raises(httpx.ReadTimeout):
            ask(proxy.url, timeout=0.3)
        decode.control(fault="drop", times=1)  # it has read the release, and is not heard of again
        wait_until(lambda: proxy.metric("pd_releases_total", outcome="unknown") == 1, "the release to be given up")
        assert proxy.metric("pd_releases_total") == 1
        assert prefill.state()["waiting_pulls"] == 0


def test_a_prefill_nodes_refusal_of_our_body_is_not_the_clients(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    """Our body is not the client's: one node is given the client's own, and its answer is the client's."""
    prefill.control(fault="status", status=400, times=1)
    answer = ask(proxy.url)
    assert answer.is_success
    assert answer.headers["x-pd-path"] == "aggregated; reason=prefill-refused"
    assert text(answer) == text(ask(decode.url))


@pytest.mark.parametrize("options", ["x", [1], 7])
def test_a_field_that_only_the_decode_leg_has_and_that_is_none_holds_no_kv(
    prefill: Sim, proxy: Proxy, options: Any
) -> None:
    expired = prefill.state()["expired"]
    assert ask(proxy.url, stream=True, stream_options=options).status_code == 400
    wait_until(lambda: prefill.kv_usage() == 0, "the release")
    assert prefill.state()["expired"] == expired


def test_what_the_decode_nodes_serving_layer_refuses_is_not_released_twice(prefill: Sim, proxy: Proxy) -> None:
    """A second empty pull would keep one of the prefill node's sender tasks for the whole transfer timeout."""
    assert ask(proxy.url, max_tokens=10**6).status_code == 400
    wait_until(lambda: prefill.kv_usage() == 0, "the engine's own release")
    assert prefill.state()["waiting_pulls"] == 0
    assert ask(proxy.url).is_success


def test_a_client_that_leaves_just_when_the_prefill_ends_leaves_no_kv_behind(prefill: Sim, proxy: Proxy) -> None:
    done = proxy.metric("pd_releases_total", outcome="done")
    prefill.control(ttft_s=0.6)
    with pytest.raises(httpx.ReadTimeout):
        ask(proxy.url, timeout=0.5)
    wait_until(lambda: proxy.metric("pd_releases_total", outcome="done") == done + 1, "the release")
    assert prefill.kv_usage() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_inside_a_stream_is_a_refusal_and_its_hand_off_is_released(
    prefill: Sim, proxy: Proxy, stream: bool
) -> None:
    """VLLM finds some errors when its answer has begun; then its own clean-up does not run."""
    answer = ask(proxy.url, logprobs=30, stream=stream)
    assert answer.status_code == 400
    assert "logprobs" in answer.json()["error"]["message"]
    wait_until(lambda: prefill.kv_usage() == 0, "the release")


def test_a_release_that_meets_no_node_is_counted_and_forgotten() -> None:
    with (
        sim_node("prefill", timeout_s=5) as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode) as proxy,
    ):
        prefill.control(ttft_s=1)
        with ThreadPoolExecutor(1) as client:
            answer = client.submit(ask, proxy.url)
            wait_until(lambda: prefill.metric("vllm:num_requests_running") == 1, "the prefill")
            decode.process.kill()
            assert answer.result().status_code in (502, 503)  # the leg found out, or the prober had heard of it
        wait_until(lambda: proxy.metric("pd_releases_total", outcome="failed") == 1, "a failed release")


# -- a stream to the decode node, always


def test_a_client_of_a_whole_answer_is_served_from_a_stream(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    whole = chat(proxy.url)
    assert decode.received()[-1]["body"]["stream"] is True
    alone = chat(prefill.url).json()
    mine = whole.json()
    assert mine["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]
    assert mine["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"]
    assert mine["object"] == "chat.completion"


def test_a_client_of_a_whole_answer_that_leaves_keeps_no_sender_task(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    decode.control(itl_s=0.5)
    with pytest.raises(httpx.ReadTimeout):
        ask(proxy.url, timeout=1)
    wait_until(lambda: decode.metric("vllm:num_requests_running") == 0, "the decode node to stop")
    assert prefill.state()["waiting_pulls"] == 0
    assert prefill.kv_usage() == 0


def test_a_leg_that_cannot_be_a_stream_is_finished_even_for_a_client_that_left(
    prefill: Sim, decode: Sim, proxy: Proxy
) -> None:
    decode.control(itl_s=0.2)
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(httpx.ReadTimeout):
        chat(proxy.url, timeout=0.8, tools=tools)
    assert decode.received()[-1]["body"].get("stream") is not True
    wait_until(lambda: decode.metric("vllm:num_requests_running") == 0, "the decode node to finish")
    assert prefill.state()["waiting_pulls"] == 0
    wait_until(lambda: sum(n["in_flight"] for n in proxy.health()["nodes"]) == 0, "the leases to come back")


# -- one tokenization


def test_the_decode_node_gets_the_prefill_nodes_token_ids(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    ids = http.post(f"{prefill.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    ask(proxy.url)
    assert decode.received()[-1]["body"]["prompt"] == ids
    chat(proxy.url)
    rendered = http.post(f"{prefill.url}/tokenize", json=CHAT).json()["tokens"]
    assert decode.received()[-1]["body"]["kv_transfer_params"]["prompt_token_ids"] == rendered


# -- prompts too short to be worth it


def test_short_prompts_are_answered_by_the_decode_node_alone_when_told_so() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--min-prefill-tokens", "50"]) as proxy,
    ):
        short, long = ask(proxy.url), ask(proxy.url, prompt=PROMPT * 6)
        assert short.headers["x-pd-path"] == "aggregated; reason=short-prompt"
        assert long.headers["x-pd-path"] == "disaggregated"
        assert len(prefill.received()) == 1
        assert proxy.metric("pd_aggregated_total", reason="short-prompt") == 1


# -- data parallel


def test_each_rank_of_a_data_parallel_prefill_node_is_a_target_of_its_own() -> None:
    with (
        sim_node("prefill", flags=["--data-parallel-size", "2"]) as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--prefill-policy", "round-robin"]) as proxy,
    ):
        alone = text(ask(decode.url))
        assert [text(ask(proxy.url)) for _ in range(4)] == [alone] * 4
        ranks = [entry["headers"]["x-data-parallel-rank"] for entry in prefill.received()]
        engines = [entry["body"]["kv_transfer_params"]["remote_engine_id"] for entry in decode.received()[1:]]
        assert sorted(ranks) == ["0", "0", "1", "1"]
        assert [engine.rpartition("_dp")[2] for engine in engines] == ranks
        assert prefill.kv_usage() == 0


# -- other connectors


@pytest.fixture
def nixl() -> Iterator[tuple[Sim, Sim, Proxy]]:
    name = "NixlConnector"
    with (
        sim_node("prefill", connector=name) as prefill,
        sim_node("decode", connector=name) as decode,
        proxy_in_front_of(prefill, decode, flags=["--connector", name]) as proxy,
    ):
        yield prefill, decode, proxy


def test_with_nixl_the_prefill_nodes_own_parameters_go_to_the_decode_node(nixl: tuple[Sim, Sim, Proxy]) -> None:
    prefill, decode, proxy = nixl
    assert text(ask(proxy.url)) == text(ask(prefill.url))
    sent = prefill.received()[0]["body"]["kv_transfer_params"]
    told = decode.received()[0]["body"]["kv_transfer_params"]
    assert sent["remote_engine_id"] is None
    assert told["remote_engine_id"] == prefill.state()["engine_id"]
    assert told["remote_block_ids"] == [[1, 2, 3]]
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") > 0
    assert prefill.kv_usage() == 0


def test_with_nixl_an_unused_hand_off_is_released_too(nixl: tuple[Sim, Sim, Proxy]) -> None:
    prefill, decode, proxy = nixl
    decode.control(fault="status", status=503, times=1)
    ask(proxy.url)
    wait_until(lambda: prefill.kv_usage() == 0, "the release")


def test_with_nixl_a_prefill_that_does_not_say_where_its_kv_lies_is_answered_by_one_node() -> None:
    """The nodes speak Mooncake's protocol: a null in the answer must not be taken for parameters."""
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--connector", "NixlConnector"]) as proxy,
    ):
        answer = ask(proxy.url)
        assert answer.headers["x-pd-path"] == "aggregated; reason=prefill-stopped"
        assert text(answer) == text(ask(decode.url))


def test_with_a_store_nothing_is_told_and_nothing_pinned() -> None:
    name = "MooncakeStoreConnector"
    with (
        sim_node("prefill", connector=name) as prefill,
        sim_node("decode", connector=name) as decode,
        proxy_in_front_of(prefill, decode, flags=["--connector", name]) as proxy,
    ):
        assert text(ask(proxy.url)) == text(ask(prefill.url))
        assert decode.received()[0]["body"]["kv_transfer_params"] is None
        assert prefill.received()[0]["body"]["kv_transfer_params"] is None
        assert prefill.received()[0]["body"]["max_tokens"] == 1


# -- does KV move


def test_health_says_when_hand_offs_are_made_and_nothing_moves() -> None:
    """With the policy "recompute" a decode node answers all the same when no transfer succeeds."""
    with (
        sim_node("prefill", timeout_s=5) as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode) as proxy,
    ):
        wait_until(lambda: ask(proxy.url).is_success and _kv(proxy) == "moving", "the proof that KV moves")
        assert proxy.health()["status"] == "ok"
        assert proxy.metric("pd_kv_moving") == 1
        decode.control(lose_transfers=True)
        wait_until(lambda: ask(proxy.url).is_success and _kv(proxy) == "not moving", "the proof that it does not")
        assert proxy.health()["status"] == "degraded"
        assert proxy.metric("pd_kv_moving") == 0
        decode.control()
        wait_until(lambda: ask(proxy.url).is_success and _kv(proxy) == "moving", "the recovery")


def _kv(proxy: Proxy) -> str:
    verdict: str = next(node["kv"] for node in proxy.health()["nodes"] if node["role"] == "decode")
    return verdict


def test_the_proxy_counts_what_was_handed_over_and_what_arrived(proxy: Proxy) -> None:
    handed, arrived = (
        proxy.metric(name) for name in ("pd_hand_off_prompt_tokens_total", "pd_arrived_prompt_tokens_total")
    )
    tokens = ask(proxy.url).json()["usage"]["prompt_tokens"]
    assert proxy.metric("pd_hand_off_prompt_tokens_total") == handed + tokens
    wait_until(lambda: proxy.metric("pd_arrived_prompt_tokens_total") == arrived + tokens, "the arrival to be counted")


# -- headers and keys


def test_headers_for_tracing_sessions_and_priority_reach_both_nodes_and_others_do_not(
    prefill: Sim, decode: Sim, proxy: Proxy
) -> None:
    passed = {"traceparent": "00-a-b-01", "x-session-id": "s1", "x-vllm-priority": "3"}
    dropped = {"authorization": "Bearer client", "cookie": "c=1", "x-data-parallel-rank": "7", "te": "trailers",
               "x-forwarded-for": "10.1.1.1"}  # fmt: skip
    http.post(f"{proxy.url}/v1/completions", json=BODY, headers=passed | dropped)
    for node in (prefill, decode):
        headers = node.received()[-1]["headers"]
        assert headers.items() >= passed.items()
        assert not dropped.keys() & headers.keys()


def test_clients_need_a_key_and_nodes_get_the_proxys_own() -> None:
    keys = {"PD_PROXY_API_KEYS": "first-key,second-key", "PD_NODE_API_KEY": "node-key"}
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, env=keys) as proxy,
    ):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}):
            answer = http.post(f"{proxy.url}/v1/completions", json=BODY, headers=given)
            assert answer.status_code == answer.json()["error"]["code"] == 401
        for path in ("/v1/models", "/openapi.json", "/docs", "/version", "//health", "/nothing"):
            assert http.get(f"{proxy.url}{path}").status_code == 401
        for key in ("first-key", "second-key"):
            well = {"Authorization": f"Bearer {key}"}
            assert http.post(f"{proxy.url}/v1/completions", json=BODY, headers=well).is_success
        for node in (prefill, decode):
            assert {entry["headers"]["authorization"] for entry in node.received()} == {"Bearer node-key"}
            assert "first-key" not in json.dumps(node.received())
        assert http.get(f"{proxy.url}/health").is_success
        assert http.get(f"{proxy.url}/metrics").is_success
