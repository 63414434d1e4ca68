"""What worker processes tell each other."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.board import Board, make_file

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
    first.look()
    second.look()
    assert first.others() == [{"load": 2}]
    assert second.others() == [{"load": 1}]
    first.write({"load": 5})
    second.look()
    assert second.others() == [{"load": 5}]


def test_a_row_that_is_being_written_stays_as_it_was(join: Join) -> None:
    writer, reader = join(0), join(1)
    writer.write({"load": 1})
    reader.look()
    assert writer._memory is not None
    writer._memory[0:8] = (99).to_bytes(8, "little")  # the writer is killed after its first stroke
    reader.look()
    assert reader.others() == [{"load": 1}]


def test_a_dead_workers_row_counts_no_longer_as_load_and_still_as_history(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, living = join(0), join(1)
    dead.write({"load": 1})
    living.look()
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
