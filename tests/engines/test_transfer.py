"""Does KV move? From what a decode node computed itself."""

import pytest

from engines.transfer import Transfer


@pytest.mark.parametrize(
    ("transfer", "moves", "does_not"),
    [
        (Transfer(), False, False),
        (Transfer(hand_offs=5, prompt_tokens=500, computed=5, transferred=495), True, False),
        (Transfer(hand_offs=5, prompt_tokens=500, computed=500, transferred=0), False, True),
        (Transfer(hand_offs=2, prompt_tokens=200, computed=200, transferred=0), False, False),
        (Transfer(hand_offs=5, prompt_tokens=500, computed=100, transferred=0), False, False),
    ],
    ids=["nothing asked", "it came", "all computed again", "too few to say", "its own prefix cache had it"],
)
def test_a_node_that_computes_what_was_handed_over_gets_no_kv(transfer: Transfer, moves: bool, does_not: bool) -> None:
    assert transfer.is_moving is moves
    assert transfer.is_not_moving is does_not


@pytest.mark.parametrize(
    ("computed", "transferred", "whole"),
    [(0, 100, True), (1, 99, True), (0, 60, True), (17, 83, False), (100, 0, False), (50, 99, True)],
)
def test_of_a_whole_prompt_at_most_the_last_token_is_computed(computed: int, transferred: int, whole: bool) -> None:
    """Hybrid models transfer all but one; a part that the node's own cache had is neither; others may be computed."""
    assert Transfer(1, 100, computed, transferred).is_whole is whole
