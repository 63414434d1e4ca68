"""Decode nodes of a vLLM that dies of refusing a hand-off get none that they may refuse; simulated ones die, too."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node

OLD = ["--as-version", "0.31.0"]


@pytest.fixture(scope="module")
def old_prefill() -> Iterator[Sim]:
    with sim_node("prefill", flags=OLD) as node:
        yield node


@pytest.fixture(scope="module")
def old_decode() -> Iterator[Sim]:
    with sim_node("decode", flags=OLD) as node:
        yield node


@pytest.fixture(scope="module")
def old_pair(old_prefill: Sim, old_decode: Sim) -> Iterator[Proxy]:
    with proxy_in_front_of(old_prefill, old_decode) as proxy:
        proxy.until_usable(2)
        yield proxy


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "a prompt that is long enough", "max_tokens": 4} | fields
    return http.post(f"{url}/v1/completions", json=body, timeout=60)


def test_a_node_of_that_version_dies_of_it() -> None:
    """Else the tests below prove nothing."""
    with sim_node("prefill", flags=OLD), sim_node("decode", flags=OLD) as decode:
        params = {
            "do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "e", "remote_bootstrap_addr": "http://x",
        }  # fmt: skip
        with pytest.raises(httpx.TransportError):
            ask(decode.url, max_tokens=10**6, kv_transfer_params=params)
        decode.process.wait(60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 10**6}, {"max_tokens": -1}, {"min_tokens": 50}, {"logprobs": 50}, {"temperature": -1},
        {"model": "other"},
    ],
)  # fmt: skip
def test_it_refuses_in_its_own_words_and_lives_on(
    old_pair: Proxy, old_decode: Sim, fields: dict[str, Any], *, stream: bool
) -> None:
    answer, alone = ask(old_pair.url, stream=stream, **fields), ask(old_decode.url, stream=stream, **fields)
    assert answer.status_code == 400 if alone.is_success else alone.status_code
    assert old_decode.process.poll() is None
    assert ask(old_pair.url).headers["x-pd-path"] == "disaggregated"


def test_what_shapes_the_output_is_judged_by_the_prefill_node(old_pair: Proxy, old_prefill: Sim) -> None:
    assert ask(old_pair.url, stop=["zzz"], logprobs=2, seed=3).headers["x-pd-path"] == "disaggregated"
    body = old_prefill.received()[-1]["body"]
    assert (body["stop"], body["logprobs"], body["seed"]) == (["zzz"], 2, 3)


def test_kv_that_nobody_takes_expires_there(old_pair: Proxy, old_prefill: Sim, old_decode: Sim) -> None:
    """A release is a refusal."""
    old_decode.control(fault="drop", times=1)
    ask(old_pair.url)
    old_prefill.until_free()
    assert old_decode.process.poll() is None
