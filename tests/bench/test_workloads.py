"""What `make bench-routing` asks."""

from pathlib import Path

import pytest

from tests.bench.workloads import BLOCK_BYTES, WORKLOADS, Arrival, uncached


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_gives_the_same_requests_in_order(name: str) -> None:
    arrivals = WORKLOADS[name](100, 7)
    assert arrivals == WORKLOADS[name](100, 7) != WORKLOADS[name](100, 8)
    assert len(arrivals) == 100
    assert [one.at for one in arrivals] == sorted(one.at for one in arrivals)


def share_uncached(arrivals: list[Arrival]) -> float:
    return sum(uncached(arrivals)) / sum(one.tokens for one in arrivals)


def test_what_is_shared_is_shared_and_what_is_not_is_not() -> None:
    assert share_uncached(WORKLOADS["unshared"](300, 1)) == 1
    assert share_uncached(WORKLOADS["hot"](300, 1)) < 0.2
    assert share_uncached(WORKLOADS["chats"](300, 1)) < 0.5


def test_where_the_published_trace_is_not_one_like_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.workloads.TRACE", Path("/nowhere"))
    made = WORKLOADS["trace"](1000, 1)
    assert len(made) == 1000
    assert 0.4 < share_uncached(made) < 0.9


def test_only_the_beginning_that_was_there_before_is_cached() -> None:
    arrivals = [Arrival(0, (1, 2, 3), 10, 1), Arrival(1, (1, 2, 9), 10, 1), Arrival(2, (2, 3), 10, 1)]
    assert list(uncached(arrivals)) == [3 * 512 + 10, 512 + 10, 2 * 512 + 10]


def test_equal_blocks_are_equal_text_and_tails_are_not() -> None:
    first, second = Arrival(0, (1, 2), 100, 1).prompt(0), Arrival(1, (1, 2, 3), 100, 1).prompt(1)
    assert first[: 2 * BLOCK_BYTES] == second[: 2 * BLOCK_BYTES]
    assert first[2 * BLOCK_BYTES :] not in second
