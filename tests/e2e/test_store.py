"""A real pair that hands KV over through mooncake_master's shared store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import START_PATIENCE_S
from tests.launched import Up, run_to_end, up
from tests.processes import free_range, http, metric, wait_until

pytestmark = pytest.mark.timeout(1200)

BLOCK_TOKENS = 128
LONG = "Prefill saves the KV cache of a prompt to the store, and decode finds it by its content. " * 12


@pytest.fixture(scope="module")
def store_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    flags = ["--model", "tiny", "--connector", "MooncakeStoreConnector", "--store-ports", free_range(2),
             "--store-client-ports", free_range(64)]  # fmt: skip
    with up(tmp_path_factory.mktemp("store"), *flags) as run:
        run.until("Ready:", START_PATIENCE_S)
        yield run
        if run.process.poll() is None:
            assert run.end() == 0
    assert "Killed what was left" not in run.output


def complete(url: str, prompt: str) -> Any:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    answer = http.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_long_prompts_come_out_of_the_store_and_the_answer_is_the_prefill_nodes_own(store_pair: Up) -> None:
    decode, prefill = store_pair.nodes("decode")[0], store_pair.nodes("prefill")[0]

    def moved() -> float:
        return metric(decode, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")

    before = moved()
    for number in range(4):  # saving is asynchronous: a prompt or two may come too early
        prompt = f"{number} {LONG}"
        answer = complete(store_pair.url, prompt)
        assert answer["choices"][0]["text"] == complete(prefill, prompt)["choices"][0]["text"]
    wait_until(lambda: moved() >= before + BLOCK_TOKENS, "blocks from the store")


def test_the_run_has_the_stores_log_and_configuration(store_pair: Up) -> None:
    names = {path.name for path in Path(store_pair.run_dir).iterdir()}
    assert {"store.log", "mooncake.json"} <= names
    assert "KV moved" in store_pair.output


def test_a_store_that_is_killed_ends_the_run_and_is_named_as_the_cause(store_pair: Up) -> None:
    """What the nodes share is gone with it; a new one would be empty, and unknown to them."""
    children = store_pair.descendants()
    (master,) = (child for child in children if child.name() == "mooncake_master")
    master.kill()
    assert store_pair.process.wait(120) == 1
    assert "store ended: killed by SIGKILL" in store_pair.output
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(scope="module")
def both_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    flags = ["--model", "tiny", "--connector", "MultiConnector", "--store-ports", free_range(2),
             "--store-client-ports", free_range(64)]  # fmt: skip
    with up(tmp_path_factory.mktemp("both"), *flags) as run:
        run.until("Ready:", START_PATIENCE_S)
        yield run
        assert run.end() == 0
    said = run_to_end(["doctor", str(run.run_dir)]).stdout
    assert said.startswith("Nothing known to be wrong"), said


def test_direct_hand_off_and_store_together_count_every_token_and_outlive_their_first_transfer(both_pair: Up) -> None:
    """VLLM's own MooncakeConnector in a MultiConnector kills the API server just after its first transfer."""
    decode, prefill = both_pair.nodes("decode")[0], both_pair.nodes("prefill")[0]
    before = metric(decode, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
    tokens = 0
    for number in range(4):
        prompt = f"{number} {LONG}"
        answer = complete(both_pair.url, prompt)
        tokens += answer["usage"]["prompt_tokens"]
        assert answer["choices"][0]["text"] == complete(prefill, prompt)["choices"][0]["text"]

    def moved() -> float:
        return metric(decode, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer") - before

    wait_until(lambda: moved() == tokens, "every prompt token to be counted")
    assert "ended" not in both_pair.output


def test_store_and_hand_off_leave_no_kv_held(both_pair: Up) -> None:
    for role in ("prefill", "decode"):
        url = both_pair.nodes(role)[0]
        wait_until(lambda url=url: metric(url, "vllm:kv_cache_usage_perc") == 0, "KV to be free")  # type: ignore[misc]
