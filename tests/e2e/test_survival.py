"""Real engines die, hang and come back under running requests."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import openai
import psutil
import pytest

from tests.launched import RESTART_PATIENCE_S, Up
from tests.processes import http, metric, openai_client, wait_until

from .conftest import TRIO_TRANSFER_S

pytestmark = pytest.mark.timeout(1200)

PROMPT = "When a node dies in the middle of an answer, somebody must go on with it. " * 4
TOKENS = 900
"""Enough that a stream still runs when its node is found and stopped, on a machine that is busy."""
Kill = Callable[[psutil.Process], None]


def kill_engine_core(node: psutil.Process) -> None:
    """The API server lives on for a moment, and tells its streams so."""
    core = next(child for child in node.children(recursive=True) if "EngineCore" in " ".join(child.cmdline()))
    core.kill()


def kill_api_server(node: psutil.Process) -> None:
    node.kill()


def stop_all_of_it(node: psutil.Process) -> None:
    """Nothing dies, nothing answers; the connection stays."""
    for process in (*node.children(recursive=True), node):
        process.send_signal(signal.SIGSTOP)


def wake(node: psutil.Process) -> None:
    """Whether it was stopped or is dead: the tests that come after must not find it stopped."""
    with suppress(psutil.NoSuchProcess):
        for process in (node, *node.children(recursive=True)):
            process.send_signal(signal.SIGCONT)


def stream(client: openai.OpenAI, route: str) -> Any:
    asked: Any = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    asked["extra_body"] = {"ignore_eos": True}
    asked["stream_options"] = {"include_usage": True}
    if route == "completions":
        return client.completions.create(prompt=PROMPT, **asked)
    return client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **asked)


def text_of(chunk: Any) -> str:
    if not chunk.choices:
        return ""
    choice = chunk.choices[0]
    return (choice.text if hasattr(choice, "text") else choice.delta.content) or ""


def the_busy_one(trio: Up) -> str | None:
    """The decode node with the stream: the KV canary's question to the other one, if there is any, ends at once."""
    busy = [name for name, node in trio.health().items() if node["role"] == "decode" and node["in_flight"]]
    return busy[0] if len(busy) == 1 else None


def test_a_stream_that_the_engine_refuses_after_it_has_begun_leaves_no_kv_behind(real_trio: Up) -> None:
    """VLLM begins a stream of responses before its engine has the request; what that refuses breaks the connection."""
    body = {"model": "tiny", "input": PROMPT, "stream": True, "logit_bias": {"99999999": 1}}
    answer = http.post(f"{real_trio.url}/v1/responses", json=body, timeout=120)
    assert answer.status_code == 502
    assert metric(real_trio.url, "pd_hand_offs_total", outcome="unknown") == 0
    wait_until(lambda: real_trio.kv_in_use() == 0, "all KV to be free")
    real_trio.until_well()


@pytest.mark.parametrize(
    ("route", "kill"),
    [("completions", kill_engine_core), ("chat", stop_all_of_it)],
    ids=["engine core killed", "all of it stopped"],
)
def test_a_stream_outlives_its_decode_node_and_says_the_same(real_trio: Up, route: str, kill: Kill) -> None:
    real_trio.until_well()
    resumed = metric(real_trio.url, "pd_resumed_total", outcome="done")
    with openai_client(real_trio.url) as client:
        undisturbed = list(stream(client, route))
        broken = stream(client, route)
        chunks = [next(broken) for _ in range(5)]
        name = wait_until(lambda: the_busy_one(real_trio), "one decode node alone to be busy")
        victim = real_trio.child(name)
        kill(victim)
        try:
            chunks += list(broken)
        finally:
            wake(victim)
    counted = "the resume to be counted, which is after the client has its last byte"
    wait_until(lambda: metric(real_trio.url, "pd_resumed_total", outcome="done") > resumed, counted)
    assert "".join(map(text_of, chunks)) == "".join(map(text_of, undisturbed))
    assert chunks[-1].usage.completion_tokens == TOKENS
    assert chunks[-1].usage.prompt_tokens == undisturbed[-1].usage.prompt_tokens
    if kill is not stop_all_of_it:
        real_trio.until(f"{name} is ready again.", RESTART_PATIENCE_S)
    real_trio.until_well()


def test_requests_are_answered_while_the_prefill_node_dies_and_comes_back_with_a_new_identity(real_trio: Up) -> None:
    real_trio.until_well()
    unknown = metric(real_trio.url, "pd_hand_offs_total", outcome="unknown")
    statuses: list[tuple[int, str]] = []
    enough = threading.Event()

    def ask_for_ever() -> None:
        number = 0
        while not enough.is_set():
            number += 1
            body = {"model": "tiny", "prompt": f"{number} {PROMPT}", "max_tokens": 4}
            answer = http.post(f"{real_trio.url}/v1/completions", json=body, timeout=300)
            statuses.append((answer.status_code, answer.headers.get("x-pd-path", "")))
            time.sleep(0.05)

    asking = threading.Thread(target=ask_for_ever)
    asking.start()
    try:
        wait_until(lambda: len(statuses) > 3, "some answers")
        kill_api_server(real_trio.child("prefill-0"))
        real_trio.until("prefill-0 is ready again.", RESTART_PATIENCE_S)
        real_trio.until_well()
        seen = len(statuses)
        wait_until(lambda: len(statuses) > seen + 5, "some answers", RESTART_PATIENCE_S)
    finally:
        enough.set()
        asking.join()
    assert {status for status, _ in statuses} == {200}
    assert statuses[0][1] == statuses[-1][1] == "disaggregated"
    assert any(path.startswith("aggregated") for _, path in statuses)
    assert metric(real_trio.url, "pd_hand_offs_total", outcome="unknown") <= unknown + 1, "of the request it died under"
    wait_until(lambda: real_trio.kv_in_use() == 0, "all KV to be free", TRIO_TRANSFER_S + 120)
