"""A client's body, looked through once."""

import pickle
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai.request import InvalidBodyError, asked, with_fragments, without_large_values
from engines.openai.routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES


def reason(body: dict[str, Any]) -> str | None:
    return asked(COMPLETIONS.path, orjson.dumps(body)).reason


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "x"}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"messages": [], "n": 1, "max_tokens": 5}, None),
        ({"prompt": "x", "n": None, "prompt_logprobs": None}, None),
        ({"prompt": "x", "echo": True}, None),
        ({"prompt": "x", "n": 2}, "many-choices"),
        ({"prompt": "x", "best_of": 4}, "many-choices"),
        ({"prompt": ["x", "y"]}, "prompt-list"),
        ({"prompt": ["x"]}, None),
        ({"prompt": [[1, 2]]}, None),
        ({"prompt": [[1, 2], [3]]}, "prompt-list"),
        ({"prompt": "x", "use_beam_search": True}, "beam-search"),
        ({"prompt_embeds": "AAAA"}, "prompt-embeds"),
        ({"prompt": "x", "prompt_logprobs": 1}, "prompt-logprobs"),
        ({"prompt": "x", "echo": True, "logprobs": 0}, "prompt-logprobs"),
        ({"prompt": "x", "max_tokens": 0}, "no-output"),
        ({"messages": [], "max_completion_tokens": 0}, "no-output"),
        ({"prompt": "x", "max_tokens": "0"}, "no-output"),
        ({"prompt": "x", "stream": "perhaps"}, "refused"),
        ({"prompt": "x", "stream": "false", "stream_options": {"include_usage": True}}, "refused"),
        ({"prompt": "x", "stream": "yes", "stream_options": {"include_usage": True}}, None),
        ({"input": "x", "previous_response_id": "r"}, "stored-response"),
        ({"input": "x", "background": True}, "stored-response"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "refused"),
        ({"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}, None),
    ],
)
def test_a_hand_off_is_made_only_for_one_sequence_that_the_engine_can_load(
    body: dict[str, Any], expected: str | None
) -> None:
    assert reason(body) == expected


@pytest.mark.parametrize("parsed", [[1], "text", 5, 5.0, None, True])
def test_a_body_that_is_no_object_is_refused(parsed: object) -> None:
    with pytest.raises(InvalidBodyError, match="must be a JSON object"):
        asked(COMPLETIONS.path, orjson.dumps(parsed))


@pytest.mark.parametrize("raw", [b"", b"{", b"{} {}", b"\xff", b"[" * 2000])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidBodyError, match="not valid JSON"):
        asked(CHAT.path, raw)


@pytest.mark.parametrize(("given", "prompt"), [(["one"], "one"), ([[1, 2]], [1, 2]), ([1], [1]), ([], []), ("x", "x")])
def test_a_list_of_one_prompt_is_one_prompt(given: Any, prompt: Any) -> None:
    assert asked(COMPLETIONS.path, orjson.dumps({"prompt": given})).body["prompt"] == prompt


@pytest.mark.parametrize(
    ("path", "kept"),
    [(CHAT.path, {"prompt_token_ids": [1]}), (RESPONSES.path, {"prompt_token_ids": [1]}), (COMPLETIONS.path, None),
     (MESSAGES.path, None), ("/v1/chat/completions/batch", None)],
)  # fmt: skip
def test_of_a_clients_transfer_keys_only_its_token_ids_are_kept_where_the_engine_takes_them(
    path: str, kept: Any
) -> None:
    params = {"prompt_token_ids": [1], "do_remote_prefill": True}
    body = asked(path, orjson.dumps({"kv_transfer_params": params, "ec_transfer_params": {}})).body
    assert body.get("kv_transfer_params") == kept
    assert "ec_transfer_params" not in body


@pytest.mark.parametrize("params", [None, [], "x", 5, {}, {"prompt_token_ids": None}, {"transfer_id": "t"}])
def test_other_transfer_keys_leave_nothing(params: Any) -> None:
    assert asked(CHAT.path, orjson.dumps({"kv_transfer_params": params})).body == {}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x" * 400}, 100),
        ({"prompt": [1] * 70}, 70),
        ({"messages": [], "tools": ["x" * 4000]}, 1000),
        ({"messages": [], "system": "x" * 4000}, 1000),
        ({"input": "x", "instructions": "x" * 4000}, 1000),
    ],
)
def test_a_prompts_length_is_estimated_without_a_tokenizer(body: dict[str, Any], tokens: int) -> None:
    """Tools and system prompts are part of it."""
    assert tokens <= asked(CHAT.path, orjson.dumps(body)).tokens <= tokens + 20


@given(st.dictionaries(st.sampled_from(["prompt", "messages", "stop", "x"]), st.lists(st.text(), max_size=3)))
def test_a_request_parsed_elsewhere_is_the_same_request(body: dict[str, Any]) -> None:
    body["prompt"] = "long " * 20_000
    raw = orjson.dumps(body)
    here, there = asked(COMPLETIONS.path, raw), asked(COMPLETIONS.path, raw)
    back = with_fragments(pickle.loads(pickle.dumps(without_large_values(there))))  # noqa: S301  our own
    assert orjson.loads(orjson.dumps(back.body)) == here.body
    assert (back.reason, back.is_text, back.tokens) == (here.reason, here.is_text, here.tokens)


def test_what_a_running_answer_has_no_use_for_is_let_go() -> None:
    request = asked(CHAT.path, orjson.dumps({"messages": ["x"], "tools": [1], "model": "m", "stream": True}))
    request.forget_prompt()
    assert request.body == {"model": "m", "stream": True}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (True, True),
        (False, False),
        (None, None),
        ("true", True),
        ("False", False),
        ("no", False),
        (0, False),
        (1.0, True),
    ],
)
def test_a_boolean_is_one_here_if_it_is_one_for_the_engine(given: object, read: bool | None) -> None:
    assert asked(COMPLETIONS.path, orjson.dumps({"prompt": "x", "stream": given})).body["stream"] is read


@pytest.mark.parametrize("path", [COMPLETIONS.path, CHAT.path, RESPONSES.path, "/v1/chat/completions/batch"])
@pytest.mark.parametrize("key", ["kv_transfer_params", "ec_transfer_params"])
def test_no_way_leads_a_clients_transfer_keys_to_the_engine(path: str, key: str) -> None:
    """What stands in `vllm_xargs` is where the engine looks for them; a 0 there ends it."""
    extra = {key: 0, "mine": 1}
    body = asked(
        path, orjson.dumps({"prompt": "x", "n": 2, "vllm_xargs": extra, key: {"do_remote_prefill": True}})
    ).body
    assert body == {"prompt": "x", "n": 2, "vllm_xargs": {"mine": 1}}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([{"type": "function", "name": "f"}], None),
        ([{"type": "code_interpreter"}], "built-in-tools"),
        ([7], "built-in-tools"),
    ],
)
def test_tools_that_the_node_runs_itself_ask_its_engine_again_and_again(tools: list[Any], expected: str | None) -> None:
    body = orjson.dumps({"input": "x", "tools": tools})
    assert asked(RESPONSES.path, body).reason == expected
    assert asked(CHAT.path, body).reason is None


def test_a_long_prompt_given_as_ids_goes_to_the_other_process_and_back() -> None:
    ids = list(range(50_000))
    body = orjson.dumps({"messages": [], "kv_transfer_params": {"prompt_token_ids": ids}})
    found = with_fragments(pickle.loads(pickle.dumps(without_large_values(asked(CHAT.path, body)))))  # noqa: S301
    assert isinstance(found.body["kv_transfer_params"], dict)
    assert orjson.loads(orjson.dumps(found.body))["kv_transfer_params"]["prompt_token_ids"] == ids
