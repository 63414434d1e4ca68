"""What worker processes tell each other at once."""

import mmap
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.serving.journal import RING_BYTES, Journal

START = 64
Join = Callable[[int], Journal]
key = st.integers(-(2**63), 2**63 - 1)


def joining(rings: int) -> Join:
    memory = mmap.mmap(-1, START + rings * RING_BYTES)
    return lambda own: Journal(memory, START, rings, own)


@pytest.fixture
def join() -> Join:
    return joining(3)


def heard(journal: Journal) -> list[object]:
    return [record for _, record in journal.read()]


def test_each_hears_what_the_others_say_once_and_in_order(join: Join) -> None:
    first, second, third = join(0), join(1), join(2)
    heard(first)
    heard(second)
    first.write(["a"], (1, -(2**63)))
    first.write({"b": None})
    second.write("c")
    assert list(third.read()) == [(0, (["a"], (1, -(2**63)))), (0, ({"b": None}, ())), (1, ("c", ()))]
    assert heard(third) == []
    assert heard(second) == [(["a"], (1, -(2**63))), ({"b": None}, ())]


def test_what_was_said_before_one_came_is_not_heard(join: Join) -> None:
    first = join(0)
    first.write("early")
    late = join(1)
    assert heard(late) == []


def test_a_process_that_takes_over_is_told_from_the_one_before(join: Join) -> None:
    listener = join(1)
    join(0).write("of the first")
    join(0).write("of the second")
    assert heard(listener) == [None, ("of the first", ()), None, ("of the second", ())]


def test_a_listener_that_was_away_too_long_knows_that_it_missed_some(join: Join) -> None:
    first, second = join(0), join(1)
    heard(second)
    for _ in range(10):
        first.write("long", tuple(range(20_000)))
    assert heard(second) == [None]
    first.write("short")
    assert heard(second) == [("short", ())]


def test_what_does_not_fit_is_not_said(join: Join) -> None:
    first, second = join(0), join(1)
    heard(second)
    first.write("too long", tuple(range(100_000)))
    first.write("short")
    assert heard(second) == [("short", ())]


def test_a_record_that_is_overwritten_while_it_is_read_counts_as_missed(join: Join) -> None:
    first, second = join(0), join(1)
    heard(second)
    first.write("one", (1, 2, 3))
    first._memory[START + 8 + 40] ^= 255
    assert heard(second) == [None]


@given(st.lists(st.tuples(st.text(max_size=20), st.lists(key, max_size=9000), st.booleans()), max_size=30))
def test_all_is_heard_whole_however_often_the_ring_goes_round(said: list[tuple[str, list[int], bool]]) -> None:
    join = joining(2)
    first, second = join(0), join(1)
    heard(second)
    first.write("all of it", tuple(range(RING_BYTES // 8 // 2 - 1000)))  # near its middle
    heard(second)
    told = list[object]()
    for text, keys, listens in said:
        first.write(text, tuple(keys))
        told.append((text, tuple(keys)))
        if listens or len(told) > 5:
            assert heard(second) == told
            told.clear()
