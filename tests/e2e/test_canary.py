"""The KV canary on real engines: a decode node with another rope setting reads KV that it never would have written.

No counter tells: its KV cache has the same shape, every block arrives, and every answer is fluent.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launched import Up
from tests.processes import Sim, free_port, free_range, http, metric, proxy_in_front_of, running, wait_until

START_PATIENCE_S = 600
PROMPT = "the quick brown fox jumps over the lazy dog, " * 8


def canary(url: str) -> dict[str, Any]:
    told: dict[str, Any] = http.get(f"{url}/health", timeout=30).json()["canary"]
    return told


def test_a_pair_that_is_well_answers_as_its_decode_node_does_alone(real_pair: Up) -> None:
    assert "compared  the pair answers as its decode node does alone" in real_pair.output
    told = canary(real_pair.url)
    assert (told["same"], told["differs"], told["not_judged"]) == (1, [], [])


@contextmanager
def decode_node(like: Up, model: Path) -> Iterator[str]:
    """Another decode node, started as that of a run is, with another model folder; its address."""
    child = like.child("decode-0")
    command, environment = child.cmdline(), child.environ()
    served = json.loads((like.run_dir / "topology.json").read_text())
    port, first = free_port(), free_range(16).partition("-")[0]
    own = next(node["url"] for node in served["nodes"] if node["name"] == "decode-0")
    given = command[command.index("--model") + 1]
    changed = {given: str(model), own.rpartition(":")[2]: str(port)}
    command = [changed.get(word, word) for word in command]
    for name in ("MC_MIN_RPC_PORT", "MC_MIN_PRC_PORT"):
        environment[name] = first
    for name in ("MC_MAX_RPC_PORT", "MC_MAX_PRC_PORT"):
        environment[name] = str(int(first) + 15)
    with running(command, environment):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: http.get(f"{url}/health").is_success, "the other decode node", START_PATIENCE_S)
        yield url


@pytest.fixture
def other_rope(real_pair: Up, tmp_path: Path) -> Path:
    """The run's model with another rope setting: same weights, same shapes."""
    command = real_pair.child("decode-0").cmdline()
    folder = tmp_path / "model"
    shutil.copytree(command[command.index("--model") + 1], folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters", config)
    rope["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_decode_node_with_another_rope_setting_is_fenced_and_its_own_answers_are_still_served(
    real_pair: Up, other_rope: Path
) -> None:
    prefill_url = real_pair.nodes("prefill")[0]
    topology = json.loads((real_pair.run_dir / "topology.json").read_text())
    bootstrap = next(node["bootstrap"] for node in topology["nodes"] if node["role"] == "prefill")
    model = http.get(f"{real_pair.url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    with decode_node(real_pair, other_rope) as decode_url:
        prefill = Sim("prefill", prefill_url, bootstrap, real_pair.process)
        decode = Sim("decode", decode_url, None, real_pair.process)
        with _proxy(prefill, decode, "0") as url:  # without the canary nobody notices
            answer = http.post(f"{url}/v1/completions", json=body, timeout=120)
            alone = http.post(f"{decode_url}/v1/completions", json=body, timeout=120)
            assert answer.headers["x-pd-path"] == "disaggregated"
            assert answer.json()["choices"][0]["text"] != alone.json()["choices"][0]["text"]
            wait_until(lambda: http.get(f"{url}/health").json()["nodes"][1]["kv"] == "moving", "KV that moves")
        with _proxy(prefill, decode, "300") as url:
            wait_until(lambda: canary(url)["differs"], "the fence", 120)
            (told,) = canary(url)["differs"]
            assert (told["prefill"], told["decode"]) == ("prefill-0", "decode-0")
            assert http.get(f"{url}/health").json()["status"] == "degraded"
            assert metric(url, "pd_pair_fenced") == 1
            answer = http.post(f"{url}/v1/completions", json=body, timeout=120)
            assert answer.headers["x-pd-path"] == "aggregated; reason=no-prefill"
            assert answer.json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]
    wait_until(lambda: real_pair.kv_in_use() == 0, "no KV to be held")


@contextmanager
def _proxy(prefill: Sim, decode: Sim, interval_s: str) -> Iterator[str]:
    with proxy_in_front_of(prefill, decode, flags=["--canary-interval-s", interval_s], probe=False) as proxy:
        wait_until(lambda: http.get(f"{proxy.url}/health").json()["status"] in ("ok", "degraded"), "the proxy")
        yield proxy.url
