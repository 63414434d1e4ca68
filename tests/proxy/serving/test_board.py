"""What worker processes tell each other."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from proxy.serving import app
from proxy.serving.assembly import Components
from proxy.serving.board import Board, make_file
from proxy.settings import ProxySettings

Join = Callable[[int], Board]


@pytest.fixture
def join(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Join]:
    """Joins the board at a row. Locks are a process's own, so one process that joins twice must be told where."""
    joined: list[Board] = []

    def at(row: int) -> Board:
        monkeypatch.setattr(Board, "_free_row", lambda _: row)
        joined.append(Board(file))
        return joined[-1]

    yield at
    for board in joined:
        board.close()


@pytest.fixture
def file() -> Iterator[Path]:
    made = make_file(3)
    yield made
    made.unlink()


def test_each_worker_reads_what_the_others_wrote(join: Join) -> None:
    first, second = join(0), join(1)
    first.write({"load": 1})
    second.write({"load": 2})
    first.read()
    second.read()
    assert first.others() == [{"load": 2}]
    assert second.others() == [{"load": 1}]
    first.write({"load": 5})
    second.read()
    assert second.others() == [{"load": 5}]


@pytest.mark.parametrize("written_before", [1, 2, 3])
@pytest.mark.parametrize("from_its_end", [False, True])
def test_a_worker_killed_while_it_writes_leaves_what_it_wrote_before(
    join: Join, written_before: int, from_its_end: bool
) -> None:
    """Whatever part of the writing has reached the memory, and whichever end of it came first."""
    writer = join(0)
    for load in range(written_before):
        writer.write({"load": load})
    memory = writer._memory
    assert memory is not None
    of_workers = slice(0, writer._place(writer._rows, 0))
    before = memory[of_workers]
    writer.write({"load": 99})
    after = memory[of_workers]
    changed = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    if from_its_end:
        changed.reverse()
    for at in changed:
        reader = join(1)
        assert reader.others() == [{"load": written_before - 1 if memory[of_workers] != after else 99}]
        memory[at] = before[at]
    heir, reader = join(0), join(1)
    assert heir.inherited == {"load": written_before - 1}
    heir.write({"load": 7})
    reader.read()
    assert reader.others() == [{"load": 7}]


def test_a_dead_workers_row_counts_no_longer_as_load_and_still_as_history(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, living = join(0), join(1)
    dead.write({"load": 1})
    living.read()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    assert living.others() == []
    assert living.others(alive=False) == [{"load": 1}]


def test_whoever_takes_a_dead_workers_row_inherits_its_history(join: Join) -> None:
    join(0).write({"counted": 7})
    heir = join(0)
    assert heir.inherited == {"counted": 7}
    assert heir.others(alive=False) == []


def test_what_does_not_fit_is_said(join: Join) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        join(0).write({"x": "y" * 300_000})


def test_a_proxy_of_one_process_has_no_board() -> None:
    assert not Board().is_shared
    assert Board().others() == []


def test_one_worker_probes_for_all_and_when_it_dies_another_does(join: Join) -> None:
    """In one process every lock is ours, so who leads is not tried here (`test_workers.py` does), but what is told."""
    leader, follower = join(0), join(1)
    assert leader.lead()
    assert follower.findings() is None
    for number in range(3):
        leader.write_findings({"round": number})
        follower.read()
        found = follower.findings()
        assert found is not None
        assert found[1] == {"round": number}
    assert follower.others() == []
    heir = join(2)
    heir.read()
    heir.write_findings({"round": 7})
    follower.read()
    assert (follower.findings() or (0, {}))[1] == {"round": 7}


def test_what_a_scrape_was_told_all_workers_know_at_once(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a counter falls when the worker dies that answered the last scrape."""
    made: list[Components] = []

    def kept(*given: Any) -> Components:
        made.append(Components(*given))
        return made[-1]

    monkeypatch.setattr(app, "Components", kept)
    told, other = (TestClient(app.make_app(ProxySettings(), join(row))) for row in range(2))
    made[0].metrics.resumed.count("resumed")
    for worker in (told, other):
        assert 'pd_resumed_total{outcome="resumed"} 1.0' in worker.get("/metrics").text
