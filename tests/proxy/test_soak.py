"""Mixed load under random faults, with real processes: every request is answered right or refused clearly, and in the
end nothing is left. `make soak` runs it for half an hour (`SOAK_S`), the suite for some seconds.
"""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.processes import MODEL, Proxy, Sim, events, http, openai_client, proxy_in_front_of, sim_node, wait_until

SECONDS = float(os.environ.get("SOAK_S", "10"))
CLIENTS = 8
PROMPTS = [f"prompt {number} of the soak " * (1 + number % 3) for number in range(12)]
FAULTS: list[dict[str, Any]] = [
    {"fault": "status", "status": 500},
    {"fault": "status", "status": 503, "headers": {"Retry-After": "1"}},
    {"fault": "drop"},
    {"fault": "drop-after", "chunks": 2},
    {"fault": "hang"},
    {"fault": "hang-after", "chunks": 2},
    {"fault": "error-first"},
    {"fault": "finish-error"},
    {"refuse_s": 1},
    {"itl_s": 0.05, "ttft_s": 0.3},
    {},
]

MOST_GROWTH = 16 * 2**20
"""Of the proxy's memory, in bytes, once it has met everything: a leak of a request's size would be ten times that."""

pytestmark = pytest.mark.timeout(SECONDS + 300)


@dataclass
class Cluster:
    """Two and two nodes and a proxy with short deadlines."""

    prefill: list[Sim]
    decode: list[Sim]
    proxy: Proxy
    right: dict[str, str] = field(default_factory=dict)
    """What one node alone says to each prompt."""
    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> list[Sim]:
        return [*self.prefill, *self.decode]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    flags = ["--decode-start-timeout-s", "1", "--decode-silence-timeout-s", "1", "--prefill-timeout-s", "2"]
    with ExitStack() as stack:
        prefill = [stack.enter_context(sim_node("prefill", timeout_s=10)) for _ in range(2)]
        decode = [stack.enter_context(sim_node("decode", timeout_s=10)) for _ in range(2)]
        yield Cluster(prefill, decode, stack.enter_context(proxy_in_front_of(*prefill, *decode, flags=flags)))


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True} | fields


def ask_whole(cluster: Cluster, prompt: str) -> str:
    answer = http.post(f"{cluster.proxy.url}/v1/completions", json=body(prompt), timeout=60)
    if answer.is_success:
        text: str = answer.json()["choices"][0]["text"]
        return text
    assert answer.json()["error"]["message"]
    assert answer.status_code in (429, 500, 502, 503, 504)
    raise openai.OpenAIError(str(answer.status_code))


def ask_stream(cluster: Cluster, prompt: str) -> str:
    asked: Any = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": True}
    with openai_client(cluster.proxy.url) as client:
        stream: Any = client.completions.create(**asked, extra_body={"ignore_eos": True})
        return "".join(chunk.choices[0].text for chunk in stream)


def leave_early(cluster: Cluster, prompt: str) -> None:
    with (
        suppress(httpx.HTTPError),
        http.stream(
            "POST",
            f"{cluster.proxy.url}/v1/completions",
            json=body(prompt, stream=True),
            timeout=random.random(),  # noqa: S311
        ) as answer,
    ):
        next(answer.iter_bytes(), b"")
    cluster.told["left"] += 1


def ask_for_a_while(cluster: Cluster, until: float, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    while time.monotonic() < until:
        prompt = chance.choice(PROMPTS)
        kind = chance.choice([ask_whole, ask_stream, ask_stream, leave_early])
        if kind is leave_early:
            leave_early(cluster, prompt)
            continue
        try:
            text = kind(cluster, prompt)
        except (openai.OpenAIError, httpx.RemoteProtocolError):
            cluster.told["refused"] += 1
        except Exception as exc:  # noqa: BLE001  whatever it is, it is wrong
            cluster.wrong.append(f"{kind.__name__}: {exc!r}")
        else:
            cluster.told["answered"] += 1
            if text != cluster.right[prompt]:
                cluster.wrong.append(f"{kind.__name__} {prompt!r}: {text!r} and not {cluster.right[prompt]!r}")


def trouble(cluster: Cluster, until: float) -> None:
    chance = random.Random(4711)  # noqa: S311
    while time.monotonic() < until:
        node = chance.choice(cluster.nodes)
        with suppress(httpx.HTTPError):  # it refuses connections, perhaps
            node.control(**chance.choice(FAULTS))
        time.sleep(chance.uniform(0.1, 1.0))


def open_sockets(proxy: Proxy) -> int:
    return len(psutil.Process(proxy.process.pid).net_connections())


def test_whatever_happens_answers_are_right_or_refused_and_nothing_is_left(cluster: Cluster) -> None:
    for prompt in PROMPTS:
        alone = http.post(f"{cluster.decode[0].url}/v1/completions", json=body(prompt))
        cluster.right[prompt] = alone.json()["choices"][0]["text"]
    until = time.monotonic() + SECONDS
    work = [threading.Thread(target=ask_for_a_while, args=(cluster, until, seed)) for seed in range(CLIENTS)]
    work.append(threading.Thread(target=trouble, args=(cluster, until)))
    for thread in work:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in work):
        memory.append(psutil.Process(cluster.proxy.process.pid).memory_info().rss)
        time.sleep(SECONDS / 40)
    for thread in work:
        thread.join()
    assert cluster.wrong == []
    assert cluster.told["answered"] > 0
    cluster.proxy.must_leave_nothing(cluster.nodes)
    cluster.proxy.until_usable(4)
    assert memory[-1] - memory[len(memory) // 4] < MOST_GROWTH, memory
    wait_until(lambda: open_sockets(cluster.proxy) < 2 * len(cluster.nodes) + 8, "idle connections to be closed")
    for prompt in PROMPTS:
        assert ask_stream(cluster, prompt) == ask_whole(cluster, prompt) == cluster.right[prompt]
    shown = [round(rss / 1e6) for rss in memory[:: max(1, len(memory) // 10)]]
    print(f"soak of {SECONDS:g} s: {dict(cluster.told)}; proxy RSS MB: {shown}")  # noqa: T201


def test_a_storm_of_leavers_leaves_nothing(cluster: Cluster) -> None:
    """A thousand clients that leave at any moment of their request."""
    leavers = 1000

    def leave_often(seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        for _ in range(leavers // CLIENTS):
            asked = body(chance.choice(PROMPTS), stream=chance.random() < 0.5)
            with suppress(httpx.HTTPError):
                http.post(f"{cluster.proxy.url}/v1/completions", json=asked, timeout=chance.uniform(0.001, 0.1))

    for node in cluster.nodes:
        node.control(ttft_s=0.05, itl_s=0.02)
    threads = [threading.Thread(target=leave_often, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.proxy.must_leave_nothing(cluster.nodes)
    assert [node.state()["expired"] for node in cluster.nodes] == [0] * len(cluster.nodes)
    assert events(http.post(f"{cluster.proxy.url}/v1/completions", json=body("x", stream=True)))[-1] == "[DONE]"
