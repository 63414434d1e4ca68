"""What two answers to the canary's question may differ in, and what not."""

import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai import canary
from engines.openai.canary import ANSWER_TOKENS, MOST_APART, Step, difference, steps


def answer(*tokens: dict[str, float]) -> tuple[Step, ...]:
    """Each token's chances; the most likely one is what was said."""
    return tuple(Step(max(chances, key=lambda token: chances[token]), chances) for chances in tokens)


SURE = {"a": -0.1, "b": -4.0}
TIE = {"a": -0.6, "b": -0.7}
TURNED = {"a": -0.7, "b": -0.6}


@pytest.mark.parametrize(
    ("handed_over", "differs"),
    [
        (answer(SURE, SURE), None),
        (answer(SURE, {"a": -0.3, "b": -3.9}), None),
        (answer({"a": -0.9, "b": -3.0}, SURE), "token 2 is the same, and log probabilities are 0.45 nats apart"),
        (answer(SURE, {"b": -0.1, "a": -4.0}), "token 2 is b for a, and log probabilities are 1.95 nats apart"),
        (answer(SURE, {"c": -0.1, "d": -4.0}), "token 2 is c for a, and log probabilities are 0.97 nats apart"),
    ],
)
def test_what_the_model_finds_likely_must_agree(handed_over: tuple[Step, ...], differs: str | None) -> None:
    found = difference(answer(SURE, SURE), handed_over)
    assert found is None if differs is None else found is not None and found.startswith(differs)


def test_two_tokens_nearly_as_likely_may_change_places_and_nothing_is_compared_behind_them() -> None:
    assert difference(answer(TIE, SURE), answer(TURNED, {"x": -0.1, "y": -5.0})) is None


def test_a_token_that_the_other_does_not_even_list_is_at_least_as_far_apart_as_its_last() -> None:
    assert difference(answer({"a": -0.1}), answer({"b": -0.1, "c": -9.0})) == (
        "token 1 is b for a, and log probabilities are 8.90 nats apart in the mean"
    )


chances = st.dictionaries(st.sampled_from("abcdef"), st.floats(-20, 0), min_size=1, max_size=5)


@given(st.lists(chances, min_size=1, max_size=6), st.floats(-MOST_APART / 1.01, MOST_APART / 1.01))
def test_rounding_is_never_a_difference(tokens: list[dict[str, float]], noise: float) -> None:
    """Each chance moved up or down by up to that; whichever token wins then."""
    moved = [
        {token: chance + (noise if index % 2 else -noise) for index, (token, chance) in enumerate(step.items())}
        for step in tokens
    ]
    assert difference(answer(*tokens), answer(*moved)) is None


def told(tokens: list[str], chances: list[Any], top: list[Any] | None, **fields: Any) -> bytes:
    logprobs = {"tokens": tokens, "token_logprobs": chances, "top_logprobs": top}
    return orjson.dumps({"choices": [{"logprobs": logprobs, **fields}]})


COUNT = ANSWER_TOKENS


def test_an_answer_tells_its_tokens_and_their_chances() -> None:
    top = {"token_id:5": -0.5, "token_id:6": -1}
    assert steps(told(["token_id:5"] * COUNT, [-0.5] * COUNT, [top] * COUNT)) == (Step("token_id:5", top),) * COUNT


def test_the_pair_is_asked_for_what_follows_the_first_token_of_the_answer_alone() -> None:
    """So that either way the decode node makes each token that is compared in a step of its own."""
    count = COUNT + 1
    raw = told(["x", *"a" * COUNT], [-1] * count, [{}] * count, prompt_token_ids=[1, 2], token_ids=[3, *range(COUNT)])
    found = canary.alone(raw)
    assert (found.prompt, found.first, len(found.steps)) == ([1, 2], 3, COUNT)
    assert {step.token for step in found.steps} == {"a"}
    body = canary.continuation("m", "salt", found)
    assert (body["prompt"], body["max_tokens"], body["cache_salt"]) == ([1, 2, 3], COUNT, "salt")


def test_a_chance_that_is_not_a_number_is_a_difference_unless_the_decode_node_has_none_either() -> None:
    """What a model makes of garbage is often that, and JSON has null for it."""
    well = steps(told(["a"] * COUNT, [-0.5] * COUNT, [{"a": -0.5}] * COUNT))
    ill = steps(told(["a"] * COUNT, [None] * COUNT, [{"a": None}] * COUNT))
    found = difference(well, ill)
    assert found is not None
    assert "nan nats apart" in found
    count = COUNT + 1
    raw = told(["a"] * count, [None] * count, [{}] * count, prompt_token_ids=[1], token_ids=[1] * count)
    with pytest.raises(ValueError, match="without log probabilities"):
        canary.alone(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b"[]",
        b"nonsense",
        b'{"choices":[]}',
        b'{"choices":[5]}',
        b'{"choices":[{"logprobs":null}]}',
        told([], [], []),
        told(["a"] * (COUNT - 1), [-1] * (COUNT - 1), [{}] * (COUNT - 1)),
        told(["a"] * COUNT, [-1], [{}] * COUNT),
        told(["a"] * COUNT, [-1] * COUNT, None),
        told(["a"] * COUNT, [-1] * COUNT, [5] * COUNT),
        told(["a"] * COUNT, ["x"] * COUNT, [{}] * COUNT),
    ],
)
def test_what_is_no_such_answer_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        steps(raw)
    with pytest.raises(ValueError):
        canary.alone(raw)


@pytest.mark.parametrize("longest", [None, 100_000, 2048, 64, 20, 1])
def test_the_question_fits_the_model_and_is_as_long_as_may_be(longest: int | None) -> None:
    prompt = canary.question("m", "salt", longest)["prompt"]
    assert prompt
    room = math.inf if longest is None else longest - ANSWER_TOKENS - 2
    assert len(prompt) == max(1, min(len(canary.PROMPT), room))
    assert canary.PROMPT.isascii()
