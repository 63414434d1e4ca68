"""The proxy's own figures, under `pd_`. Observed once at the end of an exchange, never for a chunk."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.base import Role

from .pool import Pool
from .transfer import TransferWatch

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, which nobody reads

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Label values come from us, never from a client: the number of series is bounded."""

    def __init__(self, pool: Pool, watch: TransferWatch) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Nodes(pool, watch))
        self.requests = Counter(
            "pd_requests",
            "Client requests by route, path taken and status.",
            ["route", "path", "status"],
            registry=self._registry,
        )
        self.hand_offs = Counter(
            "pd_hand_offs",
            "Prefill legs that held KV for a decode leg, by what became of it.",
            ["outcome"],
            registry=self._registry,
        )
        self.aggregated = Counter(
            "pd_aggregated",
            "Requests answered by one node as a whole, by reason.",
            ["reason"],
            registry=self._registry,
        )
        self.releases = Counter(
            "pd_releases",
            "Hand-offs given back because no decode node took them.",
            ["outcome"],
            registry=self._registry,
        )
        self.prefill_seconds = Histogram(
            "pd_prefill_seconds", "Prefill leg, request to answer.", buckets=_SECONDS, registry=self._registry
        )
        self.first_event_seconds = Histogram(
            "pd_time_to_first_event_seconds",
            "Client request to the first byte of decode's answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Nodes(Collector):
    """Each node's state, read when asked for."""

    def __init__(self, pool: Pool, watch: TransferWatch) -> None:
        self._pool = pool
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        usable = GaugeMetricFamily("pd_node_usable", "1 when the node gets requests.", labels=["node", "role"])
        in_flight = GaugeMetricFamily("pd_node_in_flight", "Legs on the node now.", labels=["node", "role"])
        for node in self._pool:
            labels = [node.spec.name, node.spec.role.value]
            usable.add_metric(labels, float(node.usable))
            in_flight.add_metric(labels, node.in_flight)
        yield usable
        yield in_flight
        yield from self._transfers()

    def _transfers(self) -> Iterable[Metric]:
        handed = CounterMetricFamily(
            "pd_hand_off_prompt_tokens", "Prompt tokens of the hand-offs the decode node answered.", labels=["node"]
        )
        arrived = CounterMetricFamily(
            "pd_arrived_prompt_tokens", "Prompt tokens whose KV the decode node says it received.", labels=["node"]
        )
        moving = GaugeMetricFamily(
            "pd_kv_moving", "1 when KV moves to the decode node, 0 when it does not.", labels=["node"]
        )
        for node in self._pool.of(Role.DECODE):
            handed.add_metric([node.spec.name], node.handed_tokens)
            arrived.add_metric([node.spec.name], self._watch.arrived(node))
            if self._watch.verdict(node) != "unproven":
                moving.add_metric([node.spec.name], float(self._watch.verdict(node) == "moving"))
        yield handed
        yield arrived
        yield moving
