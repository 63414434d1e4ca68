"""Two real nodes that do both: KV moves in both directions at once, and a death loses no request."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.launched import RESTART_PATIENCE_S, Up
from tests.processes import free_port, http, metric, running, wait_until
from tests.versions import VARIABLE

from .conftest import launched
from .test_survival import kill_engine_core

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(VARIABLE in os.environ, reason="roles are no matter of the engine's version"),
]

EACH_WAY = 20
PROMPT = "What one node has computed another goes on from, and the other way round at the same time. "


@pytest.fixture(scope="module")
def two_that_do_both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with launched(
        tmp_path_factory.mktemp("both-roles"), "--both", "2", "--prefill", "0", "--decode", "0", nodes=2
    ) as run:
        run.until_well()
        yield run


def ask(url: str, number: int) -> httpx.Response:
    body = {"model": "tiny", "prompt": f"{number} {PROMPT * (1 + number % 3)}", "max_tokens": 12, "temperature": 0}
    return http.post(f"{url}/v1/completions", json=body, timeout=300)


def text(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def told_nodes(run: Up) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = json.loads((Path(run.run_dir) / "topology.json").read_text())["nodes"]
    return nodes


def one_way(stack: ExitStack, prefill: dict[str, Any], decode: dict[str, Any]) -> str:
    """A proxy of its own that hands over from one to the other only."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "proxy.cli", "--port", str(port), "--canary-interval-s", "0"]
    command += ["--prefill", prefill["url"], prefill["bootstrap"].rpartition(":")[2], "--decode", decode["url"]]
    stack.enter_context(running(command))
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: http.get(f"{url}/readyz").is_success and http.get(f"{url}/health").json()["status"] == "ok", url)
    return url


def moved(nodes: list[dict[str, Any]]) -> list[float]:
    series = "vllm:prompt_tokens_by_source_total"
    return [metric(node["url"], series, source="external_kv_transfer") for node in nodes]


def test_kv_moves_in_both_directions_at_once_and_is_the_right_one(two_that_do_both: Up) -> None:
    first, second = nodes = told_nodes(two_that_do_both)
    reference = [text(ask(first["url"], number)) for number in range(EACH_WAY)]
    before = moved(nodes)
    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        there, back = one_way(stack, first, second), one_way(stack, second, first)
        interleaved = list(chain.from_iterable(((there, number), (back, number)) for number in range(EACH_WAY)))
        answers = list(pool.map(lambda one: ask(*one), interleaved))
        assert {answer.headers["x-pd-path"] for answer in answers} == {"disaggregated"}
    assert [text(answer) for answer in answers] == [reference[number] for _, number in interleaved]
    tokens = sum(answer.json()["usage"]["prompt_tokens"] for answer in answers[::2])
    wait_until(lambda: [now - then for now, then in zip(moved(nodes), before, strict=True)] == [tokens] * 2, "all KV")
    wait_until(lambda: two_that_do_both.kv_in_use() == 0, "all KV to be free")


def test_the_proxy_hands_over_between_them_and_knows_what_each_is_asked_for_first(two_that_do_both: Up) -> None:
    assert ask(two_that_do_both.url, 1).headers["x-pd-path"] == "disaggregated"
    leanings = {name: node["leaning"] for name, node in two_that_do_both.health().items()}
    assert leanings == {"both-0": "prefill", "both-1": "decode"}


def test_every_request_is_answered_right_while_one_dies_and_comes_back(two_that_do_both: Up) -> None:
    run, name = two_that_do_both, "both-1"
    run.until_well()
    reference = [text(ask(run.url, number)) for number in range(12)]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, run.url, number % 12) for number in range(60)]
        wait_until(answers[5].done, "some answers")
        kill_engine_core(run.child(name))
        found = [text(answer.result()) for answer in answers]
    assert found == [reference[number % 12] for number in range(60)]
    run.until(f"{name} is ready again.", RESTART_PATIENCE_S)
    run.until_well()
    wait_until(lambda: ask(run.url, 1).headers["x-pd-path"] == "disaggregated", "hand-offs again")
