"""One worker probes for all; the others take over what it found, unless they know better."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engines.base import Gauges, NodeFacts, Rank, Role
from engines.topology import Node, Topology
from proxy.metrics import Metrics
from proxy.nodes.fleet import Fleet
from proxy.nodes.transfer import TransferWatch
from proxy.serving.board import Board, make_file
from proxy.serving.sharing import Sharing

CARD: dict[str, Any] = {"id": "m", "max_model_len": 100}


class Worker:
    """A worker's part of what is shared, without its tasks."""

    def __init__(self, file: Path, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Board, "_free_row", lambda _: row)
        nodes = (Node(name="p", role=Role.PREFILL, url="http://p:1", bootstrap="http://p:2"),)
        self.fleet = Fleet(Topology(nodes=nodes))
        self.board, watch = Board(file), TransferWatch(self.fleet)
        self.sharing = Sharing(self.board, Metrics(), self.fleet, watch, lambda: None, lambda: None)
        (self.node,) = self.fleet

    def probed(self, at: float, engine_id: str, adapters: int = 0, layout: Mapping[str, str] | None = None) -> None:
        cards = (CARD, *({"id": f"adapter-{number}", "parent": "m", "root": "x" * 400} for number in range(adapters)))
        self.node.ready((Rank(0, engine_id),), NodeFacts(cards, Gauges(), "0.32.0", layout or {}))
        self.node.probed_at = at
        self.sharing.publish()

    def follow(self) -> None:
        self.sharing._adopt_findings()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Worker, Worker]]:
    file = make_file(2)
    made = Worker(file, 0, monkeypatch), Worker(file, 1, monkeypatch)
    yield made
    for worker in made:
        worker.board.close()
    file.unlink()


def test_a_follower_knows_what_the_probes_found(workers: tuple[Worker, Worker]) -> None:
    leader, follower = workers
    leader.probed(1, "first life")
    follower.follow()
    assert follower.node.usable
    assert follower.node.ranks == (Rank(0, "first life"),)


def test_a_follower_tells_nodes_apart_by_their_kv_caches_too(workers: tuple[Worker, Worker]) -> None:
    leader, follower = workers
    leader.probed(1, "first life", layout={"block_size": "16"})
    follower.follow()
    assert follower.node.layout == {"block_size": "16"}


def test_a_failure_that_a_worker_met_is_not_undone_by_an_older_probe(workers: tuple[Worker, Worker]) -> None:
    """Not even when the findings were written after it, because another node was probed."""
    leader, follower = workers
    leader.probed(1, "first life")
    follower.follow()
    follower.node.failed("cannot be reached")
    follower.node.failed_at = 2
    leader.probed(1, "first life")  # written again, with what was found before
    follower.follow()
    assert follower.node.why_not == "cannot be reached"
    leader.probed(3, "second life")
    follower.follow()
    assert follower.node.ranks == (Rank(0, "second life"),)


def test_nodes_with_very_many_adapters_are_told_of_too(workers: tuple[Worker, Worker]) -> None:
    leader, follower = workers
    leader.probed(1, "life", adapters=5000)
    follower.follow()
    assert len(follower.node.models) == 5001


def test_findings_that_fit_nowhere_stop_no_probes(
    workers: tuple[Worker, Worker], caplog: pytest.LogCaptureFixture
) -> None:
    leader, follower = workers
    leader.probed(1, "life", adapters=50_000)
    assert "does not fit" in caplog.text
    leader.probed(2, "life")
    follower.follow()
    assert follower.node.usable
