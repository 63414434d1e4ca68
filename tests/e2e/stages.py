"""A real engine dies at each stage of a request: the client gets the answer it would have got, and no KV is left.

What a node that died may have taken is not released, and expires on the prefill node: here after half a minute.

Not part of the suite, for every death costs the start of an engine: `make soak-real`. A proxy of its own reaches the
nodes through gates, so that a request can be kept at a stage for as long as it takes to kill somebody.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.gate import Gate, What
from tests.launched import Up
from tests.processes import Proxy, http, metric, proxy_in_front_of, wait_until

from .conftest import trio
from .test_survival import Kill, kill_api_server, kill_engine_core, stop_all_of_it

pytestmark = pytest.mark.timeout(3600)

ROUTE = "/v1/completions"
PATIENCE_S = 600


@dataclass(frozen=True)
class Stage:
    """Where a request is kept, and what becomes of what was kept back when the node is dead."""

    at: str
    what: What
    kill: Kill
    victim: str
    is_told: bool = True
    stream: bool = True


STAGES = {
    "prefill is asked": Stage("prefill", "request", kill_api_server, "prefill"),
    "prefill has computed and not answered": Stage("prefill", "answer", kill_engine_core, "prefill", is_told=False),
    "prefill has answered and decode is not asked": Stage("decode", "request", kill_engine_core, "prefill"),
    "decode is asked": Stage("decode", "request", kill_engine_core, "decode", stream=False),
    "decode has begun and not been heard": Stage("decode", "answer", kill_api_server, "decode", is_told=False),
    "decode's first words are on their way": Stage("decode", "answer", kill_engine_core, "decode"),
}


@dataclass
class Gated:
    """A proxy that reaches its nodes through gates, by the nodes' names."""

    proxy: Proxy
    gates: dict[str, Gate]

    def of(self, role: str) -> dict[str, Gate]:
        return {name: gate for name, gate in self.gates.items() if name.startswith(role)}


@pytest.fixture(scope="module")
def real_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with trio(tmp_path_factory.mktemp("trio"), "--transfer-timeout-s", "30") as run:
        yield run


@pytest.fixture(scope="module")
def gated(real_trio: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    topology = json.loads((real_trio.run_dir / "topology.json").read_text())
    gates = {node["name"]: Gate(node["url"]) for node in topology["nodes"]}
    for node in topology["nodes"]:
        node["url"] = gates[node["name"]].url
    file = tmp_path_factory.mktemp("gated") / "topology.json"
    file.write_text(json.dumps(topology))
    with proxy_in_front_of(flags=["--topology", str(file)], wait=False) as proxy:
        yield Gated(proxy, gates)
    for gate in gates.values():
        gate.close()


def ask(url: str, prompt: str, *, stream: bool) -> str:
    """The answer's text; an error is the test's failure."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True, "stream": stream}
    answer = http.post(url + ROUTE, json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    assert answer.text.endswith("data: [DONE]\n\n"), answer.text
    events: list[Any] = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_whoever_dies_the_answer_is_the_same(real_trio: Up, gated: Gated, stage: Stage) -> None:
    real_trio.until_well()
    gated.proxy.until_usable(len(gated.gates))
    prompt = f"{stage} " + "A node may die at any moment, and nobody shall notice. " * 6
    expected = ask(real_trio.nodes("prefill")[0], prompt, stream=False)
    gates = gated.of(stage.at)
    for gate in gates.values():
        gate.shut(stage.what, ROUTE)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(ask(gated.proxy.url, prompt, stream=stage.stream)))
    asking.start()
    wait_until(lambda: any(gate.holds.is_set() for gate in gates.values()), "the request to come there", PATIENCE_S)
    at = next(name for name, gate in gates.items() if gate.holds.is_set())
    name = at if at.startswith(stage.victim) else "prefill-0"
    restarts = real_trio.output.count(f"{name} is ready again.")
    victim = real_trio.child(name)
    stage.kill(victim)
    victim.wait(PATIENCE_S)
    for gate in gates.values():
        gate.open() if stage.is_told else gate.drop()
    asking.join()
    assert answers == [expected]
    wait_until(lambda: real_trio.output.count(f"{name} is ready again.") > restarts, f"{name} to come back", PATIENCE_S)
    gated.proxy.until_at_rest()
    wait_until(lambda: real_trio.kv_in_use() == 0, "all KV to be free", PATIENCE_S)


def test_a_prefill_node_that_dies_while_it_sends_kv_costs_no_answer(real_trio: Up, gated: Gated) -> None:
    """The decode node is not told, and keeps its blocks for the transfer timeout and a minute."""
    real_trio.until_well()
    gated.proxy.until_usable(len(gated.gates))
    prompt = "What has been sent for is on its way, or so one thinks. " * 6
    expected = ask(real_trio.nodes("prefill")[0], prompt, stream=False)
    gates = gated.of("decode")
    for gate in gates.values():
        gate.shut("request", ROUTE)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(ask(gated.proxy.url, prompt, stream=True)))
    asking.start()
    wait_until(lambda: any(gate.holds.is_set() for gate in gates.values()), "the request to come there", PATIENCE_S)
    restarts = real_trio.output.count("prefill-0 is ready again.")
    victim = real_trio.child("prefill-0")
    stop_all_of_it(victim)
    for gate in gates.values():
        gate.open()
    wait_until(lambda: any(metric(url, "vllm:kv_cache_usage_perc") for url in real_trio.nodes("decode")), "a pull")
    victim.kill()
    asking.join()
    assert answers == [expected]
    again = "prefill-0 to come back"
    wait_until(lambda: real_trio.output.count("prefill-0 is ready again.") > restarts, again, PATIENCE_S)
    gated.proxy.until_at_rest()
    wait_until(lambda: real_trio.kv_in_use() == 0, "all KV to be free", PATIENCE_S)
