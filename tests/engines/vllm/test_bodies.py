"""The bodies of one exchange."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Prefilled, PrefillRefusedError
from engines.openai.request import Asked, asked
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
PREFILLED = Prefilled({}, prompt_tokens=1, cached_tokens=0)


def wanted(body: dict[str, Any], route: Route = COMPLETIONS) -> Asked:
    return asked(route.path, orjson_dumps(body))


@given(routes, json_objects)
def test_no_body_carries_a_clients_transfer_keys_to_a_node(route: Route, body: dict[str, Any]) -> None:
    body.pop("kv_transfer_params", None)
    clean = wanted(body | {"kv_transfer_params": {"do_remote_prefill": True, "transfer_id": "mine"}}, route)
    prefill = bodies.prefill_body(route, clean, HAND_OFF)
    decode = bodies.decode_body(route, clean, HAND_OFF, PREFILLED, stream=True)
    assert prefill["kv_transfer_params"] == HAND_OFF
    assert decode["kv_transfer_params"] == HAND_OFF | {"remote_prefill_cached_tokens": 0}
    assert "ec_transfer_params" not in prefill.keys() | decode.keys()


def test_a_prompt_that_the_client_tokenized_reaches_both_legs() -> None:
    """The one transfer key that vLLM documents for clients (renderers/online_renderer.py)."""
    given = wanted({"messages": [], "kv_transfer_params": {"prompt_token_ids": [1, 2], "transfer_id": "mine"}}, CHAT)
    assert bodies.prefill_body(CHAT, given, HAND_OFF)["kv_transfer_params"] == {"prompt_token_ids": [1, 2]} | HAND_OFF
    leg = bodies.decode_body(CHAT, given, HAND_OFF, Prefilled({}, 2, None, b"[1,2]"), stream=True)
    assert orjson.loads(orjson.dumps(leg))["kv_transfer_params"] == {"prompt_token_ids": [1, 2]} | HAND_OFF
    assert given.body["kv_transfer_params"] == {"prompt_token_ids": [1, 2]}


@given(routes, json_objects)
def test_the_prefill_leg_always_makes_one_token_and_can_end_only_by_length(route: Route, body: dict[str, Any]) -> None:
    leg = bodies.prefill_body(route, wanted(body, route), HAND_OFF)
    assert leg.items() >= route.one_token.items()
    assert leg["stream"] is False
    assert not {"stop", "stop_token_ids", "stream_options", "logprobs", "logprob_token_ids"} & leg.keys()


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_where_it_can_the_prefill_leg_masks_eos_and_stop_ids(route: Route) -> None:
    leg = bodies.prefill_body(
        route, wanted({"min_tokens": 9, "max_tokens": 50, "stop_token_ids": [1]}, route), HAND_OFF
    )
    assert (leg["min_tokens"], leg["max_tokens"], leg["n"]) == (1, 1, 1)


@given(routes, json_objects)
def test_the_decode_leg_is_the_clients_body_and_the_hand_off(route: Route, body: dict[str, Any]) -> None:
    clean = wanted(body | {"stream": True, "kv_transfer_params": None}, route)
    leg = bodies.decode_body(route, clean, HAND_OFF, Prefilled({}, 1), stream=True)
    assert {key: value for key, value in leg.items() if key != "kv_transfer_params"} == clean.body


@given(routes, json_objects)
def test_no_function_changes_the_body_it_is_given(route: Route, body: dict[str, Any]) -> None:
    clean = wanted(body, route)
    before = orjson_dumps(clean.body)
    bodies.prefill_body(route, clean, HAND_OFF)
    bodies.decode_body(route, clean, HAND_OFF, PREFILLED, stream=True)
    bodies.release_body("m", HAND_OFF)
    assert orjson_dumps(clean.body) == before


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
    assert bodies.prefill_body(CHAT, wanted(body, CHAT), HAND_OFF).items() >= body.items()


def answer(**choice: Any) -> bytes:
    return orjson.dumps(
        {"choices": [choice], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}}
    )


def test_a_prefill_that_ended_by_length_holds_its_kv() -> None:
    held = bodies.prefilled(CHAT, answer(finish_reason="length"))
    assert (held.prompt_tokens, held.cached_tokens) == (7, 4)


def test_tokens_of_a_message_that_were_read_from_the_cache_are_tokens_of_the_prompt() -> None:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 1}
    held = bodies.prefilled(MESSAGES, orjson.dumps({"stop_reason": "max_tokens", "usage": usage}))
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
    completion = orjson.loads(
        orjson.dumps(bodies.decode_body(COMPLETIONS, wanted({"prompt": "x"}), {}, held, stream=False))
    )
    assert completion["prompt"] == [1, 2]
    chat = orjson.loads(orjson.dumps(bodies.decode_body(CHAT, wanted({"messages": []}, CHAT), {}, held, stream=False)))
    assert chat["kv_transfer_params"]["prompt_token_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("route", "body", "are_asked"),
    [
        (COMPLETIONS, {"prompt": "x"}, True),
        (COMPLETIONS, {"prompt": "x", "echo": True}, None),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        (RESPONSES, {"input": "x"}, None),
    ],
)
def test_ids_are_asked_for_where_the_decode_node_may_take_them(route: Route, body: Any, are_asked: bool | None) -> None:
    assert bodies.prefill_body(route, wanted(body, route), HAND_OFF).get("return_token_ids") is are_asked


def test_a_whole_answer_is_asked_for_as_a_stream_with_its_usage() -> None:
    leg = bodies.decode_body(CHAT, wanted({"messages": []}, CHAT), HAND_OFF, PREFILLED, stream=True)
    assert (leg["stream"], leg["stream_options"]) == (True, {"include_usage": True})
    own = bodies.decode_body(CHAT, wanted({"stream": True, "stream_options": None}), HAND_OFF, PREFILLED, stream=True)
    assert own["stream_options"] is None


@pytest.mark.parametrize(
    ("status", "kind", "released"),
    [(400, "BadRequestError", True), (404, "NotFoundError", True), (500, "InternalServerError", True),
     (422, "UnprocessableEntity", True), (503, "Service Unavailable", True),
     (400, "Bad Request", False), (401, "", False), (503, "ServiceUnavailable", False),
     (503, "", False), (502, "", False)],
)  # fmt: skip
def test_a_refusal_frees_the_hand_off_only_if_the_serving_layer_made_it(status: int, kind: str, released: bool) -> None:
    assert bodies.is_released_by_refusal(status, kind) is released
