"""Nodes that do both, behind the proxy: each request takes one as its prefill node and another as its decode node."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.parity import MODEL
from tests.processes import Proxy, Sim, http, metric, proxy_in_front_of, sim_node, wait_until

PROMPT = "what one node computes another goes on from "


@pytest.fixture
def three() -> Iterator[tuple[Sim, Sim, Sim]]:
    with sim_node("both") as first, sim_node("both") as second, sim_node("both") as third:
        yield first, second, third


def ask(url: str, number: int, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": f"{number} {PROMPT}", "max_tokens": 8, "temperature": 0} | fields
    return http.post(f"{url}/v1/completions", json=body, timeout=60)


def right(answer: httpx.Response, number: int, reference: Sim) -> bool:
    alone = ask(reference.url, number).json()["choices"][0]["text"]
    return answer.status_code == 200 and answer.json()["choices"][0]["text"] == alone


def transferred(*nodes: Sim) -> float:
    return sum(metric(node.url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer") for node in nodes)


def test_every_prompt_moves_from_one_node_to_another(three: tuple[Sim, Sim, Sim]) -> None:
    with proxy_in_front_of(*three) as proxy:
        answers = [ask(proxy.url, number) for number in range(12)]
        assert {answer.headers["x-pd-path"] for answer in answers} == {"disaggregated"}
        assert all(right(answer, number, three[0]) for number, answer in enumerate(answers))
        assert transferred(*three) == sum(answer.json()["usage"]["prompt_tokens"] for answer in answers)
        health = proxy.health()
    assert health["status"] == "ok"
    assert [node["leaning"] for node in health["nodes"]] == ["prefill", "decode", "prefill"]


def test_one_that_is_left_answers_alone(three: tuple[Sim, Sim, Sim]) -> None:
    with proxy_in_front_of(*three) as proxy:
        for node in three[:2]:
            node.process.kill()
        answers = [ask(proxy.url, number) for number in range(6)]
        assert {answer.status_code for answer in answers} == {200}
        assert answers[-1].headers["x-pd-path"] == "aggregated; reason=no-prefill"
        wait_until(lambda: proxy.health()["status"] == "degraded", "the proxy to say so")


def test_a_hand_off_that_nobody_takes_is_given_back_by_another_node_than_its_holder(
    three: tuple[Sim, Sim, Sim],
) -> None:
    with proxy_in_front_of(*three) as proxy:
        three[1].control(fault="status", status=500, times=1)
        assert ask(proxy.url, 1).status_code == 200
        for node in three:
            node.until_free()


def test_many_at_once_leave_nothing_on_any_node(three: tuple[Sim, Sim, Sim]) -> None:
    with proxy_in_front_of(*three) as proxy, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: ask(proxy.url, number), range(100)))
        assert {answer.headers["x-pd-path"] for answer in answers} == {"disaggregated"}
        for node in three:
            node.until_free()


def topology(file: Path, *roles: tuple[Sim, str]) -> None:
    nodes: list[dict[str, Any]] = [
        {"name": f"n{place}", "role": role, "url": node.url, "bootstrap": None if role == "decode" else node.bootstrap}
        for place, (node, role) in enumerate(roles)
    ]
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"nodes": nodes}))
    new.replace(file)


def test_roles_that_change_in_the_file_under_load_lose_no_request(three: tuple[Sim, Sim, Sim], tmp_path: Path) -> None:
    first, second, third = three
    file = tmp_path / "topology.json"
    topology(file, (first, "prefill"), (second, "decode"), (third, "both"))
    with proxy_in_front_of(flags=["--topology", str(file)], wait=False) as proxy, ThreadPoolExecutor(8) as pool:
        proxy.until_usable(3)
        asked = [pool.submit(ask, proxy.url, number) for number in range(150)]
        topology(file, (first, "both"), (second, "both"), (third, "decode"))
        asked += [pool.submit(ask, proxy.url, number) for number in range(150, 300)]
        topology(file, (first, "decode"), (second, "prefill"), (third, "both"))
        asked += [pool.submit(ask, proxy.url, number) for number in range(300, 450)]
        answers = [future.result() for future in asked]
        wait_until(lambda: _roles(proxy) == ["decode", "prefill", "both"], "the last roles")
        assert ask(proxy.url, 1000).headers["x-pd-path"] == "disaggregated"
    assert all(right(answer, number, first) for number, answer in enumerate(answers))


def _roles(proxy: Proxy) -> list[str]:
    return [node["role"] for node in proxy.health()["nodes"]]


def test_with_several_workers_all_have_the_same_leanings(three: tuple[Sim, Sim, Sim]) -> None:
    with proxy_in_front_of(*three, flags=["--workers", "3"]) as proxy:
        seen = {tuple(node["leaning"] for node in proxy.health()["nodes"]) for _ in range(20)}
        assert seen == {("prefill", "decode", "prefill")}
