"""The proxy as a process, in front of simulated nodes, over real sockets."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from engines.sim.faults import MESSAGE
from tests.processes import Proxy, Sim, events, http, openai_client, proxy_in_front_of, sim_node, wait_until

PROMPT = "the quick brown fox jumps over the lazy dog"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello, what is the answer?"}]


def completion(url: str, timeout: float = 60, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
    return http.post(f"{url}/v1/completions", json=body, timeout=timeout)


def chat(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0} | fields
    return http.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def said(answer: httpx.Response) -> str:
    """The text of an answer, whole or streamed, completion or chat."""
    if answer.headers["content-type"].startswith("application/json"):
        choice = answer.json()["choices"][0]
        text: str = choice["message"]["content"] if "message" in choice else choice["text"]
        return text
    choices = [choice for event in events(answer)[:-1] for choice in event["choices"]]
    return "".join(choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices)


def transferred(node: Sim) -> float:
    return node.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [completion, chat])
def test_an_answer_is_the_one_the_prefill_node_alone_would_give(
    prefill: Sim, decode: Sim, proxy: Proxy, ask: Any, stream: bool
) -> None:
    before = transferred(decode)
    answer = ask(proxy.url, stream=stream)
    alone = ask(prefill.url)
    assert said(answer) == said(alone)
    assert transferred(decode) - before == alone.json()["usage"]["prompt_tokens"]
    assert answer.headers["x-pd-path"] == "disaggregated"
    assert prefill.kv_usage() == decode.kv_usage() == 0


def test_a_stream_keeps_the_nodes_events_and_media_type(proxy: Proxy) -> None:
    answer = chat(proxy.url, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events(answer)[-1] == "[DONE]"
    assert events(answer)[-2]["usage"]["completion_tokens"] == 12


def test_both_legs_carry_the_clients_request_id(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    headers = {"X-Request-Id": "my-request-7"}
    answer = http.post(f"{proxy.url}/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers)
    assert answer.headers["x-request-id"] == "my-request-7"
    for node in (prefill, decode):
        assert node.received()[-1]["headers"]["x-request-id"] == "my-request-7"


@pytest.mark.parametrize("unsafe", ["a b", "x" * 200, "a;b"])
def test_a_request_id_that_could_do_harm_in_a_log_is_replaced(proxy: Proxy, unsafe: str) -> None:
    answer = http.post(f"{proxy.url}/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": unsafe})
    assert answer.headers["x-request-id"] != unsafe
    assert answer.is_success


def test_the_two_legs_agree_on_a_hand_off_of_the_nodes_present_life(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    completion(proxy.url)
    first = prefill.received()[-1]["body"]["kv_transfer_params"]
    second = decode.received()[-1]["body"]["kv_transfer_params"]
    assert first["transfer_id"] == second["transfer_id"]
    assert second["remote_engine_id"] == prefill.state()["engine_id"]
    assert second["remote_bootstrap_addr"] == prefill.bootstrap


def test_a_clients_transfer_parameters_reach_no_node(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    """Any of these would kill an engine, or make it dial an address of the client's choice."""
    for evil in ({"do_remote_prefill": True}, {"do_remote_decode": True}, {"remote_bootstrap_addr": "http://evil"}):
        assert completion(proxy.url, kv_transfer_params=evil, ec_transfer_params=evil).is_success
        assert completion(proxy.url, kv_transfer_params=evil, prompt=["a", "b"]).is_success
    for node in (prefill, decode):
        bodies = [entry["body"] for entry in node.received()]
        assert "evil" not in json.dumps(bodies)
        assert not any("ec_transfer_params" in body for body in bodies)


def test_unknown_fields_reach_the_nodes_as_they_came(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    odd: dict[str, Any] = {"x_number": 0.1, "x_big": 2**53 + 1, "x_text": "ü\u0000\U0001f600", "x_null": None}
    completion(proxy.url, **odd)
    for node in (prefill, decode):
        assert node.received()[-1]["body"].items() >= odd.items()


def test_eos_as_the_first_token_ends_the_answer_and_hangs_nothing(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    answer = completion(proxy.url, logit_bias={"2": 100})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["usage"]["completion_tokens"] == 1
    assert prefill.kv_usage() == decode.kv_usage() == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": ["one", "two"], "use_beam_search": True}, "prompt-list"),
        ({"best_of": 2, "temperature": 1, "seed": 3}, "many-choices"),
        ({"prompt_logprobs": 1}, "prompt-logprobs"),
    ],
)
def test_what_cannot_be_handed_off_goes_to_one_node_and_says_so(
    decode: Sim, prefill: Sim, proxy: Proxy, fields: dict[str, Any], reason: str
) -> None:
    seen = len(prefill.received())
    answer = completion(proxy.url, **fields)
    assert answer.headers["x-pd-path"] == f"aggregated; reason={reason}"
    assert [c["text"] for c in answer.json()["choices"]] == [
        c["text"] for c in completion(decode.url, **fields).json()["choices"]
    ]
    assert len(prefill.received()) == seen
    assert "kv_transfer_params" not in decode.received()[-2]["body"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"model": "other"}, 404), ({"temperature": -1}, 400), ({"prompt": None}, 400), ({"max_tokens": 10**9}, 400)],
)
def test_what_a_node_refuses_reaches_the_client_in_the_nodes_words(
    decode: Sim, proxy: Proxy, prefill: Sim, fields: dict[str, Any], status: int
) -> None:
    answer = completion(proxy.url, **fields)
    assert answer.status_code == status
    assert answer.json() == completion(decode.url, **fields).json()
    wait_until(lambda: prefill.kv_usage() == 0, "the prefill node's KV to be free")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"prompt": }', b"\xff\xfe", b'{"a": NaN}', b"[1]", b'"text"', b"null", b"[" * 100_000],
)
def test_a_body_that_is_no_request_is_a_400_in_openais_shape(proxy: Proxy, content: bytes) -> None:
    answer = http.post(
        f"{proxy.url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400
    assert error["message"]
    assert error["type"] == "BadRequestError"


def test_wrong_media_types_and_encodings_are_refused(proxy: Proxy) -> None:
    url = f"{proxy.url}/v1/completions"
    assert http.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
    packed = http.post(url, content=b"{}", headers={"Content-Type": "application/json", "Content-Encoding": "gzip"})
    assert packed.status_code == 415


def test_unknown_routes_and_methods_are_errors_in_openais_shape(proxy: Proxy) -> None:
    assert http.post(f"{proxy.url}/v1/nothing").json()["error"]["code"] == 404
    assert http.get(f"{proxy.url}/v1/completions").json()["error"]["code"] == 405


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_a_nodes_own_failure_reaches_the_client_with_its_status(
    prefill: Sim, decode: Sim, proxy: Proxy, leg: str
) -> None:
    node = prefill if leg == "prefill" else decode
    node.control(fault="status", status=503, headers={"Retry-After": "7"}, times=1)
    answer = completion(proxy.url)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["message"].startswith(f"node {leg}-0 answered 503")
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        {"fault": "status", "status": 500},
        {"fault": "status", "status": 503},
        {"fault": "error-first"},
        {"fault": "error-after", "chunks": 3},
    ],
    ids=lambda fault: f"{fault['fault']} {fault.get('status', '')}".strip(),
)
@pytest.mark.parametrize("watched", [False, True])
def test_what_a_failing_node_says_of_its_inside_is_not_told(
    decode: Sim, proxy: Proxy, fault: dict[str, Any], stream: bool, watched: bool
) -> None:
    """A stream that cannot be continued passes unparsed, and its last event all the same."""
    decode.control(**fault)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 99, "ignore_eos": True, "stream": stream}
    body |= {} if watched else {"logprobs": 1}
    got = b""
    with suppress(httpx.RemoteProtocolError), http.stream("POST", f"{proxy.url}/v1/completions", json=body) as answer:
        for piece in answer.iter_raw():
            got += piece
    assert b"Traceback" not in got
    assert json.loads(got.rpartition(b"data: ")[2])["error"]["message"]
    assert b"[DONE]" not in got


def test_a_decode_node_that_drops_every_connection_is_a_502_that_names_it(decode: Sim, proxy: Proxy) -> None:
    decode.control(fault="drop")
    answer = completion(proxy.url)
    assert answer.status_code == 502
    assert "decode-0" in answer.json()["error"]["message"]
    assert decode.url not in answer.text


def test_a_stream_that_begins_with_an_error_is_not_a_200(decode: Sim, proxy: Proxy) -> None:
    decode.control(fault="error-first")
    answer = completion(proxy.url, stream=True)
    assert answer.status_code == 502
    assert "decode-0 began its answer with an error" in answer.json()["error"]["message"]


def test_what_is_no_stream_reaches_a_client_that_asked_for_one_as_it_is() -> None:
    with (
        sim_node("prefill", timeout_s=1) as prefill,  # this decode node takes no KV
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode) as proxy,
    ):
        decode.control(fault="status", status=200)
        for ask in (completion, chat):
            answer = ask(proxy.url, stream=True)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
            assert answer.json()["error"]["message"] == MESSAGE


def test_a_stream_cut_off_by_its_node_never_ends_as_if_it_were_whole(decode: Sim, proxy: Proxy) -> None:
    decode.control(fault="drop-after", chunks=3)
    pieces: list[str] = []
    with openai_client(proxy.url) as client:
        stream = client.completions.create(model="tiny", prompt=PROMPT, stream=True, max_tokens=12, logprobs=1)
        with pytest.raises(openai.APIError, match="decode-0"):
            pieces.extend(chunk.choices[0].text for chunk in stream)
    assert len(pieces) == 3


def test_a_whole_answer_cut_off_by_its_node_is_an_error(decode: Sim, proxy: Proxy) -> None:
    decode.control(fault="drop-after", chunks=3)
    answer = completion(proxy.url)
    assert answer.status_code == 502
    assert "decode-0 closed the connection in the middle" in answer.json()["error"]["message"]


def test_a_prefill_that_holds_no_kv_is_answered_by_one_node_and_says_so(prefill: Sim, proxy: Proxy) -> None:
    prefill.control(fault="finish-error", times=1)
    answer = completion(proxy.url)
    assert answer.headers["x-pd-path"] == "aggregated; reason=prefill-stopped"
    assert said(answer) == said(completion(prefill.url))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_a_client_that_leaves_stops_both_legs(prefill: Sim, decode: Sim, proxy: Proxy, leg: str, stream: bool) -> None:
    slow = prefill if leg == "prefill" else decode
    slow.control(ttft_s=60, itl_s=60)
    with pytest.raises(httpx.ReadTimeout):
        completion(proxy.url, timeout=1, stream=stream)
    wait_until(lambda: slow.metric("vllm:num_requests_running") == 0, "the node to stop")
    wait_until(lambda: sum(n["in_flight"] for n in proxy.health()["nodes"]) == 0, "the leases to come back")


def test_health_is_503_and_says_why_until_a_pair_is_usable() -> None:
    flags = ["--prefill", "http://127.0.0.1:9", "--without-prefill", "refuse"]
    with sim_node("decode") as decode, proxy_in_front_of(decode, flags=flags, wait=False) as proxy:
        proxy.until_usable(1)
        health = http.get(f"{proxy.url}/health")
        assert health.status_code == 503
        nodes = {node["name"]: node for node in health.json()["nodes"]}
        assert nodes["decode-0"]["usable"]
        assert "cannot be reached" in nodes["prefill-0"]["problem"]
        answer = completion(proxy.url)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "prefill-0: cannot be reached" in answer.json()["error"]["message"]
        assert http.get(f"{proxy.url}/v1/models").status_code == 503


def test_a_prefill_node_that_comes_back_is_used_in_its_new_life() -> None:
    """The old engine_id would hang the decode node for the whole transfer timeout."""
    with sim_node("decode") as decode, sim_node("prefill") as first, proxy_in_front_of(first, decode) as proxy:
        port, bootstrap = (int((url or "").rpartition(":")[2]) for url in (first.url, first.bootstrap))
        old = first.state()["engine_id"]
        first.process.kill()
        first.process.wait()
        wait_until(lambda: proxy.health()["status"] == "degraded", "the loss to show")
        with sim_node("prefill", port=port, bootstrap_port=bootstrap) as second:
            proxy.until_usable(2)
            assert completion(proxy.url).is_success
            used = decode.received()[-1]["body"]["kv_transfer_params"]["remote_engine_id"]
            assert used == second.state()["engine_id"] != old


def test_requests_go_round_over_all_nodes() -> None:
    with (
        sim_node("prefill") as p0,
        sim_node("prefill") as p1,
        sim_node("decode") as d0,
        sim_node("decode") as d1,
        sim_node("decode") as d2,
        proxy_in_front_of(p0, p1, d0, d1, d2) as proxy,
    ):
        for _ in range(6):
            assert completion(proxy.url).is_success
        assert [len(node.received()) for node in (p0, p1, d0, d1, d2)] == [3, 3, 2, 2, 2]


def test_the_models_are_the_nodes_models(proxy: Proxy) -> None:
    with openai_client(proxy.url) as client:
        models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert models[0].max_model_len == 2048  # type: ignore[attr-defined]


def test_metrics_count_requests_and_hand_offs_by_what_became_of_them(proxy: Proxy) -> None:
    used = proxy.metric("pd_hand_offs_total", outcome="taken")
    tokens = proxy.metric("pd_hand_off_prompt_tokens_total")
    ok = proxy.metric("pd_requests_total", route="/v1/completions", path="disaggregated", status="200")
    answer = completion(proxy.url)
    assert proxy.metric("pd_hand_offs_total", outcome="taken") == used + 1
    assert proxy.metric("pd_hand_off_prompt_tokens_total") == tokens + answer.json()["usage"]["prompt_tokens"]
    assert proxy.metric("pd_requests_total", route="/v1/completions", path="disaggregated", status="200") == ok + 1
    assert proxy.metric("pd_node_in_flight") == 0


def test_no_client_can_make_new_series(proxy: Proxy) -> None:
    def series() -> set[str]:
        lines = http.get(f"{proxy.url}/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}

    def ask_oddly(word: str) -> None:
        marks = {"x-request-id": word, "x-session-id": word}
        body = {"model": word, "prompt": PROMPT, "user": word}
        assert http.post(f"{proxy.url}/v1/completions", json=body, headers=marks).status_code == 404
        assert http.post(f"{proxy.url}/v1/{word}", json=body, headers=marks).status_code == 404
        assert http.request(word.upper(), f"{proxy.url}/v1/completions", headers=marks).is_client_error

    ask_oddly("first")
    before = series()
    for number in range(20):
        ask_oddly(f"odd{number}")
    assert series() == before


def test_the_openapi_page_has_the_generation_routes(proxy: Proxy) -> None:
    paths = http.get(f"{proxy.url}/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"} <= paths.keys()


def test_the_openapi_page_says_what_an_error_looks_like(proxy: Proxy) -> None:
    paths = http.get(f"{proxy.url}/openapi.json").json()["paths"]
    error = paths["/tokenize"]["post"]["responses"]["default"]["content"]["application/json"]["schema"]
    answer = http.post(f"{proxy.url}/v1/completions", json={"model": "no such model", "prompt": "x"})
    assert answer.status_code == 404
    assert set(error["required"]) <= answer.json().keys()
    assert set(error["properties"]["error"]["required"]) <= answer.json()["error"].keys()
    assert "content" not in paths["/health"]["get"]["responses"]["default"]


def test_no_node_address_is_in_any_answer(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    answers = [completion(proxy.url), chat(proxy.url, stream=True), http.get(f"{proxy.url}/health")]
    for answer in answers:
        shown = f"{answer.headers} {answer.text}"
        assert not any(
            address.rpartition(":")[2] in shown for address in (prefill.url, decode.url, prefill.bootstrap or "-")
        )


def test_concurrent_requests_do_not_mix(prefill: Sim, proxy: Proxy) -> None:
    prompts = [f"prompt number {n}" for n in range(24)]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda prompt: said(completion(proxy.url, prompt=prompt, stream=True)), prompts))
    assert answers == [said(completion(prefill.url, prompt=prompt)) for prompt in prompts]
    assert prefill.kv_usage() == 0


def test_each_step_of_a_request_is_timed_once(proxy: Proxy) -> None:
    series = ("prefill", "hand_off", "time_to_first_event", "request", "mean_inter_token")
    before = {name: proxy.metric(f"pd_{name}_seconds_count") for name in series}
    asked = proxy.metric("pd_node_requests_total")
    assert completion(proxy.url, stream=True).is_success
    assert {name: proxy.metric(f"pd_{name}_seconds_count") - before[name] for name in series} == dict.fromkeys(
        series, 1
    )
    assert proxy.metric("pd_node_requests_total") == asked + 2
