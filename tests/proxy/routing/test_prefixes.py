"""A model of a prefix cache, beside the cache itself: the simulated node's."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.sim.prefixes import PrefixCache
from proxy.routing.prefixes import MOST_KEYS, Expected, PrefixModel
from proxy.routing.prompts import PIECE_IDS, Prompt, prompt_of

ROOM = 64 * PIECE_IDS
BLOCK = PIECE_IDS


def prompt(*ids: int) -> Prompt:
    """Pieces of so many equal ids each."""
    body = {"prompt": [token for number in ids for token in [number] * PIECE_IDS]}
    return prompt_of(body, len(body["prompt"]))


def computed(model: PrefixModel, asked: Prompt, cached: int | None = None) -> float:
    """One prefill from beginning to end; what was expected to be cached."""
    expected = model.sent(asked)
    model.computed(asked, expected, cached, slack=2 * BLOCK)
    return expected.certain


def test_what_was_computed_is_expected_to_be_cached() -> None:
    model = PrefixModel(ROOM)
    assert computed(model, prompt(1, 2, 3)) == 0
    assert model.cached(prompt(1, 2, 3)) == 3 * PIECE_IDS
    assert model.cached(prompt(1, 2, 9)) == 2 * PIECE_IDS
    assert model.cached(prompt(9, 2, 3)) == 0


def test_half_of_a_prompt_is_half_of_it_however_far_its_tokens_were_guessed_wrong() -> None:
    model = PrefixModel(ROOM)
    guessed = prompt(1, 2)
    guessed.tokens //= 4
    expected = model.sent(guessed)
    guessed.tokens *= 4
    model.computed(guessed, expected, 0, slack=BLOCK)
    longer = prompt(1, 2, 3, 4)
    longer.tokens //= 4
    assert model.cached(longer) == longer.tokens / 2


def test_what_is_on_its_way_is_expected_too_but_not_for_certain() -> None:
    model = PrefixModel(ROOM)
    model.sent(prompt(1, 2))
    second = model.sent(prompt(1, 2, 3))
    assert (second.pieces, second.certain) == (2, 0)


def test_a_prefill_that_failed_left_nothing() -> None:
    model = PrefixModel(ROOM)
    computed(model, prompt(1))
    model.lost(prompt(1, 2, 3), model.sent(prompt(1, 2, 3)))
    assert model.cached(prompt(1, 2, 3)) == PIECE_IDS
    assert model.tokens == PIECE_IDS


def test_a_prefill_that_failed_takes_nothing_from_one_that_is_under_way() -> None:
    model = PrefixModel(ROOM)
    failing = model.sent(prompt(1, 2))
    model.sent(prompt(1, 2, 3))
    model.lost(prompt(1, 2), failing)
    assert model.cached(prompt(1, 2, 3)) == 3 * PIECE_IDS


def test_one_that_failed_takes_nothing_from_another_that_asked_for_the_same() -> None:
    model = PrefixModel(ROOM)
    model.sent(prompt(1, 2))
    model.lost(prompt(1, 2), model.sent(prompt(1, 2)))
    assert model.cached(prompt(1, 2)) == 2 * PIECE_IDS


def test_what_a_longer_prompt_put_there_is_not_computed_by_a_shorter_one() -> None:
    model = PrefixModel(2 * PIECE_IDS)
    short = model.sent(prompt(1, 2))
    computed(model, prompt(8, 9))
    model.capacity = ROOM
    longer = model.sent(prompt(1, 2, 3))
    model.computed(prompt(1, 2), short, 0, slack=BLOCK)
    assert longer.certain == model.sent(prompt(1, 2, 3)).certain == 0


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=6), st.sampled_from(["computed", "lost", "cleared"])
        ),
        max_size=40,
    ),
    st.randoms(use_true_random=False),
)
def test_whatever_fails_and_in_whatever_order_it_ends_it_holds_together(
    played: list[tuple[list[int], str]], source: random.Random
) -> None:
    model, under_way = PrefixModel(6 * PIECE_IDS), list[tuple[Prompt, Expected]]()
    for ids, end in played:
        under_way.append((prompt(*ids), model.sent(prompt(*ids))))
        if source.random() < 0.5:
            asked, expected = under_way.pop(source.randrange(len(under_way)))
            if end == "lost":
                model.lost(asked, expected)
            elif end == "cleared":
                model.clear()
            else:
                model.computed(asked, expected, source.randrange(asked.tokens + 1), slack=BLOCK)
        assert 0 <= model.cached(prompt(*ids)) <= len(ids) * PIECE_IDS
        assert -1e-6 <= model.tokens <= 6 * PIECE_IDS
        assert len(model) <= 6
        assert model.tokens == pytest.approx(len(model) * PIECE_IDS)


def test_what_was_used_longest_ago_goes_first_and_its_end_before_its_beginning() -> None:
    model = PrefixModel(4 * PIECE_IDS)
    computed(model, prompt(1, 2))
    computed(model, prompt(3, 4))
    computed(model, prompt(5))
    assert model.cached(prompt(1, 2)) == PIECE_IDS
    assert model.cached(prompt(3, 4)) == 2 * PIECE_IDS


def test_fewer_cached_tokens_than_expected_mean_that_all_that_is_older_is_gone_too() -> None:
    model = PrefixModel(ROOM)
    computed(model, prompt(1, 1, 1, 1))
    computed(model, prompt(2, 2, 2, 2))
    computed(model, prompt(3, 3, 3, 3))
    computed(model, prompt(2, 2, 2, 2), cached=0)
    assert model.cached(prompt(1, 1, 1, 1)) == 0
    assert model.cached(prompt(2, 2, 2, 2)) == 4 * PIECE_IDS, "it was computed just now"
    assert model.cached(prompt(3, 3, 3, 3)) == 4 * PIECE_IDS


def test_a_prompt_that_others_compute_at_the_same_time_is_no_proof_of_a_loss() -> None:
    model = PrefixModel(ROOM)
    computed(model, prompt(7, 7))
    first, second = model.sent(prompt(1, 1, 1, 1)), model.sent(prompt(1, 1, 1, 1))
    model.computed(prompt(1, 1, 1, 1), first, 0, slack=2 * BLOCK)
    model.computed(prompt(1, 1, 1, 1), second, 0, slack=2 * BLOCK)
    assert model.cached(prompt(7, 7)) == 2 * PIECE_IDS


def test_without_a_prefix_cache_nothing_is_expected() -> None:
    model = PrefixModel(0)
    computed(model, prompt(1, 2))
    assert model.cached(prompt(1, 2)) == 0


def test_a_capacity_that_cannot_be_is_bounded_by_keys() -> None:
    model = PrefixModel(10**30)
    for number in range(MOST_KEYS // 1000 + 5):
        computed(model, Prompt(tuple(range(number * 1000, number * 1000 + 1000)), 1000.0, 0))
    assert len(model) == MOST_KEYS


def test_a_new_life_has_nothing() -> None:
    model = PrefixModel(ROOM)
    computed(model, prompt(1, 2))
    model.clear()
    assert (model.cached(prompt(1, 2)), model.tokens) == (0, 0)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=60))
def test_in_turn_it_knows_exactly_what_a_cache_of_the_same_size_has(asked: list[list[int]]) -> None:
    """Pieces are blocks here, so that no rounding lies between the two."""
    pieces = 12
    model, cache = PrefixModel(pieces * PIECE_IDS), PrefixCache(PIECE_IDS, pieces)
    for ids in asked:
        of_ids = prompt(*ids)
        expected = model.cached(of_ids)
        found = cache.compute(tuple(token for number in ids for token in [number] * PIECE_IDS))
        assert found == min(expected, (len(ids) - 1) * PIECE_IDS), "the last token is computed always"
        computed(model, of_ids, found)
        assert model.tokens <= pieces * PIECE_IDS
