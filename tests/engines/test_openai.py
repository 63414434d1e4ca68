"""The bodies of one exchange."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import openai

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
fields = st.sampled_from(
    ["prompt", "messages", "model", "max_tokens", "max_completion_tokens", "min_tokens", "n", "stream", "stop",
     "stop_token_ids", "logprobs", "echo", "tools", "kv_transfer_params", "ec_transfer_params", "anything"]
)  # fmt: skip
bodies = st.dictionaries(fields, json_values)
HAND_OFF = {"transfer_id": "t"}


@given(bodies)
def test_no_body_carries_a_clients_transfer_keys_to_a_node(body: dict[str, Any]) -> None:
    clean = openai.checked_body(body)
    prefill = openai.prefill_body(clean, HAND_OFF)
    decode = openai.decode_body(clean, HAND_OFF, openai.Prefilled(1, 0))
    assert prefill["kv_transfer_params"] == HAND_OFF
    assert decode["kv_transfer_params"] == HAND_OFF | {"remote_prefill_cached_tokens": 0}
    assert "ec_transfer_params" not in prefill.keys() | decode.keys()


@given(bodies)
def test_the_prefill_leg_always_makes_one_token_and_can_end_only_by_length(body: dict[str, Any]) -> None:
    leg = openai.prefill_body(openai.checked_body(body), HAND_OFF)
    assert (leg["max_tokens"], leg["min_tokens"], leg["n"], leg["stream"]) == (1, 1, 1, False)
    assert leg.get("max_completion_tokens", 1) == 1 or "messages" not in body
    assert not {"stop", "stop_token_ids", "stream_options", "logprobs"} & leg.keys()


@given(bodies)
def test_the_decode_leg_is_the_clients_body_and_the_hand_off(body: dict[str, Any]) -> None:
    clean = openai.checked_body(body)
    leg = openai.decode_body(clean, HAND_OFF, openai.Prefilled(1, None))
    assert {key: value for key, value in leg.items() if key != "kv_transfer_params"} == clean


@given(bodies)
def test_no_function_changes_the_body_it_is_given(body: dict[str, Any]) -> None:
    before = dict(body)
    openai.checked_body(body)
    openai.prefill_body(body, HAND_OFF)
    openai.decode_body(body, HAND_OFF, openai.Prefilled(1, 0))
    openai.aggregated_reason(body)
    assert body == before


def test_what_changes_the_rendered_prompt_stays_on_the_prefill_leg() -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function"}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"thinking": True},
        "reasoning_effort": "low",
        "add_generation_prompt": False,
        "cache_salt": "s",
    }
    assert openai.prefill_body(body, HAND_OFF).items() >= body.items()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "x"}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"messages": [], "n": 1, "max_tokens": 5}, None),
        ({"prompt": "x", "n": None, "prompt_logprobs": None}, None),
        ({"prompt": "x", "echo": True}, None),
        ({"prompt": "x", "n": 2}, "many-choices"),
        ({"prompt": "x", "best_of": 4}, "many-choices"),
        ({"prompt": ["x", "y"]}, "prompt-list"),
        ({"prompt": ["x"]}, "prompt-list"),
        ({"prompt": [[1, 2], [3]]}, "prompt-list"),
        ({"prompt": "x", "use_beam_search": True}, "beam-search"),
        ({"prompt_embeds": "AAAA"}, "prompt-embeds"),
        ({"prompt": "x", "prompt_logprobs": 1}, "prompt-logprobs"),
        ({"prompt": "x", "echo": True, "logprobs": 0}, "prompt-logprobs"),
        ({"prompt": "x", "max_tokens": 0}, "no-output"),
        ({"messages": [], "max_completion_tokens": 0}, "no-output"),
    ],
)
def test_a_hand_off_is_made_only_for_one_sequence_that_the_engine_can_load(
    body: dict[str, Any], reason: str | None
) -> None:
    assert openai.aggregated_reason(body) == reason


@pytest.mark.parametrize("parsed", [[1], "text", 5, 5.0, None, True])
def test_a_body_that_is_no_object_is_refused(parsed: object) -> None:
    with pytest.raises(openai.InvalidBodyError, match="must be a JSON object"):
        openai.checked_body(parsed)


def answer(**choice: Any) -> dict[str, Any]:
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}}


def test_a_prefill_that_ended_by_length_holds_its_kv() -> None:
    assert openai.prefilled(answer(finish_reason="length")) == openai.Prefilled(prompt_tokens=7, cached_tokens=4)


def test_a_prefill_that_does_not_tell_cached_tokens_is_no_error() -> None:
    told = answer(finish_reason="length")
    told["usage"]["prompt_tokens_details"] = None
    assert openai.prefilled(told).cached_tokens is None


@pytest.mark.parametrize("wrong", [answer(finish_reason="stop"), answer(finish_reason="error")])
def test_a_prefill_that_ended_otherwise_holds_none(wrong: object) -> None:
    with pytest.raises(openai.PrefillRefusedError, match="not by length"):
        openai.prefilled(wrong)


@given(json_values)
def test_an_answer_that_is_no_completion_is_told_apart_from_one(wrong: object) -> None:
    with pytest.raises(openai.PrefillRefusedError):
        openai.prefilled(wrong)
