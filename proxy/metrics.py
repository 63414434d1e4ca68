"""The proxy's own figures. Observed once at the end of an exchange, never for a chunk.

Kept as plain numbers, and put into Prometheus' words when somebody asks (`serving/exposition.py`): the client library
takes a lock for every count, and a worker process must hand its figures to the others, which numbers can be.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping
from typing import Any

EDGES_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600
)  # fmt: skip
BETWEEN = "\n"
"""Between the label values of one series, in a key."""
GONE = "gone"
"""The node label of all nodes that are no more: series do not pile up."""


class Counts:
    """A counter with labels. Their values come from us, never from a client: the number of series is bounded."""

    def __init__(self, text: str, *labels: str) -> None:
        self.text = text
        self.labels = labels
        self.values: dict[str, float] = {}

    def count(self, *labels: str, by: float = 1) -> None:
        key = BETWEEN.join(labels)
        self.values[key] = self.values.get(key, 0) + by

    def forget_nodes(self, alive: Collection[str]) -> None:
        """Add up the series of nodes that are gone."""
        place = self.labels.index("node")
        for key in tuple(self.values):
            labels = key.split(BETWEEN)
            if labels[place] not in alive and labels[place] != GONE:
                labels[place] = GONE
                self.count(*labels, by=self.values.pop(key))


class Seconds:
    """A histogram of durations, with labels."""

    def __init__(self, text: str, *labels: str) -> None:
        self.text = text
        self.labels = labels
        self.values: dict[str, list[float]] = {}
        """Of each series the counts of its buckets, and the sum."""

    def observe(self, seconds: float, *labels: str) -> None:
        key = BETWEEN.join(labels)
        series = self.values.get(key)
        if series is None:
            series = self.values[key] = [0.0] * (len(EDGES_S) + 2)
        series[bisect_left(EDGES_S, seconds)] += 1
        series[-1] += seconds


class Metrics:
    """What this process has counted. `pd_` and the attribute's name is the series' name."""

    def __init__(self) -> None:
        self.requests = Counts("Client requests by route, path taken and status.", "route", "path", "status")
        self.hand_offs = Counts("Hand-offs whose KV a prefill node held, by what became of it.", "outcome")
        self.aggregated = Counts("Requests answered by one node as a whole, by reason.", "reason")
        self.releases = Counts("Hand-offs given back because no decode node took them.", "outcome")
        self.node_requests = Counts("Requests sent to a node: legs, attempts, continuations.", "node")
        self.node_errors = Counts("Failures of a node, by kind.", "node", "kind")
        self.retries = Counts("Attempts after the first, by what made them necessary.", "reason")
        self.resumed = Counts("Streams that lost their node in the middle, by whether they went on.", "outcome")
        self.prompt_tokens = Counts("Prompt tokens of answered requests, as prefill nodes count them.", "path")
        self.output_tokens = Counts("Tokens of answers that were noted: streams, and answers put together.", "path")
        self.canaries = Counts("Questions of the KV canary, one for each pair, by what came of it.", "outcome")
        self.prefix_predictions = Counts(
            "Predictions of what a prefill node has cached of a prompt, by what the node said.", "node", "outcome"
        )
        self.prefix_predicted_tokens = Counts("Prompt tokens predicted to be cached on a prefill node.", "node")
        self.prefix_cached_tokens = Counts("Prompt tokens that were, as the node says.", "node")
        self.role_changes = Counts("Nodes that do both and turned to the other role, by reason.", "reason")
        self.trace_spans = Counts("Spans of traces, by what became of them.", "outcome")
        self.task_restarts = Counts("Restarts of the proxy's own background tasks.", "task")
        self.in_flight = 0
        self.queued = 0
        self.releases_pending = 0
        self.tasks = 0
        self.request_memory_bytes = 0
        self.connections = 0
        self.request_seconds = Seconds("Client request to the end of its answer.", "route", "path")
        self.time_to_first_event_seconds = Seconds(
            "Client request to the first event of its answer, or all of it.", "route", "path"
        )
        self.queue_seconds = Seconds("Client request to being let in.")
        self.prefill_seconds = Seconds("Prefill leg, request to answer.")
        self.hand_off_seconds = Seconds("Decode leg, request to first event: its queue, the KV's way, the first step.")
        self.mean_inter_token_seconds = Seconds("Time between two tokens of a stream, its mean.")
        self.loop_lag_seconds = Seconds("How late a timer of the event loop was: what every stream waits for.")

    def of(self, kind: Any) -> list[tuple[str, Any]]:
        """(name, counts or histogram) of all of a kind."""
        return [(name, value) for name, value in vars(self).items() if isinstance(value, kind)]

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON-able data, to be summed with that of other workers."""
        return {
            "counts": {name: counts.values for name, counts in self.of(Counts)},
            "gauges": {
                "requests_in_flight": self.in_flight,
                "requests_queued": self.queued,
                "releases_pending": self.releases_pending,
                "tasks": self.tasks,
                "request_memory_bytes": self.request_memory_bytes,
                "connections": self.connections,
            },
            "seconds": {name: seconds.values for name, seconds in self.of(Seconds)},
        }

    def adopt(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from the counts of a worker that died."""
        for name, counts in self.of(Counts):
            counts.values = dict(snapshot["counts"].get(name, {}))
        for name, seconds in self.of(Seconds):
            seconds.values = {key: list(series) for key, series in snapshot["seconds"].get(name, {}).items()}

    def forget_nodes(self, alive: Collection[str]) -> None:
        """Series of nodes that are gone become one."""
        for _, counts in self.of(Counts):
            if "node" in counts.labels:
                counts.forget_nodes(alive)
