"""A node fails before the client has seen a byte: another try elsewhere, a fresh hand-off, and nothing left behind."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.processes import MODEL, Proxy, Sim, events, free_port, http, proxy_in_front_of, sim_node, wait_until

BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}


@dataclass
class Cluster:
    """Two prefill nodes, two decode nodes, a proxy."""

    prefill: list[Sim]
    decode: list[Sim]
    proxy: Proxy

    @property
    def nodes(self) -> list[Sim]:
        return [*self.prefill, *self.decode]

    def ask(self, **fields: Any) -> httpx.Response:
        return http.post(f"{self.proxy.url}/v1/completions", json=BODY | fields, timeout=60)

    def transfer_ids(self) -> list[str]:
        """Of the hand-offs the prefill nodes remember."""
        asked = [entry["body"]["kv_transfer_params"] for node in self.prefill for entry in node.received()]
        return [params["transfer_id"] for params in asked if params]

    def text(self) -> str:
        """What one node alone answers."""
        for node in self.nodes:
            node.control()
        text: str = http.post(f"{self.decode[0].url}/v1/completions", json=BODY).json()["choices"][0]["text"]
        return text


@pytest.fixture(scope="module")
def _cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        prefill = [stack.enter_context(sim_node("prefill")) for _ in range(2)]
        decode = [stack.enter_context(sim_node("decode")) for _ in range(2)]
        yield Cluster(prefill, decode, stack.enter_context(proxy_in_front_of(*prefill, *decode)))


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    _cluster.proxy.until_all_take_turns(4)
    yield _cluster
    _cluster.proxy.must_leave_nothing(_cluster.nodes)


def spoken(answer: httpx.Response) -> str:
    if answer.headers["content-type"].startswith("application/json"):
        text: str = answer.json()["choices"][0]["text"]
        return text
    return "".join(event["choices"][0]["text"] for event in events(answer) if event != "[DONE]")


FAULTS: dict[str, dict[str, Any]] = {
    "drops": {"fault": "drop"},
    "answers 500": {"fault": "status", "status": 500},
    "answers 502": {"fault": "status", "status": 502},
    "answers 503": {"fault": "status", "status": 503},
    "answers 429": {"fault": "status", "status": 429, "headers": {"Retry-After": "1"}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("fault", FAULTS)
def test_another_node_answers_when_one(cluster: Cluster, role: str, fault: str, stream: bool) -> None:
    broken = getattr(cluster, role)[0]
    broken.control(**FAULTS[fault])
    answers = [cluster.ask(stream=stream) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert {answer.headers["x-pd-path"] for answer in answers} == {"disaggregated"}
    assert {spoken(answer) for answer in answers} == {cluster.text()}


@pytest.mark.parametrize("stream", [False, True])
def test_another_decode_node_answers_when_ones_stream_begins_with_an_error(cluster: Cluster, stream: bool) -> None:
    cluster.decode[0].control(fault="error-first")
    answers = [cluster.ask(stream=stream) for _ in range(4)]
    assert {spoken(answer) for answer in answers} == {cluster.text()}


def test_a_whole_answer_is_made_again_when_its_node_dies_in_the_middle(cluster: Cluster) -> None:
    cluster.decode[0].control(fault="drop-after", chunks=3)
    assert {spoken(cluster.ask()) for _ in range(4)} == {cluster.text()}


def test_every_attempt_is_a_hand_off_of_its_own(cluster: Cluster) -> None:
    """A second decode request under a used `transfer_id` hangs on a live pair."""
    cluster.decode[0].control(fault="status", status=503)
    cluster.decode[1].control(fault="status", status=503)
    before = set(cluster.transfer_ids())
    assert cluster.ask().status_code == 503
    ids = cluster.transfer_ids()
    assert len(set(ids)) == len(ids)
    assert len(set(ids) - before) == 2


def test_a_refusal_is_the_requests_fault_and_is_not_tried_elsewhere(cluster: Cluster) -> None:
    before = set(cluster.transfer_ids())
    assert cluster.ask(temperature=-1).status_code == 400
    assert len(set(cluster.transfer_ids()) - before) == 1


def test_an_answer_that_has_begun_is_not_begun_again(cluster: Cluster) -> None:
    for node in cluster.decode:
        node.control(fault="drop-after", chunks=3)
    with pytest.raises(httpx.RemoteProtocolError):
        cluster.ask(stream=True, logprobs=1)


def test_a_node_that_asks_to_be_left_alone_is(cluster: Cluster) -> None:
    cluster.prefill[0].control(fault="status", status=503, headers={"Retry-After": "30"}, times=1)
    for _ in range(2):
        assert cluster.ask().is_success
    seen = cluster.prefill[0].received()[-1]["headers"]["x-request-id"]
    for _ in range(6):
        assert cluster.ask().is_success
    assert cluster.prefill[0].received()[-1]["headers"]["x-request-id"] == seen


def test_the_last_nodes_wish_to_be_left_alone_reaches_the_client(cluster: Cluster) -> None:
    for node in cluster.prefill:
        node.control(fault="status", status=503, headers={"Retry-After": "9"})
    answer = cluster.ask()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "9")


def test_without_a_prefill_node_that_works_decode_nodes_do_all(cluster: Cluster) -> None:
    for node in cluster.prefill:
        node.control(fault="drop")
    answer = cluster.ask()
    assert answer.headers["x-pd-path"] == "aggregated; reason=no-prefill"
    assert spoken(answer) == cluster.text()


def test_retries_are_counted_by_reason_and_failures_by_node(cluster: Cluster) -> None:
    cluster.decode[0].control(fault="status", status=502)
    before = cluster.proxy.metric("pd_retries_total", reason="502")
    failed = cluster.proxy.metric("pd_node_errors_total", node="decode-0", kind="502")
    for _ in range(2):
        assert cluster.ask().is_success
    assert cluster.proxy.metric("pd_retries_total", reason="502") > before
    assert cluster.proxy.metric("pd_node_errors_total", node="decode-0", kind="502") > failed


def test_a_node_that_keeps_failing_gets_few_requests_until_it_is_well(cluster: Cluster) -> None:
    cluster.decode[0].control(fault="status", status=500)
    for _ in range(12):
        assert cluster.ask().is_success
    assert cluster.proxy.metric("pd_node_breaker_open", node="decode-0") == 1
    cluster.decode[0].control()
    wait_until(
        lambda: cluster.ask().is_success and not cluster.proxy.metric("pd_node_breaker_open", node="decode-0"),
        "the node to be tried, and found well",
    )


def test_an_outage_is_not_multiplied_by_retries(cluster: Cluster) -> None:
    for node in cluster.decode:
        node.control(fault="status", status=500)
    before = cluster.proxy.metric("pd_retries_total")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: cluster.ask(), range(100)))
    assert {answer.status_code for answer in answers} == {500}
    assert cluster.proxy.metric("pd_retries_total") - before < 100


def test_without_prefill_nodes_a_strict_proxy_refuses() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--without-prefill", "refuse"]) as proxy,
    ):
        prefill.process.kill()
        wait_until(lambda: not proxy.health()["nodes"][0]["usable"], "the death to be seen")
        answer = http.post(f"{proxy.url}/v1/completions", json=BODY, timeout=60)  # it waits a moment for the node
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert answer.headers["retry-after"]


def test_a_stalled_hand_off_is_given_up_and_made_again() -> None:
    """A decode node that waits for KV that never comes says nothing at all."""
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as stuck,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, stuck, decode, flags=["--decode-start-timeout-s", "1"]) as proxy,
    ):
        stuck.control(fault="hang")
        for _ in range(2):
            answer = http.post(f"{proxy.url}/v1/completions", json=BODY, timeout=60)
            assert answer.headers["x-pd-path"] == "disaggregated"
        assert proxy.metric("pd_node_errors_total", node="decode-0", kind="late") > 0


def test_a_prefill_node_that_comes_back_is_known_by_its_new_identity() -> None:
    port, bootstrap_port = free_port(), free_port()
    with sim_node("decode") as decode, ExitStack() as first:
        prefill = first.enter_context(sim_node("prefill", port=port, bootstrap_port=bootstrap_port))
        with proxy_in_front_of(prefill, decode) as proxy:
            prefill.process.kill()
            prefill.process.wait()
            assert http.post(f"{proxy.url}/v1/completions", json=BODY).headers["x-pd-path"].startswith("aggregated")
            with sim_node("prefill", port=port, bootstrap_port=bootstrap_port):
                proxy.until_usable(2)
                answer = http.post(f"{proxy.url}/v1/completions", json=BODY)
                assert answer.headers["x-pd-path"] == "disaggregated"
                assert decode.state()["waiting_pulls"] == 0


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(cluster: Cluster, given: str) -> None:
    answer = http.post(f"{cluster.proxy.url}/v1/completions", json=BODY, headers={"x-request-timeout": given})
    assert answer.status_code == 400


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_a_client_may_ask_for_less_time(cluster: Cluster, leg: str) -> None:
    """It is answered at its deadline. The leg ends behind its back: what it leaves must be known."""
    for node in getattr(cluster, leg):
        node.control(ttft_s=2, itl_s=0.5)
    failures = cluster.proxy.metric("pd_node_errors_total")
    answer = http.post(
        f"{cluster.proxy.url}/v1/completions",
        json=BODY | {"ignore_eos": True},
        headers={"x-request-timeout": "0.5"},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "GatewayTimeoutError")
    assert "was not answered in 0.5 s" in answer.json()["error"]["message"]
    assert cluster.proxy.metric("pd_node_errors_total") == failures
