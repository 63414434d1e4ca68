"""The simulator treats a hand-off as vLLM 0.32 was seen to do on a live pair."""

import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.processes import PATIENCE_S, Sim, events, http, sim_node, wait_until

PROMPT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def nodes() -> Iterator[tuple[Sim, Sim]]:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        yield prefill, decode


@pytest.fixture
def short_lived() -> Iterator[tuple[Sim, Sim]]:
    """Nodes with a transfer timeout that a test can wait for."""
    with sim_node("prefill", timeout_s=1) as prefill, sim_node("decode", timeout_s=1) as decode:
        yield prefill, decode


def ask(node: Sim, timeout: float = 30, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8} | fields
    return http.post(f"{node.url}/v1/completions", json=body, timeout=timeout)


def prefill_leg(node: Sim, transfer_id: str, **fields: Any) -> httpx.Response:
    params: Any = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    leg: dict[str, Any] = {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": params}
    return ask(node, **(leg | fields))


def decode_params(prefill: Sim, transfer_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": transfer_id,
        "remote_engine_id": prefill.state()["engine_id"],
        "remote_bootstrap_addr": prefill.bootstrap,
    } | changes


def text(answer: httpx.Response) -> str:
    result: str = answer.json()["choices"][0]["text"]
    return result


def test_a_pair_answers_as_one_node_does_and_counts_the_transfer(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    prefill_leg(prefill, "t")
    assert prefill.kv_usage() > 0
    answer = ask(decode, kv_transfer_params=decode_params(prefill, "t"))
    assert text(answer) == text(ask(prefill))
    assert prefill.kv_usage() == decode.kv_usage() == 0
    tokens = answer.json()["usage"]["prompt_tokens"]
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == tokens


def test_nothing_checks_that_kv_and_prompt_belong_together(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    prefill_leg(prefill, "t")
    answer = ask(decode, prompt="quite another prompt", kv_transfer_params=decode_params(prefill, "t"))
    assert answer.is_success
    assert text(answer) != text(ask(prefill, prompt="quite another prompt"))


def test_a_prefill_that_ends_by_eos_holds_nothing(nodes: tuple[Sim, Sim]) -> None:
    prefill, _ = nodes
    answer = prefill_leg(prefill, "t", min_tokens=0, allowed_token_ids=[2])
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert prefill.kv_usage() == 0


def test_a_hand_off_is_single_use(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    prefill_leg(prefill, "t")
    assert ask(decode, kv_transfer_params=decode_params(prefill, "t")).is_success
    with pytest.raises(httpx.ReadTimeout):
        ask(decode, timeout=1, kv_transfer_params=decode_params(prefill, "t"))


def test_an_engine_id_of_an_earlier_life_hangs(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    prefill_leg(prefill, "t")
    stale = decode_params(prefill, "t", remote_engine_id=str(uuid.uuid4()))
    with pytest.raises(httpx.ReadTimeout):
        ask(decode, timeout=1, kv_transfer_params=stale)


def test_a_missing_remote_key_parks_the_request_and_its_blocks(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    params = decode_params(prefill, "t")
    del params["remote_engine_id"]
    with pytest.raises(httpx.ReadTimeout):
        ask(decode, timeout=1, kv_transfer_params=params)
    wait_until(lambda: decode.metric("vllm:num_requests_running") == 0, "the abort")
    assert decode.kv_usage() > 0


def test_a_rejected_decode_frees_the_prefill_nodes_kv(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    prefill_leg(prefill, "t")
    answer = ask(decode, max_tokens=10**6, kv_transfer_params=decode_params(prefill, "t"))
    assert answer.status_code == 400
    wait_until(lambda: prefill.kv_usage() == 0, "the release")


def test_kv_that_nobody_pulls_expires(short_lived: tuple[Sim, Sim]) -> None:
    prefill, _ = short_lived
    prefill_leg(prefill, "t")
    wait_until(lambda: prefill.state()["expired"] == 1, "the expiry")
    assert prefill.kv_usage() == 0


def test_one_transfer_id_for_two_prefills_leaks_the_first(short_lived: tuple[Sim, Sim]) -> None:
    prefill, _ = short_lived
    prefill_leg(prefill, "t", prompt=[PROMPT, PROMPT])
    wait_until(lambda: prefill.state()["expired"] == 1, "the second one's expiry")
    assert prefill.kv_usage() > 0


def test_a_dead_bootstrap_server_leads_to_a_slow_right_answer(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    params = decode_params(prefill, "t", remote_bootstrap_addr="http://127.0.0.1:9")
    assert text(ask(decode, kv_transfer_params=params)) == text(ask(prefill))
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == 0


def test_with_the_policy_fail_it_is_an_error_and_in_a_stream_a_200() -> None:
    params = {"do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "e",
              "remote_bootstrap_addr": "http://127.0.0.1:9"}  # fmt: skip
    with sim_node("decode", policy="fail") as decode:
        assert ask(decode, kv_transfer_params=params).status_code == 500
        stream = ask(decode, stream=True, kv_transfer_params=params)
        assert stream.status_code == 200
        assert "error" in events(stream)[0]


@pytest.mark.parametrize(("role", "key"), [("prefill", "do_remote_prefill"), ("decode", "do_remote_decode")])
def test_parameters_for_the_other_role_kill_the_engine(role: str, key: str) -> None:
    with sim_node(role) as node:
        with pytest.raises(httpx.HTTPError):
            ask(node, kv_transfer_params={key: True})
        assert node.process.wait(timeout=30) == 1


def test_each_start_is_a_new_life() -> None:
    with sim_node("prefill") as first, sim_node("prefill") as second:
        assert first.state()["engine_id"] != second.state()["engine_id"]


def test_it_starts_from_a_vllm_command_line_and_stops_on_sigterm() -> None:
    with sim_node("prefill") as node:
        node.process.terminate()
        assert node.process.wait(timeout=30) in (0, -15)


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"model": "other"}, 404, "does not exist"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": 5}, 400, "valid list"),
        ({"max_tokens": 0}, 400, "at least 1"),
        ({"min_tokens": 9}, 400, "min_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"logprobs": 30}, 400, "logprobs"),
        ({"n": 2}, 400, "greedy"),
        ({"stream_options": {"include_usage": True}}, 400, "stream=True"),
    ],
)
def test_it_refuses_what_vllm_refuses(decode: Sim, fields: dict[str, Any], status: int, says: str) -> None:
    answer = ask(decode, **fields)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == status


def test_a_stream_and_a_whole_answer_say_the_same(decode: Sim) -> None:
    stream = events(ask(decode, stream=True, stream_options={"include_usage": True}))
    whole = ask(decode).json()
    assert "".join(e["choices"][0]["text"] for e in stream[:-2]) == whole["choices"][0]["text"]
    assert stream[-2]["usage"] == whole["usage"]
    assert stream[-1] == "[DONE]"


def test_faults_are_set_and_taken_back_while_it_runs(decode: Sim) -> None:
    decode.control(fault="status", status=503, headers={"Retry-After": "7"}, times=1)
    failed = ask(decode)
    assert (failed.status_code, failed.headers["retry-after"]) == (503, "7")
    assert ask(decode).is_success
    decode.control(fault="drop")
    with pytest.raises(httpx.RemoteProtocolError):
        ask(decode)
    decode.control()
    assert ask(decode).is_success


def test_a_node_can_refuse_connections_and_come_back() -> None:
    with sim_node("decode") as node:
        node.control(refuse_s=1)
        wait_until(lambda: _refuses(node), "the listener to close")
        wait_until(lambda: ask(node).is_success, "the listener to open")


def _refuses(node: Sim) -> bool:
    try:
        http.get(f"{node.url}/health")
    except httpx.ConnectError:
        return True
    return False


def test_twenty_pulls_for_ids_that_never_come_stop_a_node_from_sending_to_anybody(nodes: tuple[Sim, Sim]) -> None:
    prefill, decode = nodes
    prefill_leg(prefill, "t")
    for number in range(20):
        threading.Thread(target=_pull, args=(prefill, f"unknown-{number}"), daemon=True).start()
    wait_until(lambda: prefill.state()["waiting_pulls"] == 20, "the pulls")
    with pytest.raises(httpx.ReadTimeout):
        ask(decode, timeout=1, kv_transfer_params=decode_params(prefill, "t"))


def _pull(prefill: Sim, transfer_id: str) -> None:
    with suppress(httpx.HTTPError):
        http.post(
            f"{prefill.bootstrap}/sim/pull", json={"transfer_id": transfer_id, "engine_id": "e"}, timeout=PATIENCE_S
        )


def test_the_command_line_help_names_its_flags() -> None:
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "engines.sim", "--help"], capture_output=True, text=True, check=True
    )
    assert "--kv-transfer-config" in shown.stdout


def test_a_refusal_that_the_engine_itself_makes_comes_inside_a_stream(nodes: tuple[Sim, Sim]) -> None:
    """... and frees nothing, as seen on a live pair."""
    prefill, decode = nodes
    prefill_leg(prefill, "t")
    refused = ask(decode, stream=True, logprobs=30, kv_transfer_params=decode_params(prefill, "t"))
    assert refused.status_code == 200
    assert events(refused)[0]["error"]["code"] == 400
    assert prefill.kv_usage() > 0


def test_each_rank_holds_its_own_kv() -> None:
    with sim_node("prefill", flags=["--data-parallel-size", "2"]) as prefill, sim_node("decode") as decode:
        query = http.get(f"{prefill.bootstrap}/query").json()
        assert sorted(query) == ["0", "1"]
        params = {"do_remote_decode": True, "transfer_id": "t"}
        body = {"prompt": PROMPT, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": params}
        http.post(f"{prefill.url}/v1/completions", json=body, headers={"X-data-parallel-rank": "1"})
        wrong = decode_params(prefill, "t", remote_engine_id=query["0"]["engine_id"])
        with pytest.raises(httpx.ReadTimeout):
            ask(decode, timeout=1, kv_transfer_params=wrong)
        right = decode_params(prefill, "t", remote_engine_id=query["1"]["engine_id"])
        assert ask(decode, kv_transfer_params=right).is_success


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/v1/responses", {"input": "hello there", "max_output_tokens": 4}, '"max_output_tokens"'),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}, '"max_tokens"'),
    ],
)
def test_responses_and_messages_end_by_their_own_word_for_length(
    decode: Sim, path: str, body: dict[str, Any], word: str
) -> None:
    assert word in http.post(f"{decode.url}{path}", json=body | {"temperature": 0}).text
    assert http.post(f"{decode.url}{path}", json={"model": "tiny"}).status_code == 400
