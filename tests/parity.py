"""What every pair must do, simulated or real: imported by `tests/proxy` and `tests/e2e`, each with its own `system`.

The rule is parity: through the proxy a request is answered as one node alone would answer it; and afterwards neither
node holds any KV.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from tests.processes import events, http, metric, openai_client, wait_until

MODEL = "tiny"
PROMPT = "Prefill computes the KV cache of a prompt, and decode generates from it. " * 4
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello, what is it?"}],
    "max_tokens": 12,
    "temperature": 0,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
DISAGGREGATED = "disaggregated"


@dataclass(frozen=True)
class System:
    """A pair of nodes and the proxy in front."""

    proxy: str
    prefill: str
    decode: str
    eos: int
    token_ids: list[int]
    """A prompt in the model's own tokens."""

    def kv_in_use(self) -> float:
        return sum(metric(url, "vllm:kv_cache_usage_perc") for url in (self.prefill, self.decode))

    def transferred(self) -> float:
        return metric(self.decode, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")

    def until_free(self) -> None:
        wait_until(lambda: self.kv_in_use() == 0, "both nodes' KV to be free")


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Any:
    yield
    if "system" in request.fixturenames:
        request.getfixturevalue("system").until_free()


def post(url: str, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return http.post(f"{url}{path}", json=body, timeout=120, **options)


def path_of(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def choices(answer: httpx.Response) -> list[tuple[str, Any, Any]]:
    """(text, finish reason, stop reason) of every choice, from a whole answer or a stream."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("application/json"):
        found = [(c.get("text", c.get("message", {}).get("content")), c) for c in answer.json()["choices"]]
        return [(text, c["finish_reason"], c.get("stop_reason")) for text, c in found]
    assert events(answer)[-1] == "[DONE]"
    merged: dict[int, list[Any]] = {}
    for event in events(answer)[:-1]:
        for c in event["choices"]:
            choice = merged.setdefault(c["index"], ["", None, None])
            choice[0] += c["delta"].get("content") or "" if "delta" in c else c["text"]
            choice[1] = c.get("finish_reason") or choice[1]
            choice[2] = c.get("stop_reason") or choice[2]
    return [(text, finish, stop) for _, (text, finish, stop) in sorted(merged.items())]


SAME_AS_ONE_NODE: dict[str, tuple[dict[str, Any], str]] = {
    "completion": (COMPLETION, DISAGGREGATED),
    "completion, no model named": ({key: COMPLETION[key] for key in COMPLETION if key != "model"}, DISAGGREGATED),
    "completion, one token": (COMPLETION | {"max_tokens": 1}, DISAGGREGATED),
    "completion, a prompt of one character": (COMPLETION | {"prompt": "x"}, DISAGGREGATED),
    "completion, non-ASCII": (COMPLETION | {"prompt": "Grüße \U0001f600 漢字"}, DISAGGREGATED),
    "completion, stop string": (COMPLETION | {"stop": ["e", " the"]}, DISAGGREGATED),
    "completion, min_tokens": (COMPLETION | {"min_tokens": 10}, DISAGGREGATED),
    "completion, ignore_eos": (COMPLETION | {"ignore_eos": True, "max_tokens": 60}, DISAGGREGATED),
    "completion, logprobs": (COMPLETION | {"logprobs": 2}, DISAGGREGATED),
    "completion, echo": (COMPLETION | {"echo": True}, DISAGGREGATED),
    "completion, echo and logprobs": (COMPLETION | {"echo": True, "logprobs": 1}, "prompt-logprobs"),
    "completion, prompt logprobs": (COMPLETION | {"prompt_logprobs": 1}, "prompt-logprobs"),
    "completion, list of prompts": (COMPLETION | {"prompt": [PROMPT, "another"]}, DISAGGREGATED),
    "completion, prompts of token ids, twice each": (
        COMPLETION | {"prompt": [[5, 6, 7], [8, 9]], "n": 2, "temperature": 1.0, "seed": 7},
        DISAGGREGATED,
    ),
    "completion, penalties": (COMPLETION | {"presence_penalty": 0.5, "frequency_penalty": 0.5}, DISAGGREGATED),
    "completion, structured": (
        COMPLETION | {"structured_outputs": {"regex": "[a-c]{4}"}, "max_tokens": 20},
        DISAGGREGATED,
    ),
    "completion, seeded sample": (COMPLETION | {"temperature": 1.0, "seed": 7}, DISAGGREGATED),
    "chat": (CHAT, DISAGGREGATED),
    "chat, max_completion_tokens": (
        {key: CHAT[key] for key in CHAT if key != "max_tokens"} | {"max_completion_tokens": 9, "min_tokens": 9},
        DISAGGREGATED,
    ),
    "chat, content in parts": (
        CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
        DISAGGREGATED,
    ),
    "chat, tools in the prompt": (CHAT | {"tools": [WEATHER], "tool_choice": "none"}, DISAGGREGATED),
    "chat, logprobs": (CHAT | {"logprobs": True, "top_logprobs": 2}, DISAGGREGATED),
    "chat, continued": (
        CHAT
        | {
            "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
        DISAGGREGATED,
    ),
    "chat, echo": (
        CHAT
        | {
            "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "echo": True,
        },
        DISAGGREGATED,
    ),
    "chat, two choices": (CHAT | {"n": 2, "temperature": 0.7, "seed": 5}, DISAGGREGATED),
}


def _with_and_without_stream() -> list[Any]:
    cases = [(case, stream) for case in SAME_AS_ONE_NODE for stream in (False, True)]
    cases.remove(("completion, prompt logprobs", True))  # no node streams them
    cases.remove(("chat, echo", True))  # nor this: vLLM 0.32 fails at its own second event
    return [pytest.param(case, stream, id=f"{case}-{'stream' if stream else 'whole'}") for case, stream in cases]


@pytest.mark.parametrize(("case", "stream"), _with_and_without_stream())
def test_an_answer_is_the_one_a_node_alone_would_give(system: System, case: str, stream: bool) -> None:
    body, expected = SAME_AS_ONE_NODE[case]
    body = body | {"stream": stream}
    answer = post(system.proxy, path_of(body), body)
    alone = post(system.prefill, path_of(body), body)
    assert choices(answer) == choices(alone)
    taken = DISAGGREGATED if expected == DISAGGREGATED else f"aggregated; reason={expected}"
    assert answer.headers["x-pd-path"] == taken
    if not stream:
        mine, theirs = answer.json()["usage"], alone.json()["usage"]
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [mine[key] for key in counts] == [theirs[key] for key in counts]


def test_a_prompt_of_token_ids(system: System) -> None:
    body = COMPLETION | {"prompt": system.token_ids}
    before = system.transferred()
    answer = post(system.proxy, "/v1/completions", body)
    assert choices(answer) == choices(post(system.prefill, "/v1/completions", body))
    wait_until(lambda: system.transferred() == before + len(system.token_ids), "the transfer to be counted")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("base", [COMPLETION, CHAT], ids=["completion", "chat"])
def test_eos_or_a_stop_id_as_the_first_token_ends_the_answer_there(
    system: System, base: dict[str, Any], stream: bool
) -> None:
    for first in ({"logit_bias": {str(system.eos): 100}}, {"allowed_token_ids": [9], "stop_token_ids": [9]}):
        body = base | first | {"stream": stream}
        ended = choices(post(system.proxy, path_of(body), body))
        assert ended == choices(post(system.prefill, path_of(body), body))
        assert ended[0][1] == "stop"


def test_what_return_token_ids_adds_is_shown_to_who_asked_and_to_nobody_else(system: System) -> None:
    asked = post(system.proxy, "/v1/completions", COMPLETION | {"return_token_ids": True}).json()["choices"][0]
    alone = post(system.prefill, "/v1/completions", COMPLETION | {"return_token_ids": True}).json()["choices"][0]
    assert (asked["prompt_token_ids"], asked["token_ids"]) == (alone["prompt_token_ids"], alone["token_ids"])
    silent = post(system.proxy, "/v1/completions", COMPLETION).json()["choices"][0]
    assert (silent.get("prompt_token_ids"), silent.get("token_ids")) == (None, None)
    chat = post(system.proxy, "/v1/chat/completions", CHAT | {"return_token_ids": True}).json()
    assert chat["prompt_token_ids"] == post(system.prefill, "/v1/chat/completions", CHAT | {"return_token_ids": True}
                                            ).json()["prompt_token_ids"]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_usage_is_one_nodes_and_counts_no_transferred_token_as_cached(system: System, path: str, stream: bool) -> None:
    words = f"{stream}, {path}: these words were never sent before; " * 3
    said, counted = [{"role": "user", "content": words}], {"stream_options": {"include_usage": True}} if stream else {}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": words, "max_tokens": 8} | counted,
        "/v1/chat/completions": {"messages": said, "max_tokens": 8} | counted,
        "/v1/responses": {"input": words, "max_output_tokens": 8},
        "/v1/messages": {"messages": said, "max_tokens": 8},
    }
    body = bodies[path] | {"model": MODEL, "temperature": 0, "stream": stream}
    answer = post(system.proxy, path, body)
    assert answer.headers["x-pd-path"] == "disaggregated"
    assert _usage(answer) == _usage(post(system.decode, path, body))


def _usage(answer: httpx.Response) -> dict[str, Any]:
    """The last that an answer says of its tokens. A stream leaves out what is null, and a whole answer does not."""
    told = [answer.json()] if answer.headers["content-type"].startswith("application/json") else _data(answer)
    usages = [each.get("usage") or each.get("response", {}).get("usage") for each in told]
    return _without_nulls([usage for usage in usages if usage][-1])


def _without_nulls(usage: dict[str, Any]) -> dict[str, Any]:
    said = {name: value for name, value in usage.items() if value is not None}
    return {name: _without_nulls(value) if isinstance(value, dict) else value for name, value in said.items()}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_responses_and_messages_are_handed_over_too(system: System, path: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": MODEL, "temperature": 0, "stream": stream}
    if path == "/v1/responses":
        body |= {"input": "hello there", "max_output_tokens": 8}
    else:
        body |= {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8}
    answer, alone = post(system.proxy, path, body), post(system.prefill, path, body)
    assert answer.headers["x-pd-path"] == "disaggregated"
    assert _said(path, answer) == _said(path, alone) != ""


def _said(path: str, answer: httpx.Response) -> str:
    """The text of an answer on these two routes."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("application/json"):
        whole = answer.json()
        parts = whole["content"] if path == "/v1/messages" else whole["output"][-1]["content"]
        return "".join(part["text"] for part in parts)
    deltas = _data(answer)
    if path == "/v1/messages":
        found = [d["delta"].get("text", "") for d in deltas if d["type"] == "content_block_delta"]
    else:
        found = [d["delta"] for d in deltas if d["type"] == "response.output_text.delta"]
    return "".join(found)


def _data(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


REFUSED: dict[str, dict[str, Any]] = {
    "unknown model": COMPLETION | {"model": "other"},
    "negative temperature": COMPLETION | {"temperature": -1},
    "too many tokens": COMPLETION | {"max_tokens": 10**6},
    "a prompt that is too long": COMPLETION | {"prompt": "word " * 5000},
    "no prompt": {"model": MODEL},
    "an empty prompt": COMPLETION | {"prompt": ""},
    "a prompt that is a number": COMPLETION | {"prompt": 5},
    "a prompt of mixed types": COMPLETION | {"prompt": ["x", 1]},
    "min_tokens above max_tokens": COMPLETION | {"min_tokens": 50},
    "max_tokens 0": COMPLETION | {"max_tokens": 0},
    "too many logprobs": COMPLETION | {"logprobs": 30},
    "two greedy choices": COMPLETION | {"n": 2},
    "an absurd number of choices": COMPLETION | {"n": 10**9, "temperature": 1},
    "stream options without a stream": COMPLETION | {"stream_options": {"include_usage": True}},
    "no messages": CHAT | {"messages": []},
    "messages that are a string": CHAT | {"messages": "x"},
    "max_tokens that is a text": CHAT | {"max_tokens": "many"},
    "a 64-bit seed and more": COMPLETION | {"max_tokens": 2**70},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_node_refuses_is_refused_with_its_status(system: System, case: str, stream: bool) -> None:
    body = REFUSED[case] | ({"stream": True} if stream and "stream_options" not in REFUSED[case] else {})
    answer = post(system.proxy, path_of(body), body)
    # Asked for a whole answer: a node itself may say 200 to a stream, and the refusal in its first event.
    alone = post(system.decode, path_of(body), REFUSED[case])
    assert answer.status_code == alone.status_code
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["code"] == answer.status_code
    assert answer.json()["error"]["message"]


def test_a_clients_transfer_parameters_do_no_harm(system: System) -> None:
    evils: list[Any] = [{"do_remote_prefill": True}, {"do_remote_decode": True, "transfer_id": "t"}, [], "x", {"a": 1}]
    for evil in evils:
        body = COMPLETION | {"kv_transfer_params": evil, "ec_transfer_params": evil}
        assert choices(post(system.proxy, "/v1/completions", body)) == choices(
            post(system.prefill, "/v1/completions", COMPLETION)
        )


def test_thirty_two_at_once_do_not_mix(system: System) -> None:
    bodies = [COMPLETION | {"prompt": f"prompt {n}: {PROMPT}", "stream": n % 2 == 0} for n in range(32)]
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda body: choices(post(system.proxy, "/v1/completions", body)), bodies))
    assert answers == [choices(post(system.prefill, "/v1/completions", body)) for body in bodies]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_clients_that_leave_at_any_moment_leave_nothing_behind(system: System, stream: bool) -> None:
    for step in range(6):
        body = COMPLETION | {"prompt": f"{step} {PROMPT * 4}", "max_tokens": 400, "ignore_eos": True, "stream": stream}
        with suppress(httpx.ReadTimeout):
            _leave_after(system, body, 0.02 * 2**step)
    system.until_free()
    wait_until(
        lambda: (
            metric(system.prefill, "vllm:num_requests_running") + metric(system.decode, "vllm:num_requests_running")
            == 0
        ),
        "both nodes to be idle",
    )
    assert choices(post(system.proxy, "/v1/completions", COMPLETION)) == choices(
        post(system.prefill, "/v1/completions", COMPLETION)
    )


def _leave_after(system: System, body: dict[str, Any], seconds: float) -> None:
    timeout = httpx.Timeout(60, read=seconds)
    with http.stream("POST", f"{system.proxy}/v1/completions", json=body, timeout=timeout) as answer:
        next(answer.iter_raw(), None)


def test_the_openai_clients_own_streaming_helper_runs_clean(system: System) -> None:
    asked: Any = {"model": MODEL, "messages": CHAT["messages"], "max_tokens": 8, "temperature": 0}
    asked["stream_options"] = {"include_usage": True}
    with openai_client(system.proxy) as client, client.chat.completions.stream(**asked) as stream:
        kinds: list[str] = []
        try:
            kinds.extend(event.type for event in stream)
            final: Any = stream.get_final_completion()
        except openai.LengthFinishReasonError as exc:  # its way to say that max_tokens ended the answer
            final = exc.completion
    assert {"content.delta", "chunk"} <= set(kinds)
    assert final.usage is not None
    assert final.usage.completion_tokens <= 8
    assert final.choices[0].message.content


def test_routes_that_one_node_answers(system: System) -> None:
    ids: Callable[[str], Any] = lambda url: post(url, "/tokenize", {"model": MODEL, "prompt": "hello"}).json()["tokens"]  # noqa: E731
    assert ids(system.proxy) == ids(system.decode)
    text = post(system.proxy, "/detokenize", {"model": MODEL, "tokens": ids(system.proxy)}).json()["prompt"]
    assert text == "hello"
    assert http.get(f"{system.proxy}/version").json() == http.get(f"{system.decode}/version").json()


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/rerank", "/score", "/v1/nothing", "/sleep", "/scale_elastic_ep", "/abort_requests",
             "/collective_rpc", "/v1//completions", "/V1/completions", "/reset_prefix_cache", "/sim"]
)  # fmt: skip
def test_what_no_node_serves_or_no_client_may_reach_is_a_404_in_openais_shape(system: System, path: str) -> None:
    answer = post(system.proxy, path, {"model": MODEL, "input": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == 404
