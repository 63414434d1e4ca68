"""The KV canary in front of simulated nodes: a pair that gives other answers is found, fenced, told of, and freed."""

import signal
from typing import Any

import pytest

from tests.processes import MODEL, Proxy, http, proxy_in_front_of, sim_node, wait_until

OFTEN = ["--canary-interval-s", "0.2", "--probe-interval-s", "0.2"]
BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}


def canary(proxy: Proxy) -> dict[str, Any]:
    told: dict[str, Any] = proxy.health()["canary"]
    return told


def text(url: str) -> str:
    """What a node says alone."""
    said: str = http.post(f"{url}/v1/completions", json=BODY).json()["choices"][0]["text"]
    return said


def until_same(proxy: Proxy, pairs: int) -> None:
    wait_until(lambda: canary(proxy)["same"] == pairs, f"{pairs} pairs that answer the same")


def test_pairs_that_answer_the_same_are_asked_at_the_start_and_again() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as one,
        sim_node("decode") as other,
        proxy_in_front_of(prefill, one, other, flags=OFTEN) as proxy,
    ):
        until_same(proxy, 2)
        assert proxy.health()["status"] == "ok"
        before = proxy.metric("pd_canaries_total", outcome="same")
        wait_until(lambda: proxy.metric("pd_canaries_total", outcome="same") > before + 4, "further questions")
        assert proxy.metric("pd_requests_total") == 0  # no client's
        assert proxy.metric("pd_pair_fenced") == 0
        salts = [entry["body"]["cache_salt"] for entry in prefill.received()]
        assert len(set(salts)) == len(salts)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pair_that_answers_differently_is_fenced_named_and_freed_when_it_is_well_again(workers: int) -> None:
    flags = [*OFTEN, "--workers", str(workers)]
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as good,
        sim_node("decode") as bad,
        proxy_in_front_of(prefill, good, bad, flags=flags) as proxy,
    ):
        until_same(proxy, 2)
        bad.control(garble_transfers=True)
        wait_until(lambda: all(canary(proxy)["differs"] for _ in range(16)), "the fence, in every worker")
        assert proxy.health()["status"] == "degraded"
        (told,) = canary(proxy)["differs"]
        assert (told["prefill"], told["decode"]) == ("prefill-0", "decode-1")
        assert "nats apart in the mean" in told["problem"]
        assert proxy.metric("pd_pair_fenced", decode="decode-1") == 1
        assert proxy.metric("pd_pair_fenced", decode="decode-0") == 0
        for _ in range(4 * workers):
            wait_until(lambda: proxy.metric("pd_node_in_flight") == 0, "no question of the canary")
            answer = http.post(f"{proxy.url}/v1/completions", json=BODY)
            assert answer.headers["x-pd-path"] == "disaggregated"
            assert answer.json()["choices"][0]["text"] == text(good.url)
        bad.control(garble_transfers=False)
        until_same(proxy, 2)
        wait_until(lambda: proxy.health()["status"] == "ok", "every worker to know")


def test_with_every_pair_fenced_decode_nodes_compute_prompts_themselves() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        decode.control(garble_transfers=True)
        with proxy_in_front_of(prefill, decode, flags=OFTEN) as proxy:
            wait_until(lambda: canary(proxy)["differs"], "the fence")
            answer = http.post(f"{proxy.url}/v1/completions", json=BODY)
            assert answer.headers["x-pd-path"] == "aggregated; reason=no-prefill"
            assert answer.json()["choices"][0]["text"] == text(decode.url)
        decode.control(garble_transfers=True)
        with proxy_in_front_of(prefill, decode, flags=[*OFTEN, "--without-prefill", "refuse"]) as proxy:
            wait_until(lambda: canary(proxy)["differs"], "the fence")
            answer = http.post(f"{proxy.url}/v1/completions", json=BODY)
            assert answer.status_code == 503
            assert "hand-offs with decode-0 are fenced" in answer.json()["error"]["message"]
            assert http.get(f"{proxy.url}/readyz").status_code == 503


def test_one_odd_answer_is_no_difference() -> None:
    """The question is asked once more before a pair is fenced; here the answer is cut short, and then whole."""
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        decode.control(fault="error-first", times=1)
        with proxy_in_front_of(prefill, decode, flags=["--canary-interval-s", "0.2"]) as proxy:
            until_same(proxy, 1)
            assert proxy.metric("pd_canaries_total", outcome="differs") == 0
            assert proxy.metric("pd_canaries_total", outcome="not judged") == 1


def test_a_pair_that_cannot_be_judged_serves_and_says_so() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        decode.control(fault="status", status=400)
        with proxy_in_front_of(prefill, decode, flags=["--canary-interval-s", "300"]) as proxy:
            wait_until(lambda: canary(proxy)["not_judged"], "a verdict")
            assert canary(proxy)["not_judged"][0]["problem"] == "decode-0 answered 400"
            assert proxy.health()["status"] == "ok"
            decode.control(fault=None)
            answer = http.post(f"{proxy.url}/v1/completions", json=BODY)
            assert answer.headers["x-pd-path"] == "disaggregated"


def test_a_node_that_starts_again_is_asked_again() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        flags = ["--canary-interval-s", "3000", "--probe-interval-s", "0.1"]
        with proxy_in_front_of(prefill, decode, flags=flags) as proxy:
            until_same(proxy, 1)
            decode.control(garble_transfers=True)
            decode.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: proxy.health()["status"] == "unavailable", "the node to be missed")
            assert canary(proxy) == {"waiting": 0, "same": 0, "differs": [], "not_judged": []}
            decode.process.send_signal(signal.SIGCONT)
            wait_until(lambda: canary(proxy)["differs"], "the canary's question to the node that came back")
            decode.control(garble_transfers=False)


def test_a_decode_node_that_hangs_keeps_no_other_pair_waiting() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as hanging,
        sim_node("decode") as other,
    ):
        hanging.control(fault="hang")
        with proxy_in_front_of(prefill, hanging, other, flags=OFTEN) as proxy:
            until_same(proxy, 1)
            other.control(garble_transfers=True)
            wait_until(lambda: canary(proxy)["differs"], "the fence")
            assert canary(proxy)["waiting"] == 1
            hanging.process.kill()  # else its question is waited for
            hanging.process.wait()


def test_a_proxy_that_ends_lets_its_question_end_and_leaves_no_kv_behind() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        prefill.control(ttft_s=2)
        with proxy_in_front_of(prefill, decode, flags=["--canary-interval-s", "300"]) as proxy:
            wait_until(lambda: prefill.metric("vllm:num_requests_running") == 1, "the question's prefill")
            proxy.process.terminate()
            proxy.process.wait(60)
        assert prefill.state()["held"] == []
        assert prefill.state()["expired"] == 0


def test_the_canary_can_be_left_out() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode, proxy_in_front_of(prefill, decode) as proxy:
        assert "canary" not in proxy.health()
        assert prefill.received() == []
