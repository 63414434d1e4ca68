"""Two real prefill nodes: conversations go where they are cached, and what is predicted is what the nodes then say."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launched import RESTART_PATIENCE_S, Up
from tests.processes import http, metric
from tests.versions import VARIABLE

from .conftest import launched
from .test_survival import kill_engine_core

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(VARIABLE in os.environ, reason="routing is no matter of the engine's version"),
]

CHATS = 20
TURNS = 4


@pytest.fixture(scope="module")
def two_prefills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with launched(tmp_path_factory.mktemp("routing"), "--prefill", "2", "--args=--block-size=32", nodes=3) as run:
        yield run


def talk(run: Up, name: str) -> None:
    """A conversation of some turns, each of which says all that was said before."""
    messages = [{"role": "system", "content": f"You are {name}, and answer with care. " * 8}]
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Question {turn} of {name}: what comes after {turn}? " * 6})
        body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
        answer = http.post(f"{run.url}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"] or "-"})


def talk_all(run: Up, names: str) -> dict[str, float]:
    """Conversations, four at a time; how many predictions had which outcome meanwhile."""
    outcomes = ("as-predicted", "less", "more")
    nodes = [name for name in run.health() if name.startswith("prefill")]

    def counted(outcome: str) -> float:
        return sum(metric(run.url, "pd_prefix_predictions_total", node=node, outcome=outcome) for node in nodes)

    before = {outcome: counted(outcome) for outcome in outcomes}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: talk(run, f"{names} {number}"), range(CHATS)))
    return {outcome: counted(outcome) - before[outcome] for outcome in outcomes}


def test_what_is_predicted_is_what_prefill_nodes_say(two_prefills: Up) -> None:
    two_prefills.until_well()
    found = talk_all(two_prefills, "first")
    asked = sum(found.values())
    assert asked >= CHATS * TURNS, "the KV canary may ask, too, while nodes are new"
    assert found["as-predicted"] >= 0.95 * asked, found
    cached = sum(metric(url, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") for url in
                 two_prefills.nodes("prefill"))  # fmt: skip
    computed = sum(metric(url, "vllm:prompt_tokens_by_source_total", source="local_compute") for url in
                   two_prefills.nodes("prefill"))  # fmt: skip
    assert cached > computed, "of four turns, three begin with what was said before"


def test_a_prefill_node_that_comes_back_is_known_to_have_nothing(two_prefills: Up) -> None:
    two_prefills.until_well()
    kill_engine_core(two_prefills.child("prefill-0"))
    two_prefills.until("prefill-0 is ready again.", RESTART_PATIENCE_S)
    two_prefills.until_well()
    found = talk_all(two_prefills, "first")
    assert found["as-predicted"] >= 0.95 * sum(found.values()), found
