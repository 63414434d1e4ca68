"""The bodies of one exchange."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import PrefillRefusedError
from engines.openai.routes import CHAT, COMPLETIONS, HANDED_OFF, MESSAGES, RESPONSES, Route
from engines.vllm import bodies

letters = st.characters(codec="utf-8")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(letters),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(letters), inner, max_size=3),
    max_leaves=10,
)
fields = st.sampled_from(
    ["prompt", "messages", "model", "max_tokens", "max_completion_tokens", "min_tokens", "n", "stream", "stop",
     "stop_token_ids", "logprobs", "echo", "tools", "kv_transfer_params", "ec_transfer_params", "anything"]
)  # fmt: skip
json_objects = st.dictionaries(fields, json_values)


def orjson_dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


routes = st.sampled_from(list(HANDED_OFF.values()))
HAND_OFF = {"transfer_id": "t"}
PREFILLED = bodies.Prefilled({}, prompt_tokens=1, cached_tokens=0)


@given(routes, json_objects)
def test_no_body_carries_a_clients_transfer_keys_to_a_node(route: Route, body: dict[str, Any]) -> None:
    clean = bodies.checked_body(body)
    prefill = bodies.prefill_body(route, clean, HAND_OFF)
    decode = bodies.decode_body(route, clean, HAND_OFF, PREFILLED, stream=True)
    assert prefill["kv_transfer_params"] == HAND_OFF
    assert decode["kv_transfer_params"] == HAND_OFF | {"remote_prefill_cached_tokens": 0}
    assert "ec_transfer_params" not in prefill.keys() | decode.keys()


@given(routes, json_objects)
def test_the_prefill_leg_always_makes_one_token_and_can_end_only_by_length(route: Route, body: dict[str, Any]) -> None:
    leg = bodies.prefill_body(route, bodies.checked_body(body), HAND_OFF)
    assert leg.items() >= route.one_token.items()
    assert leg["stream"] is False
    assert not {"stop", "stop_token_ids", "stream_options", "logprobs"} & leg.keys()


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_where_it_can_the_prefill_leg_masks_eos_and_stop_ids(route: Route) -> None:
    leg = bodies.prefill_body(route, {"min_tokens": 9, "max_tokens": 50, "stop_token_ids": [1]}, HAND_OFF)
    assert (leg["min_tokens"], leg["max_tokens"], leg["n"]) == (1, 1, 1)


@given(routes, json_objects)
def test_the_decode_leg_is_the_clients_body_and_the_hand_off(route: Route, body: dict[str, Any]) -> None:
    clean = bodies.checked_body(body) | {"stream": True}
    leg = bodies.decode_body(route, clean, HAND_OFF, bodies.Prefilled({}, 1), stream=True)
    assert {key: value for key, value in leg.items() if key != "kv_transfer_params"} == clean


@given(routes, json_objects)
def test_no_function_changes_the_body_it_is_given(route: Route, body: dict[str, Any]) -> None:
    before = dict(body)
    bodies.checked_body(body)
    bodies.prefill_body(route, body, HAND_OFF)
    bodies.decode_body(route, body, HAND_OFF, PREFILLED, stream=True)
    bodies.release_body(body, HAND_OFF)
    bodies.aggregated_reason(body)
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
    assert bodies.prefill_body(CHAT, body, HAND_OFF).items() >= body.items()


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
        ({"input": "x", "previous_response_id": "r"}, "stored-response"),
        ({"input": "x", "background": True}, "stored-response"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "refused"),
        ({"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}, None),
    ],
)
def test_a_hand_off_is_made_only_for_one_sequence_that_the_engine_can_load(
    body: dict[str, Any], reason: str | None
) -> None:
    assert bodies.aggregated_reason(body) == reason


@pytest.mark.parametrize("parsed", [[1], "text", 5, 5.0, None, True])
def test_a_body_that_is_no_object_is_refused(parsed: object) -> None:
    with pytest.raises(bodies.InvalidBodyError, match="must be a JSON object"):
        bodies.checked_body(parsed)


def answer(**choice: Any) -> bytes:
    return orjson.dumps(
        {"choices": [choice], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}}
    )


def test_a_prefill_that_ended_by_length_holds_its_kv() -> None:
    held = bodies.prefilled(CHAT, answer(finish_reason="length"))
    assert (held.prompt_tokens, held.cached_tokens) == (7, 4)


def test_a_prefill_that_does_not_tell_cached_tokens_is_no_error() -> None:
    told = b'{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":7,"prompt_tokens_details":null}}'
    assert bodies.prefilled(COMPLETIONS, told).cached_tokens is None


@pytest.mark.parametrize(
    ("route", "raw"),
    [
        (RESPONSES, {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}),
        (MESSAGES, {"stop_reason": "max_tokens"}),
    ],
)
def test_every_route_has_its_own_word_for_length(route: Route, raw: dict[str, Any]) -> None:
    usage = {"usage": {"input_tokens": 7}}
    assert bodies.prefilled(route, orjson.dumps(raw | usage)).prompt_tokens == 7


@pytest.mark.parametrize(
    ("route", "raw"),
    [
        (COMPLETIONS, answer(finish_reason="stop")),
        (CHAT, answer(finish_reason="error")),
        (RESPONSES, b'{"status": "completed", "incomplete_details": null, "usage": {"input_tokens": 1}}'),
        (MESSAGES, b'{"stop_reason": "end_turn", "usage": {"input_tokens": 1}}'),
    ],
)
def test_a_prefill_that_ended_otherwise_holds_none(route: Route, raw: bytes) -> None:
    with pytest.raises(PrefillRefusedError, match="not by length"):
        bodies.prefilled(route, raw)


@given(routes, st.binary() | json_values.map(orjson_dumps))
def test_an_answer_that_is_of_no_route_is_told_apart_from_one(route: Route, raw: bytes) -> None:
    with pytest.raises(PrefillRefusedError):
        bodies.prefilled(route, raw)


@given(st.lists(st.integers(0, 10**6)), st.text())
def test_the_prompts_token_ids_are_cut_out_of_the_answer_as_they_stand(ids: list[int], text: str) -> None:
    choice = {"text": f'"prompt_token_ids":[{text}', "finish_reason": "length", "prompt_token_ids": ids}
    held = bodies.prefilled(COMPLETIONS, answer(**choice))
    assert held.token_ids is not None
    assert orjson.loads(held.token_ids) == ids
    assert held.prompt_tokens == 7


def test_the_decode_leg_gets_the_prefill_nodes_own_token_ids() -> None:
    held = bodies.prefilled(COMPLETIONS, answer(finish_reason="length", prompt_token_ids=[1, 2]))
    completion = orjson.loads(orjson.dumps(bodies.decode_body(COMPLETIONS, {"prompt": "x"}, {}, held, stream=False)))
    assert completion["prompt"] == [1, 2]
    chat = orjson.loads(orjson.dumps(bodies.decode_body(CHAT, {"messages": []}, {}, held, stream=False)))
    assert chat["kv_transfer_params"]["prompt_token_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("route", "body", "asked"),
    [
        (COMPLETIONS, {"prompt": "x"}, True),
        (COMPLETIONS, {"prompt": "x", "echo": True}, None),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        (RESPONSES, {"input": "x"}, None),
    ],
)
def test_ids_are_asked_for_where_the_decode_node_may_take_them(route: Route, body: Any, asked: bool | None) -> None:
    assert bodies.prefill_body(route, body, HAND_OFF).get("return_token_ids") is asked


def test_a_whole_answer_is_asked_for_as_a_stream_with_its_usage() -> None:
    leg = bodies.decode_body(CHAT, {"messages": []}, HAND_OFF, PREFILLED, stream=True)
    assert (leg["stream"], leg["stream_options"]) == (True, {"include_usage": True})
    own = bodies.decode_body(CHAT, {"stream": True, "stream_options": None}, HAND_OFF, PREFILLED, stream=True)
    assert own["stream_options"] is None


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x" * 400}, 100),
        ({"prompt": [1] * 70}, 70),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, 101),
        ({"messages": [{"content": [{"type": "text", "text": "x" * 40}]}]}, 11),
        ({"input": "x" * 40}, 10),
        ({}, 0),
    ],
)
def test_a_prompts_length_is_estimated_without_a_tokenizer(body: dict[str, Any], tokens: int) -> None:
    assert bodies.estimated_tokens(body) == tokens
    assert bodies.aggregated_reason(body, tokens) is None
    assert bodies.aggregated_reason(body, tokens + 1) == "short-prompt"


@pytest.mark.parametrize(
    ("status", "kind", "released"),
    [(400, "BadRequestError", True), (404, "NotFoundError", True), (500, "InternalServerError", True),
     (400, "Bad Request", False), (401, "", False), (503, "ServiceUnavailable", False)],
)  # fmt: skip
def test_a_refusal_frees_the_hand_off_only_if_the_serving_layer_made_it(status: int, kind: str, released: bool) -> None:
    assert bodies.is_released_by_refusal(status, kind) is released
