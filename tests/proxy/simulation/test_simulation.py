"""Deployments in virtual time: what can be worked out by hand, and what must hold whatever happens."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.performance import Constants
from proxy.simulation.__main__ import answer
from proxy.simulation.engines import Cache, Job
from proxy.simulation.world import Shape, World

CONSTANTS = Constants(
    prefill=(0.1, 0.001, 0.0), decode=(0.01, 0.0, 0.0), hand_off=(0.05, 0.0), kv_tokens=100_000, sequences=8,
    step_tokens=150,
)  # fmt: skip
requests = st.lists(
    st.tuples(st.floats(0, 5), st.integers(1, 3000), st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=25
)


def job(number: int, due: float, tokens: int = 100, output: int = 11, keys: tuple[int, ...] = ()) -> Job:
    return Job(number, due, tokens, output, keys, 64)


def played(shape: Shape, *jobs: Job, constants: Constants = CONSTANTS) -> World:
    world = World(shape, constants)
    world.play(jobs)
    return world


def test_one_request_through_a_pair_takes_prefill_hand_off_and_its_steps() -> None:
    one = job(0, due=1.0)
    played(Shape(prefill=1, decode=1), one)
    assert one.first == pytest.approx(1.0 + 0.2 + 0.05 + 0.01)
    assert one.ended == pytest.approx(one.first + 10 * 0.01)
    assert one.stages == pytest.approx(
        {"prefill queue": 0, "prefill": 0.2, "hand-off": 0.05, "decode queue": 0, "decode": 0.1}, abs=0.011
    )


def test_prompts_wait_for_those_before_them() -> None:
    first, second = job(0, 0.0), job(1, 0.0)
    played(Shape(prefill=1, decode=1), first, second)
    assert second.first == pytest.approx(0.4 + 0.05 + 0.01)
    assert second.stages["prefill queue"] == pytest.approx(0.2)


def test_prompts_that_wait_together_are_computed_in_one_step_where_they_fit() -> None:
    wide = CONSTANTS.model_copy(update={"step_tokens": 1000})
    first, second, third = (job(number, 0.001 * number) for number in range(3))
    played(Shape(prefill=1, decode=1), first, second, third, constants=wide)
    assert first.stages["prefill"] == pytest.approx(0.2)
    assert second.first == third.first == pytest.approx(0.2 + 0.4 + 0.05 + 0.01)


def test_two_prefill_nodes_share_them() -> None:
    first, second = job(0, 0.0), job(1, 0.0)
    played(Shape(prefill=2, decode=1), first, second)
    assert {round(one.first, 6) for one in (first, second)} == {0.26}


def test_what_a_prefill_node_has_cached_it_does_not_compute_again() -> None:
    keys = tuple(range(10))
    first, second = job(0, 0.0, 640, keys=keys), job(1, 5.0, 640, keys=keys)
    played(Shape(prefill=1, decode=1), first, second)
    assert first.stages["prefill"] == pytest.approx(0.74)
    assert second.stages["prefill"] == pytest.approx(0.101)


def test_on_an_ordinary_node_a_prompt_delays_the_tokens_of_others() -> None:
    first, second = job(0, 0.0, output=101), job(1, 0.5)
    played(Shape(ordinary=1), first, second)
    alone = job(0, 0.0, output=101)
    played(Shape(ordinary=1), alone)
    assert first.ended - alone.ended == pytest.approx(0.2, abs=0.02)
    assert second.first == pytest.approx(0.5 + 0.2, abs=0.02)


def test_who_finds_no_room_on_a_decode_node_waits_for_it() -> None:
    narrow = CONSTANTS.model_copy(update={"kv_tokens": 150, "hand_off": (0.0, 0.0)})
    first, second = job(0, 0.0), job(1, 0.0)
    played(Shape(prefill=2, decode=1), first, second, constants=narrow)
    last = max(first, second, key=lambda one: one.first)
    assert last.stages["decode queue"] == pytest.approx(0.11, abs=0.02)


def test_a_step_takes_longer_with_more_sequences() -> None:
    slower = CONSTANTS.model_copy(update={"decode": (0.01, 0.01, 0.0)})
    jobs = [job(number, 0.0, output=101) for number in range(4)]
    played(Shape(prefill=4, decode=1), *jobs, constants=slower)
    assert jobs[0].ended - jobs[0].first == pytest.approx(100 * 0.05, rel=0.05)


@given(requests, st.sampled_from([Shape(1, 1), Shape(2, 1), Shape(1, 3), Shape(ordinary=1), Shape(ordinary=3)]))
def test_every_request_comes_to_its_end_in_order_and_no_sooner_than_it_can(
    rows: list[tuple[float, int, int, int]], shape: Shape
) -> None:
    jobs = [
        Job(number, at, tokens, output, tuple(range(shared)) if tokens >= 64 * shared else (), 64)
        for number, (at, tokens, output, shared) in enumerate(rows)
    ]
    world = played(shape, *jobs)
    for one in jobs:
        assert one.due < one.first <= one.ended + 1e-9
        assert one.ended - one.first >= 0.01 * (one.output - 1) - 1e-6
        assert all(seconds >= -1e-9 for seconds in one.stages.values())
    assert all(0 <= share <= 1 + 1e-6 for share in world.busy(max(one.ended for one in jobs)).values())


@given(requests)
def test_the_same_requests_have_the_same_end(rows: list[tuple[float, int, int, int]]) -> None:
    ends = []
    for _ in range(2):
        jobs = [job(number, at, tokens, output) for number, (at, tokens, output, _) in enumerate(rows)]
        played(Shape(prefill=2, decode=2), *jobs)
        ends.append([one.ended for one in jobs])
    assert ends[0] == ends[1]


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    cache = Cache(128)
    assert cache.take(job(0, 0, 128, keys=(1, 2))) == 0
    assert cache.take(job(1, 0, 128, keys=(1, 2))) == 127, "the last token is computed always"
    assert cache.take(job(2, 0, 64, keys=(3,))) == 0
    assert cache.take(job(3, 0, 128, keys=(1, 2))) == 64


QUESTION: dict[str, Any] = {
    "constants": json.loads(CONSTANTS.model_dump_json()) | {"rest_s": 1.0},
    "piece_tokens": 64,
    "shapes": [{"prefill": 1, "decode": 1}, {"ordinary": 2}],
    "requests": [[0.0, 100, 11, [1, 2]], [0.5, 100, 11, [1, 3]]],
}


def test_as_a_program_it_answers_for_each_shape() -> None:
    command = [sys.executable, "-P", "-m", "proxy.simulation"]
    result = subprocess.run(command, input=json.dumps(QUESTION).encode(), capture_output=True, check=True, timeout=60)
    pair, ordinary = json.loads(result.stdout)
    assert pair == answer(QUESTION)[0]
    due, first, ended = pair["rows"][0]
    assert (due, first) == (0.0, pytest.approx(0.26 + 1.0))
    assert ended == pytest.approx(first + 0.1)
    assert set(ordinary["stages"]) == {"queue", "prefill", "decode"}
    assert set(pair["busy"]) == {"prefill", "decode"}


def test_constants_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="prefill"):
        answer(QUESTION | {"constants": {"decode": [1, 2, 3]}})
