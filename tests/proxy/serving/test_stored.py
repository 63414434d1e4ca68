"""Stored responses: told, continued and cancelled by the decode node that has them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node, wait_until


@dataclass
class System:
    prefill: Sim
    nodes: list[Sim]
    proxy: Proxy

    def ask(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "input": "hello", "max_output_tokens": 4} | fields
        return http.post(f"{self.proxy.url}/v1/responses", json=body, timeout=60)

    def get(self, response_id: str) -> httpx.Response:
        return http.get(f"{self.proxy.url}/v1/responses/{response_id}")

    def owner(self, response_id: str) -> Sim:
        (found,) = [node for node in self.nodes if http.get(f"{node.url}/v1/responses/{response_id}").is_success]
        return found


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as first,
        sim_node("decode") as second,
        proxy_in_front_of(prefill, first, second) as proxy,
    ):
        proxy.until_usable(3)
        yield System(prefill, [first, second], proxy)


@pytest.mark.parametrize("stream", [False, True])
def test_each_response_is_told_by_the_node_that_made_it(system: System, *, stream: bool) -> None:
    made = []
    for _ in range(3):
        answer = system.ask(stream=stream)
        assert answer.headers["x-pd-path"] == "disaggregated"
        made.append(f"chatcmpl-{answer.headers['x-request-id']}")
    for response_id in made:
        assert (
            system.get(response_id).json()
            == http.get(f"{system.owner(response_id).url}/v1/responses/{response_id}").json()
        )
    assert len({system.owner(response_id).url for response_id in made}) == 2


def test_a_conversation_goes_on_where_its_last_response_is(system: System) -> None:
    before = system.ask().json()["id"]
    owner = system.owner(before)
    for _ in range(3):
        seen = len(owner.received("/v1/responses"))
        answer = system.ask(previous_response_id=before)
        assert answer.is_success, answer.text
        assert answer.headers["x-pd-path"] == "aggregated; reason=stored-response"
        assert owner.received("/v1/responses")[seen:][-1]["body"]["previous_response_id"] == before
        before = answer.json()["id"]
        assert system.owner(before).url == owner.url


def test_one_that_is_not_stored_is_not_found_in_vllms_words(system: System) -> None:
    not_stored = system.ask(store=False).json()["id"]
    for quoted in (not_stored, "resp_none", "a%20b%3Fc", "..%2F..%2Fmetrics"):
        answer = system.get(quoted)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] in ("invalid_request_error", "NotFoundError")
    answer = system.ask(previous_response_id="resp_none")
    alone = http.post(
        f"{system.nodes[0].url}/v1/responses", json={"model": MODEL, "input": "x", "previous_response_id": "resp_none"}
    )
    assert (answer.status_code, answer.json()) == (404, alone.json())


def test_a_response_that_is_still_made_is_followed_event_by_event(system: System) -> None:
    response_id = system.ask().json()["id"]
    owner = system.owner(response_id)
    owner.control(itl_s=1000)
    with http.stream("GET", f"{system.proxy.url}/v1/responses/{response_id}?stream=true", timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: response.created"  # long before its end
        assert owner.metric("vllm:num_requests_running") == 1
    wait_until(lambda: owner.metric("vllm:num_requests_running") == 0, "the node to hear that the client left")
    owner.control()
    told = http.get(f"{system.proxy.url}/v1/responses/{response_id}?stream=true").text
    assert told == http.get(f"{owner.url}/v1/responses/{response_id}?stream=true").text


@pytest.mark.parametrize("name", ["x" * 300, "é" * 20, "..", ".x", "a/b"])
def test_a_name_that_no_response_has_is_not_looked_for(system: System, name: str) -> None:
    answer = system.ask(previous_response_id=name)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"Response with id '{name}' not found."


def test_to_cancel_is_for_the_node_to_judge(system: System) -> None:
    response_id = system.ask().json()["id"]
    answer = http.post(f"{system.proxy.url}/v1/responses/{response_id}/cancel")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "Cannot cancel a synchronous response."
    assert http.post(f"{system.proxy.url}/v1/responses/resp_none/cancel").status_code == 404


def test_when_a_node_is_silent_nobody_says_that_there_is_no_such_response() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as first,
        sim_node("decode") as second,
        proxy_in_front_of(prefill, first, second) as proxy,
    ):
        proxy.until_usable(3)
        system = System(prefill, [first, second], proxy)
        response_id = system.ask().json()["id"]
        owner = system.owner(response_id)
        owner.process.kill()
        owner.process.wait()
        for answer in (system.get(response_id), system.ask(previous_response_id=response_id)):
            assert answer.status_code == 503
            assert "one that does not may" in answer.json()["error"]["message"]
