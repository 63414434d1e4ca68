"""When a child is started again, and when no more."""

from hypothesis import given
from hypothesis import strategies as st

from launcher.run.restarts import RestartPolicy


def test_pauses_grow_and_after_too_many_failures_it_is_given_up() -> None:
    policy = RestartPolicy(first_pause_s=1, longest_pause_s=6, most_failures=4)
    assert [policy.pause_s(failures) for failures in range(1, 6)] == [1, 2, 4, 6, None]


@given(st.integers(1, 10_000))
def test_a_pause_is_never_longer_than_the_longest(failures: int) -> None:
    pause_s = RestartPolicy().pause_s(failures)
    assert pause_s is None or 0 < pause_s <= 30
