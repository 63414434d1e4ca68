"""Traces: the proxy's spans hang together, the nodes' hang under the right leg, and no collector costs a request."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.otlp import HTTP, Sink, collector
from tests.processes import MODEL, ROOT, Proxy, Sim, http, proxy_in_front_of, sim_node, wait_until
from tests.proxy.serving.test_lifecycle import PD_PROXY

BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4}
SERVER, CLIENT = 2, 3
"""Kinds of spans."""
OF_A_CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def traced(*nodes: Sim, env: dict[str, str] | None = None) -> Iterator[tuple[Proxy, Sink]]:
    with (
        collector() as sink,
        proxy_in_front_of(*nodes, flags=["--otlp-traces-endpoint", sink.url], env=HTTP | (env or {})) as proxy,
    ):
        yield proxy, sink


@pytest.fixture(scope="module", name="all_four")
def _all_four() -> Iterator[tuple[Sim, Sim, Proxy, Sink]]:
    with sim_node("prefill") as prefill, sim_node("decode") as decode, traced(prefill, decode) as (proxy, sink):
        yield prefill, decode, proxy, sink


def ask(proxy: Proxy, request_id: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    told = {"x-request-id": request_id, **(headers or {})}
    return http.post(f"{proxy.url}/v1/completions", json=BODY | fields, headers=told, timeout=60)


def parent_told(node: Sim, request_id: str) -> str:
    """The span that a leg named to its node."""
    seen = next(one for one in node.received() if one["headers"].get("x-request-id") == request_id)
    return str(seen["headers"]["traceparent"]).split("-")[2]


def test_a_request_is_one_span_with_its_legs_under_it(all_four: tuple[Sim, Sim, Proxy, Sink]) -> None:
    prefill, decode, proxy, sink = all_four
    assert ask(proxy, "whole").is_success
    root = sink.root("whole")
    assert (root.service, root.name, root.kind) == ("pd-proxy", f"text_completion {MODEL}", SERVER)
    assert root.attributes["gen_ai.request.model"] == MODEL
    assert root.attributes["gen_ai.usage.output_tokens"] == 4
    assert root.attributes["pd.path"] == "disaggregated"
    assert root.parent == ""
    children = sink.children(root)
    assert [child.name for child in children] == ["pd.queue", "pd.read", "pd.prefill", "pd.decode"]
    _, _, leg, other = children
    assert (leg.kind, leg.attributes["pd.node"], leg.attributes["pd.kv"]) == (CLIENT, "prefill-0", "taken")
    assert (other.kind, other.attributes["pd.node"], other.events) == (CLIENT, "decode-0", ("first event",))
    assert [child.name for child in sink.children(other)] == ["pd.hand_off"]
    assert parent_told(prefill, "whole") == leg.id
    assert parent_told(decode, "whole") == other.id
    assert all(root.began <= child.began <= child.ended <= root.ended for child in children)


def test_it_hangs_under_its_clients_span_and_says_what_its_client_does_not_sample(
    all_four: tuple[Sim, Sim, Proxy, Sink],
) -> None:
    prefill, _, proxy, sink = all_four
    assert ask(proxy, "under-a-client", {"traceparent": OF_A_CLIENT, "tracestate": "a=b"}).is_success
    root = sink.root("under-a-client")
    assert (root.trace, root.parent) == tuple(OF_A_CLIENT.split("-")[1:3])
    seen = next(one for one in prefill.received() if one["headers"].get("x-request-id") == "under-a-client")
    assert seen["headers"]["tracestate"] == "a=b"
    assert ask(proxy, "not-sampled", {"traceparent": OF_A_CLIENT[:-1] + "0"}).is_success
    assert ask(proxy, "sampled").is_success
    sink.root("sampled")
    assert not any(span.attributes.get("pd.request_id") == "not-sampled" for span in sink.spans)
    seen = next(one for one in prefill.received() if one["headers"].get("x-request-id") == "not-sampled")
    assert seen["headers"]["traceparent"].endswith("-00"), "nor do the nodes"


def test_a_header_that_is_no_trace_begins_a_new_one(all_four: tuple[Sim, Sim, Proxy, Sink]) -> None:
    _, _, proxy, sink = all_four
    assert ask(proxy, "nonsense", {"traceparent": "nonsense"}).is_success
    assert sink.root("nonsense").parent == ""


def test_a_leg_of_a_further_attempt_is_linked_to_the_lost_one(all_four: tuple[Sim, Sim, Proxy, Sink]) -> None:
    prefill, decode, proxy, sink = all_four
    prefill.control(fault="status", status=503, times=1)
    assert ask(proxy, "again").is_success
    lost, second = (child for child in sink.children(sink.root("again")) if child.kind == CLIENT)
    assert (lost.name, second.name) == ("pd.prefill", "pd.aggregated")
    assert lost.failed
    assert lost.attributes["error.type"] == "503"
    assert second.links == (lost.id,)
    assert parent_told(decode, "again") == second.id


def test_sequences_of_one_request_are_legs_of_one_trace(all_four: tuple[Sim, Sim, Proxy, Sink]) -> None:
    _, _, proxy, sink = all_four
    assert ask(proxy, "of-three", n=3, temperature=1).is_success
    names = [child.name for child in sink.children(sink.root("of-three"))]
    assert names.count("pd.decode") == names.count("pd.prefill") == 3


def test_what_one_node_does_alone_is_one_leg(all_four: tuple[Sim, Sim, Proxy, Sink]) -> None:
    _, _, proxy, sink = all_four
    told = {"x-request-id": "alone"}
    assert http.post(f"{proxy.url}/tokenize", json={"model": MODEL, "prompt": "x"}, headers=told).is_success
    legs = sink.children(sink.root("alone"))
    assert [leg.name for leg in legs] == ["pd.queue", "pd.read", "pd.aggregated"]


def test_a_refusal_and_a_failure_are_told_by_their_status(all_four: tuple[Sim, Sim, Proxy, Sink]) -> None:
    _, _, proxy, sink = all_four
    assert ask(proxy, "refused", model="nope").status_code == 404
    root = sink.root("refused")
    assert (root.attributes["error.type"], root.failed) == ("404", False), "the client's fault is no failure of ours"


@pytest.mark.parametrize("how", ["500", "never"])
def test_a_collector_that_fails_costs_no_request_and_what_is_lost_is_counted(
    prefill: Sim, decode: Sim, how: str
) -> None:
    with traced(prefill, decode, env={"OTEL_BSP_MAX_QUEUE_SIZE": "32", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "16"}) as (
        proxy,
        sink,
    ):
        sink.status, sink.silent = (500, False) if how == "500" else (200, True)
        for number in range(40):
            assert ask(proxy, f"lost-{number}").is_success
        wait_until(lambda: sink.asked, "the collector to be asked")
        lost = {"500": "failed", "never": "dropped"}[how]
        wait_until(lambda: proxy.metric("pd_trace_spans_total", outcome=lost) > 0, "the loss to be counted")
        sink.status, sink.silent = 200, False
        assert ask(proxy, "found-again").is_success
        wait_until(lambda: proxy.metric("pd_trace_spans_total", outcome="exported") > 0, "what can be sent again")


def test_a_proxy_ends_though_its_collector_answers_nothing(prefill: Sim, decode: Sim) -> None:
    with traced(prefill, decode) as (proxy, sink):
        sink.silent = True
        assert ask(proxy, "last").is_success
        wait_until(lambda: sink.asked, "the collector to be asked")
        proxy.process.terminate()
        assert proxy.process.wait(60) == 0


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://", "http://h:99999999", "ftp://h:1", ""])
def test_an_endpoint_that_is_no_url_is_refused_at_once(endpoint: str) -> None:
    nodes = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    command = [*PD_PROXY, *nodes, "--otlp-traces-endpoint", endpoint]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert "is no URL like http://HOST:4317" in result.stderr
