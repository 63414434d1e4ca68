"""Which prompts begin alike, as far as bytes tell."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.prompts import MOST_PIECES, PIECE_BYTES, PIECE_IDS, Prompt, prompt_of

SYSTEM = {"role": "system", "content": "Be brief, and say nothing that is not so. " * 20}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


def shared(first: dict[str, Any], second: dict[str, Any]) -> int:
    """Pieces that both begin with."""
    keys = prompt_of(first, 0).keys, prompt_of(second, 0).keys
    return sum(one == other for one, other in zip(*keys, strict=False))


def test_a_conversation_that_goes_on_begins_as_it_did_before() -> None:
    before = {"model": "m", "messages": [SYSTEM, {"role": "user", "content": "Hello there. " * 30}]}
    after = {"model": "m", "messages": [*before["messages"], {"role": "assistant", "content": "Hello."}]}
    assert shared(before, after) == len(prompt_of(before, 0).keys) > 3


@pytest.mark.parametrize("role", ["system", "instructions"])
def test_what_is_said_before_the_messages_comes_first(role: str) -> None:
    said = "Be brief, and say nothing that is not so. " * 20
    one, other = ({role: said, "messages": [{"role": "user", "content": word * 100}]} for word in ("yes ", "no "))
    assert shared(one, other) == len(said) // PIECE_BYTES


def test_the_same_text_in_a_completion() -> None:
    text = "word " * 200
    assert shared({"prompt": text + "one" * 100}, {"prompt": text + "two" * 100}) == len(text) // PIECE_BYTES


def test_token_ids_are_told_apart_by_number() -> None:
    ids = list(range(1000))
    assert shared({"prompt": ids}, {"prompt": [*ids[:500], 7, *ids[501:]]}) == 500 // PIECE_IDS
    assert len(prompt_of({"prompt": ids}, 0).keys) == 1000 // PIECE_IDS


@pytest.mark.parametrize("field", ["model", "cache_salt", "chat_template", "chat_template_kwargs"])
def test_nothing_is_shared_where_the_engine_shares_nothing(field: str) -> None:
    body = {"model": "m", "messages": [SYSTEM]}
    assert shared(body, body | {field: "other"}) == 0


def test_a_large_body_that_was_parsed_elsewhere_has_the_same_keys() -> None:
    body = {"model": "m", "messages": [SYSTEM] * 3}
    assert prompt_of(body | {"messages": orjson.Fragment(orjson.dumps(body["messages"]))}, 0) == prompt_of(body, 0)


def test_what_is_too_long_is_looked_at_up_to_a_limit() -> None:
    assert len(prompt_of({"prompt": "x" * (5 * 2**20)}, 0).keys) == MOST_PIECES
    assert len(prompt_of({"prompt": [1] * 200_000}, 0).keys) == MOST_PIECES


def test_pieces_are_counted_in_parts_too() -> None:
    prompt = prompt_of({"prompt": [1] * PIECE_IDS * 4}, 100)
    assert (len(prompt.keys), prompt.pieces, prompt.piece_tokens) == (4, 4.0, 25)
    longer = prompt_of({"prompt": [1] * (PIECE_IDS * 4 + PIECE_IDS // 2)}, 90)
    assert (len(longer.keys), longer.pieces, longer.piece_tokens) == (4, 4.5, 20)


def test_a_list_that_is_no_prompt_of_ids_is_looked_at_as_text() -> None:
    assert len(prompt_of({"prompt": [1, [2], {}] * 200}, 0).keys) > 0


def test_no_prompt_has_no_keys() -> None:
    assert prompt_of({"model": "m"}, 3) == Prompt(tokens=3, guess=3)


@given(
    st.dictionaries(
        st.sampled_from(["model", "prompt", "messages", "system", "tools", "input", "cache_salt"]), json_values
    )
)
def test_whatever_a_client_sends_has_keys_or_none(body: dict[str, Any]) -> None:
    prompt = prompt_of(body, 1)
    assert len(prompt.keys) <= MOST_PIECES
    assert prompt == prompt_of(body, 1)
