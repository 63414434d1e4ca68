"""Two and two real nodes under mixed load while their processes are killed and stopped, one after the other.

Not part of the suite (it takes as long as it is told to): `make soak-real SOAK_S=1800`. Every request is answered
or refused clearly, every node comes back, and in the end nothing is left.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.launched import RESTART_PATIENCE_S, Up, up
from tests.processes import ROOT, http, metric, openai_client, wait_until

SECONDS = float(os.environ.get("SOAK_S", "1800"))
CLIENTS = 2
THINK_S = (0.5, 2)
"""Between two requests of a client: two cores that are busy for ever would not let a node come back."""
PROMPTS = [f"Prompt number {number} of a long soak on real engines. " * (2 + number) for number in range(6)]

pytestmark = pytest.mark.timeout(SECONDS + 3600)


@dataclass
class Soak:
    """A run, and what its clients were told."""

    run: Up
    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """What each prompt is answered with when nothing else happens: greedy, so never anything else."""
    done: threading.Event = field(default_factory=threading.Event)

    def check(self, body: dict[str, Any], text: str, headers: Mapping[str, str]) -> None:
        if text != self.texts[body["prompt"]]:
            way, number = headers["x-pd-path"], headers["x-request-id"]
            at = f"{time.strftime('%H:%M:%S')} {number} ({way})"
            self.wrong.append(f"{at}: {text!r} to prompt {PROMPTS.index(body['prompt'])}")


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    flags = ["--config", str(ROOT / "examples" / "cpu-1p1d.yaml"), "--prefill", "2", "--decode", "2"]
    proxy = "--decode-silence-timeout-s 20 --prefill-timeout-s 60 --log-requests"
    flags += [f"--proxy-args={part}" for part in proxy.split()]
    with up(tmp_path, *flags, nodes=4) as run:
        run.until("Ready:", 1800)
        yield Soak(run)
        assert run.end() == 0
    assert "Killed what was left" not in run.output


def asked(prompt: str) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}


def ask(soak: Soak, chance: random.Random) -> None:
    """One request: whole, streamed, or left early. Any error but a clear one is wrong."""
    body = asked(chance.choice(PROMPTS))
    kind = chance.choice(["whole", "stream", "stream", "left"])
    url = f"{soak.run.url}/v1/completions"
    if kind == "left":
        with suppress(httpx.HTTPError):
            http.post(url, json=body | {"max_tokens": 200}, timeout=chance.uniform(0.1, 3))
    elif kind == "whole":
        answer = http.post(url, json=body, timeout=900)
        if answer.is_success:
            kind = "answered"
            soak.check(body, answer.json()["choices"][0]["text"], answer.headers)
        else:
            assert answer.status_code in (429, 502, 503, 504), answer.text
            assert answer.json()["error"]["message"]
            kind = f"refused {answer.status_code}"
    else:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with openai_client(soak.run.url) as client:
                raw = client.completions.with_raw_response.create(**body, **options)
                chunks: list[Any] = list(raw.parse())
            assert chunks[-1].usage is not None
            kind = "streamed"
            soak.check(body, "".join(choice.text for chunk in chunks for choice in chunk.choices), raw.headers)
        except (openai.APIError, httpx.RemoteProtocolError):
            kind = "stream ended with an error"
    soak.told[kind] += 1


def ask_for_ever(soak: Soak, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    while not soak.done.is_set():
        try:
            ask(soak, chance)
        except Exception as exc:  # noqa: BLE001  whatever it is, it is wrong
            soak.wrong.append(repr(exc))
        time.sleep(chance.uniform(*THINK_S))


def kill_one(word: str) -> Callable[[psutil.Process], None]:
    def kill(node: psutil.Process) -> None:
        inside = [child for child in node.children(recursive=True) if word in " ".join(child.cmdline())]
        (inside or [node])[0].kill()

    return kill


def stop_for_a_while(node: psutil.Process) -> None:
    tree = [*node.children(recursive=True), node]
    for process in tree:
        process.send_signal(signal.SIGSTOP)
    time.sleep(40)
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


FAULTS = {
    "API server killed": psutil.Process.kill,
    "engine core killed": kill_one("EngineCore"),
    "worker killed": kill_one("Worker"),
    "stopped for 40 s": stop_for_a_while,
}


def test_real_nodes_come_back_from_everything_and_nothing_is_left(soak: Soak) -> None:
    proxy = soak.run.child("proxy")
    for prompt in PROMPTS:
        answer = http.post(f"{soak.run.url}/v1/completions", json=asked(prompt), timeout=900)
        soak.texts[prompt] = answer.json()["choices"][0]["text"]
    clients = [threading.Thread(target=ask_for_ever, args=(soak, seed)) for seed in range(CLIENTS)]
    until = time.monotonic() + SECONDS
    for client in clients:
        client.start()
    memory = [proxy.memory_info().rss]
    try:
        turns = zip(cycle(FAULTS.items()), cycle(["decode-0", "prefill-0", "decode-1", "prefill-1", "decode-0"]))
        for (fault, strike), name in turns:
            if time.monotonic() > until:
                break
            restarts = soak.run.output.count("is ready again.")
            print(f"{time.strftime('%H:%M:%S')} {name}: {fault}  {dict(soak.told)}", flush=True)  # noqa: T201
            strike(soak.run.child(name))
            if "killed" in fault:
                wait_until(
                    lambda seen=restarts: soak.run.output.count("is ready again.") > seen,  # type: ignore[misc]
                    f"{name} to come back",
                    RESTART_PATIENCE_S,
                )
            soak.run.until_well()
            memory.append(proxy.memory_info().rss)
    finally:
        soak.done.set()
        for client in clients:
            client.join()
    print(f"told: {dict(soak.told)}; proxy RSS MB: {[round(rss / 1e6) for rss in memory]}")  # noqa: T201
    assert not soak.wrong, "\n".join(soak.wrong)
    assert soak.told["answered"] + soak.told["streamed"] > 0
    for series in ("pd_requests_in_flight", "pd_releases_pending", "pd_node_in_flight"):
        wait_until(lambda series=series: metric(soak.run.url, series) == 0, series, 300)  # type: ignore[misc]
    wait_until(lambda: soak.run.kv_in_use() == 0, "all KV to be free", 300)
