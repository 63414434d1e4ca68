"""How many bytes of requests are in memory at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import OverloadedError
from proxy.exchange.memory import MemoryBudget


@given(st.lists(st.lists(st.integers(0, 40), max_size=4), max_size=8))
def test_no_more_than_the_budget_is_ever_taken_and_all_of_it_comes_back(requests: list[list[int]]) -> None:
    budget = MemoryBudget(100)
    open_ones = []
    for sizes in requests:
        reservation = budget.reservation()
        open_ones.append(reservation)
        for size in sizes:
            try:
                reservation.add(size)
            except OverloadedError:
                assert budget.used + size > 100
        assert budget.used == sum(each.size for each in open_ones) <= 100
    for reservation in open_ones:
        reservation.release()
        reservation.release()
    assert budget.used == 0


def test_what_is_over_it_is_asked_to_come_back() -> None:
    budget = MemoryBudget(10)
    with budget.reservation() as first:
        first.add(8)
        with budget.reservation() as second, pytest.raises(OverloadedError, match="Try again in 2 s"):
            second.add(3)
    assert budget.used == 0
