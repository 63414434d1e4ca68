"""Whatever a node of this version refuses, and whoever leaves it: its engine lives on, and no KV stays behind."""

import contextlib
from typing import Any

import httpx
import pytest

from tests.launched import Up
from tests.processes import http, wait_until

pytestmark = pytest.mark.timeout(1200)

PROMPT = "A request that is refused, or that nobody waits for, ends no engine. " * 4
PATHS = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 4},
}
REFUSED: list[dict[str, Any]] = [
    {"max_tokens": 10**6},
    {"max_tokens": "1000000"},
    {"max_tokens": -1},
    {"max_output_tokens": 10**6},
    {"min_tokens": 50},
    {"logprobs": 10**4, "top_logprobs": 10**4},
    {"stop": [""]},
    {"temperature": -1},
    {"repetition_penalty": -1},
    {"logit_bias": {"99999999": 1}},
    {"allowed_token_ids": [99999999]},
    {"seed": 2**70},
    {"n": 2, "temperature": 0},
]


def ask(run: Up, path: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "temperature": 0, **PATHS[path], **fields}
    return http.post(f"{run.url}{path}", json=body, timeout=60)


def _cases() -> list[Any]:
    """Without the one that breaks a node's own connection (see test_survival.py)."""
    cases = [(path, fields, stream) for path in PATHS for fields in REFUSED for stream in (False, True)]
    cases.remove(("/v1/responses", {"logit_bias": {"99999999": 1}}, True))
    return [pytest.param(*case, id="-".join((case[0], *case[1], "stream" * case[2]))) for case in cases]


@pytest.mark.parametrize(("path", "fields", "stream"), _cases())
def test_a_refusal_ends_no_engine(real_pair: Up, path: str, fields: dict[str, Any], stream: bool) -> None:
    answer = ask(real_pair, path, stream=stream, **fields)
    assert answer.status_code < 500, answer.text
    assert b"EngineDead" not in answer.content
    assert ask(real_pair, path).is_success
    assert all(node["usable"] for node in real_pair.health().values())


@pytest.mark.parametrize("after_s", [0.001, 0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_no_engine(real_pair: Up, after_s: float, *, stream: bool) -> None:
    body = {"model": "tiny", "prompt": PROMPT * 20, "max_tokens": 50, "ignore_eos": True, "stream": stream}
    for _ in range(10):
        with contextlib.suppress(httpx.TimeoutException), httpx.Client(timeout=after_s, trust_env=False) as client:
            client.post(f"{real_pair.url}/v1/completions", json=body)
    assert ask(real_pair, "/v1/completions").is_success
    assert all(node["usable"] for node in real_pair.health().values())


def test_no_node_was_started_again_and_nothing_is_held(real_pair: Up) -> None:
    children = real_pair.status()["children"]
    assert {child["name"]: child["restarts"] for child in children if child["restarts"]} == {}
    wait_until(lambda: real_pair.kv_in_use() == 0, "all KV to be free", patience_s=900)
