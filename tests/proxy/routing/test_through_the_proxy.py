"""Conversations through the proxy itself, in one process and in several, on simulated nodes with a prefix cache."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from engines.sim.timing import Speeds
from tests.parity import MODEL
from tests.processes import Proxy, Sim, proxy_in_front_of, sim_node

CHATS = 12
TURNS = 5
LONG = ("--max-model-len", "20000")


def converse(proxy: Proxy, name: str) -> int:
    """Each turn on a connection of its own, so that any worker may get it. How many tokens its last prompt had."""
    prompt, tokens = "", 0
    for turn in range(TURNS):
        prompt += f"{name}, turn {turn}: " + f"what is said in turn {turn}, and by {name}? " * 20
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
        answer = httpx.post(f"{proxy.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["usage"]["prompt_tokens"]
    return tokens


def computed(*nodes: Sim) -> float:
    return sum(node.metric("vllm:prompt_tokens_by_source_total", source="local_compute") for node in nodes)


def converse_all(policy: str, workers: int, at_once: int) -> tuple[float, float, float]:
    """(tokens that had to be computed, tokens that were, share of predictions that were right)."""
    flags = ["--prefill-policy", policy, *(["--workers", str(workers)] if workers > 1 else [])]
    with (
        sim_node("prefill", flags=LONG) as first,
        sim_node("prefill", flags=LONG) as second,
        sim_node("decode", flags=LONG) as decode,
        proxy_in_front_of(first, second, decode, flags=flags) as proxy,
        ThreadPoolExecutor(at_once) as pool,
    ):
        needed = sum(pool.map(lambda number: converse(proxy, f"chat {number}"), range(CHATS)))
        right = proxy.metric("pd_prefix_predictions_total", outcome="as-predicted")
        asked = proxy.metric("pd_prefix_predictions_total")
        assert min(computed(first), computed(second)) > 0, "both are used"
        return needed, computed(first, second), right / asked if asked else 0.0


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_is_computed_twice_whichever_process_gets_it(workers: int) -> None:
    needed, done, right = converse_all("prefix-cost", workers, at_once=4)
    assert done <= 1.25 * needed
    assert right >= 0.95


SLOW_HAND_OFF = Speeds(prefill_token_s=0.0005, decode_s=0.001, hand_off_s=0.2)


def test_short_prompts_go_alone_where_the_hand_off_is_dear_and_long_ones_never() -> None:
    flags = [*LONG, "--speeds", SLOW_HAND_OFF.model_dump_json()]
    with (
        sim_node("prefill", flags=flags) as prefill,
        sim_node("decode", flags=flags) as decode,
        proxy_in_front_of(prefill, decode, flags=["--split", "when-faster"]) as proxy,
    ):

        def path(words: int) -> str:
            body = {"model": MODEL, "prompt": "word " * words, "max_tokens": 2, "stream": True}
            answer = httpx.post(f"{proxy.url}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            return answer.headers["x-pd-path"]

        assert proxy.health()["split"] == {"crossover_tokens": None}
        for words in (4, 8, 16, 100, 4, 8, 16, 100):
            assert path(words) == "disaggregated", "nothing is known yet"
        assert {path(4) for _ in range(4)} == {"aggregated; reason=faster-alone"}
        assert path(1000) == "disaggregated"
        assert proxy.metric("pd_aggregated_total", reason="faster-alone") == 4
        assert proxy.metric("pd_split_crossover_tokens") == proxy.health()["split"]["crossover_tokens"] > 20


def test_in_turn_nearly_all_is_computed_twice() -> None:
    needed, done, _ = converse_all("round-robin", 1, at_once=1)
    assert done > 1.7 * needed
