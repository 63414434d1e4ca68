"""A node that never ends may still be dead."""

import pytest

from engines.base import Gauges
from launcher.run.liveness import Liveness

BUSY = Gauges(running=2, waiting=1, generated=100, computed=50)


def verdicts(*samples: tuple[float, Gauges | None]) -> list[str]:
    liveness = Liveness(hung_after_s=60)
    return [liveness.problem(gauges, now) for now, gauges in samples]


def test_a_node_that_answers_nothing_for_a_while_is_hung() -> None:
    assert verdicts((0, Gauges()), (30, None), (60, None)) == ["", "", "it has answered nothing for 60 s"]


def test_one_that_never_answered_is_given_its_time_too() -> None:
    assert verdicts((0, None), (59, None), (61, None)) == ["", "", "it has answered nothing for 61 s"]


def test_an_answer_is_a_sign_of_life() -> None:
    assert verdicts((0, None), (50, Gauges()), (100, None), (109, None)) == [""] * 4


def test_requests_of_which_nothing_is_made_are_a_sign_of_death() -> None:
    """VLLM's API server answers while its engine core stands still."""
    assert verdicts((0, BUSY), (59, BUSY), (75, BUSY)) == [
        "",
        "",
        "it has 3 requests, and has made nothing of them for 75 s",
    ]


@pytest.mark.parametrize("more", [{"generated": 101}, {"computed": 51}, {"transferred": 1}, {"cached": 1}])
def test_any_token_is_a_sign_of_life(more: dict[str, float]) -> None:
    later = Gauges(running=2, waiting=1, **({"generated": 100, "computed": 50} | more))
    assert verdicts((0, BUSY), (59, later), (100, later)) == [""] * 3


def test_a_node_without_requests_may_rest_for_ever() -> None:
    idle = Gauges(generated=100, computed=50)
    assert verdicts((0, BUSY), (10, idle), (10_000, idle), (10_010, BUSY), (10_050, BUSY)) == [""] * 5
