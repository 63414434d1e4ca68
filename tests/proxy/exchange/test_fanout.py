"""Several sequences, each handed over by itself, answered as one node answers them; over real sockets."""

from typing import Any

import httpx
import pytest

from tests.processes import MODEL, Proxy, Sim, events, http, proxy_in_front_of, sim_node, wait_until

PROMPT = "the quick brown fox jumps over the lazy dog"


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 6, "temperature": 1, "seed": 3} | fields
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    if "messages" in body:
        del body["prompt"]
    return http.post(f"{url}{path}", json=body, timeout=60)


CASES: dict[str, dict[str, Any]] = {
    "choices": {"n": 3},
    "prompts": {"prompt": ["one prompt", "another, which is longer", "a third"]},
    "prompts and choices": {"prompt": [[1, 2, 3], [4, 5]], "n": 2},
    "a chat": {"messages": [{"role": "user", "content": "hello"}], "n": 3},
    "stop strings and log probabilities": {"n": 2, "stop": ["e"], "logprobs": 1},
    "token ids": {"n": 2, "return_token_ids": True},
    "echo": {"prompt": ["one", "two"], "echo": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_whole_answer_is_the_one_a_node_gives(prefill: Sim, decode: Sim, proxy: Proxy, case: str) -> None:
    answer, alone = ask(proxy.url, **CASES[case]), ask(decode.url, **CASES[case])
    mine, theirs = answer.json(), alone.json()
    for own, other in zip(mine["choices"], theirs["choices"], strict=True):
        assert {key: _shown(own[key]) for key in other} == {key: _shown(value) for key, value in other.items()}
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert mine["usage"][key] == theirs["usage"][key]
    assert mine.keys() >= theirs.keys() - {"ec_transfer_params"}
    assert answer.headers["x-pd-path"] == "disaggregated"
    assert mine["id"].endswith(answer.headers["x-request-id"])
    for node in (prefill, decode):
        node.until_free()


def _shown(value: Any) -> Any:
    """Of a message what is in it: a collected answer says of more fields that they are null."""
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def by_choice(answer: httpx.Response) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for event in events(answer)[:-1]:
        for choice in event["choices"]:
            found.setdefault(choice["index"], []).append(choice)
    return found


@pytest.mark.parametrize("case", CASES)
def test_each_choice_of_a_stream_is_the_one_a_node_streams(decode: Sim, proxy: Proxy, case: str) -> None:
    fields = CASES[case] | {"stream": True, "stream_options": {"include_usage": True}}
    answer, alone = ask(proxy.url, **fields), ask(decode.url, **fields)
    assert by_choice(answer) == by_choice(alone)
    *mine, done = events(answer)
    assert done == "[DONE]"
    counts = [event["usage"]["total_tokens"] for event in (mine[-1], events(alone)[-2])]
    assert counts[0] == counts[1]
    assert {event["id"] for event in mine} == {f"{mine[0]['id'].partition('-')[0]}-{answer.headers['x-request-id']}"}
    assert sum("usage" in event and event["usage"] is not None for event in mine) == 1


def test_one_prompt_is_computed_on_one_node_however_many_choices_there_are() -> None:
    with (
        sim_node("prefill") as first,
        sim_node("prefill") as second,
        sim_node("decode") as decode,
        proxy_in_front_of(first, second, decode) as proxy,
    ):
        proxy.until_usable(3)
        before = len(first.received()), len(second.received())
        assert ask(proxy.url, n=4).is_success
        after = len(first.received()), len(second.received())
        assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 4]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{"n": 2, "temperature": 0}, {"n": "2"}, {"prompt": ["x", "y"], "max_tokens": 10**6}, {"n": 2, "model": "?"}],
)
def test_what_a_node_refuses_is_refused_in_its_words(
    decode: Sim, prefill: Sim, proxy: Proxy, fields: dict[str, Any], *, stream: bool
) -> None:
    answer, alone = ask(proxy.url, stream=stream, **fields), ask(decode.url, stream=stream, **fields)
    assert (answer.status_code, answer.json()) == (alone.status_code, alone.json())
    for node in (prefill, decode):
        node.until_free()


def test_one_prompt_that_is_too_long_refuses_them_all_before_anything_is_streamed(decode: Sim, proxy: Proxy) -> None:
    fields = {"prompt": ["short", [5] * 5000, "short too"], "stream": True, "max_tokens": 400}
    answer, alone = ask(proxy.url, **fields), ask(decode.url, **fields)
    assert alone.status_code == 400
    assert (answer.status_code, answer.json()) == (400, alone.json())


def test_when_a_decode_node_dies_every_choice_goes_on_elsewhere() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as first,
        sim_node("decode") as second,
        proxy_in_front_of(prefill, first, second) as proxy,
    ):
        proxy.until_usable(3)
        fields: dict[str, Any] = {"prompt": ["one prompt", "another"], "max_tokens": 8, "temperature": 0, "seed": None}
        alone = texts(ask(second.url, **fields, stream=True))
        for node in (first, second):
            node.control(fault="drop-after", chunks=3, times=1)
        assert texts(ask(proxy.url, **fields, stream=True)) == alone
        assert proxy.metric("pd_resumed_total", outcome="done") >= 1


def texts(answer: httpx.Response) -> dict[int, str]:
    return {index: "".join(choice["text"] for choice in found) for index, found in by_choice(answer).items()}


def test_a_sequence_that_has_begun_waits_for_the_others_for_as_long_as_they_take() -> None:
    """... and its node, which meanwhile generates, is not late."""
    with (
        sim_node("prefill") as quick,
        sim_node("prefill") as slow,
        sim_node("decode") as decode,
        proxy_in_front_of(quick, slow, decode, flags=["--decode-start-timeout-s", "1"]) as proxy,
    ):
        slow.control(ttft_s=4)
        decode.control(itl_s=0.3)
        answer = ask(proxy.url, prompt=["one prompt", "another"], max_tokens=20, ignore_eos=True, stream=True)
        assert events(answer)[-1] == "[DONE]"
        assert proxy.metric("pd_node_errors_total") == 0
        assert proxy.metric("pd_resumed_total") == 0


def test_several_sequences_of_a_prompt_that_is_too_large_to_be_kept_several_times_go_to_one_node() -> None:
    flags = ["--max-model-len", "100000000"]
    with (
        sim_node("prefill", flags=flags) as prefill,
        sim_node("decode", flags=flags) as decode,
        proxy_in_front_of(prefill, decode, flags=["--max-request-memory-bytes", "200000"]) as proxy,
    ):
        answer = ask(proxy.url, prompt="x" * 50_000, n=3)
        assert answer.headers["x-pd-path"] == "disaggregated"
        answer = ask(proxy.url, prompt="x" * 50_000, n=8)
        assert answer.headers["x-pd-path"] == "aggregated; reason=many-choices"
        assert len(answer.json()["choices"]) == 8
        wait_until(lambda: proxy.metric("pd_request_memory_bytes") == 0, "all memory to be given back")


def test_the_log_has_one_line_and_all_nodes_of_it(proxy: Proxy) -> None:
    before = proxy.metric("pd_requests_total", status="200")
    assert ask(proxy.url, n=3).is_success
    assert proxy.metric("pd_requests_total", status="200") == before + 1
