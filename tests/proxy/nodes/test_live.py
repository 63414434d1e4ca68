"""How many tokens of KV a decode node's running requests hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Role
from engines.topology import Node as Spec
from proxy.nodes.live import LiveTokens
from proxy.nodes.node import Node


def test_prompts_and_what_was_generated_since() -> None:
    live = LiveTokens(prompts=100, token_s=0.5)
    live.begin(10.0)
    live.begin(12.0)
    assert live.count(14.0) == 100 + 8 + 4
    live.end(10.0)
    assert live.count(14.0) == 100 + 4


def test_streams_that_are_slower_generate_less() -> None:
    live = LiveTokens(token_s=0.1)
    for _ in range(100):
        live.measured(0.4)
    live.begin(0.0)
    assert live.count(40.0) == pytest.approx(100, rel=0.01)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.booleans()), max_size=50))
def test_it_is_the_sum_over_all_streams(began: list[tuple[float, bool]]) -> None:
    live = LiveTokens(token_s=0.1)
    for at, _ in began:
        live.begin(at)
    for at, is_over in began:
        if is_over:
            live.end(at)
    running = [at for at, is_over in began if not is_over]
    assert live.count(2e6) == pytest.approx(sum((2e6 - at) / 0.1 for at in running), rel=1e-6)


def test_a_lease_counts_its_prompt_and_its_stream_wherever_it_moves() -> None:
    first, second = (Node(Spec(name=name, role=Role.DECODE, url=f"http://{name}:1")) for name in ("a", "b"))
    with first.lease(tokens=10) as seat:
        seat.holds(30)
        assert (first.live.prompts, second.live.prompts) == (30, 0)
        seat.move(second)
        assert (first.live.prompts, second.live.prompts) == (0, 30)
        seat.generates()
        seat.generates()
        assert second.live.streams == 1
    assert (second.live.prompts, second.live.streams, second.live.count(1e9)) == (0, 0, 0)
