"""Whatever a client sends: never a 5xx of the proxy's own, never a transfer key at a node."""

from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.processes import Proxy, Sim, http

_OURS = {"do_remote_decode", "do_remote_prefill", "transfer_id", "remote_engine_id", "remote_bootstrap_addr",
         "prompt_token_ids", "remote_prefill_cached_tokens"}  # fmt: skip
_PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"]
_LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
_FIELDS = st.sampled_from(
    ["model", "prompt", "messages", "input", "max_tokens", "max_completion_tokens", "min_tokens", "n", "stream",
     "stream_options", "stop", "stop_token_ids", "temperature", "logprobs", "top_logprobs", "echo", "tools", "seed",
     "logit_bias", "kv_transfer_params", "ec_transfer_params", "prompt_logprobs", "best_of", "use_beam_search"]
)  # fmt: skip


def post(proxy: Proxy, path: str, content: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return http.post(f"{proxy.url}{path}", content=content, headers=headers, timeout=60)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(_PATHS), body=st.dictionaries(_FIELDS, _VALUES, max_size=6))
def test_no_body_makes_the_proxy_fail_or_lets_a_transfer_key_through(
    pair: tuple[Sim, Sim, Proxy], path: str, body: dict[str, Any]
) -> None:
    prefill, decode, proxy = pair
    answer = post(proxy, path, orjson.dumps(body, default=str))
    assert "proxy failed" not in answer.text
    for node in (prefill, decode):
        assert node.process.poll() is None, "a body killed a node"
        for entry in node.received()[-2:]:
            assert "ec_transfer_params" not in entry["body"]
            assert (entry["body"].get("kv_transfer_params") or {}).keys() <= _OURS


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "x", "seed": 99999999999999999999999999}',
        b'{"prompt": "x", "max_tokens": 1e400}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "x"} trailing',
        b"{'prompt': 'x'}",
        b'{"prompt": "x",}',
        b"",
    ],
)
def test_odd_json_is_answered_or_refused_and_never_a_failure(proxy: Proxy, content: bytes) -> None:
    answer = post(proxy, "/v1/completions", content)
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("depth", [200, 300, 900])
def test_json_nested_deeper_than_can_be_written_again_is_a_400(proxy: Proxy, depth: int) -> None:
    answer = post(proxy, "/v1/completions", b'{"prompt": "x", "odd": ' + b"[" * depth + b"]" * depth + b"}")
    assert answer.status_code == (200 if depth < 250 else 400)
    if answer.is_error:
        assert "nested too deeply" in answer.json()["error"]["message"]


def test_of_two_equal_keys_the_last_holds_on_both_legs(prefill: Sim, decode: Sim, proxy: Proxy) -> None:
    content = b'{"prompt": "first", "kv_transfer_params": {"a": 1}, "prompt": "last", "kv_transfer_params": {"a": 2}}'
    assert post(proxy, "/v1/completions", content).status_code == 200
    assert prefill.received()[-1]["body"]["prompt"] == "last"
    assert "a" not in decode.received()[-1]["body"]["kv_transfer_params"]


def test_a_body_above_the_limit_is_a_413(proxy: Proxy) -> None:
    with httpx.Client(timeout=60) as client:
        answer = client.post(
            f"{proxy.url}/v1/completions",
            content=b'{"prompt": "' + b"x" * (65 * 2**20) + b'"}',
            headers={"Content-Type": "application/json"},
        )
    assert answer.status_code == 413
