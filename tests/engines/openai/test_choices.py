"""A request for several sequences as one for each, and their answers as one again."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai.choices import MOST_SHARES, Merged, shares
from engines.openai.request import asked, with_fragments, without_large_values
from engines.openai.routes import CHAT, COMPLETIONS

MESSAGES = [{"role": "user", "content": "hello"}]


def split(path: str = COMPLETIONS.path, **body: Any) -> list[dict[str, Any]]:
    return [share.asked.body for share in shares(path, asked(path, orjson.dumps(body)))]


def test_choices_are_numbered_prompt_by_prompt_and_seeded_as_vllm_does() -> None:
    body = {"prompt": ["a", "b"], "n": 2, "seed": 7, "x": 1}
    found = shares(COMPLETIONS.path, asked(COMPLETIONS.path, orjson.dumps(body)))
    told = [(one.index, one.prompt, one.asked.body["prompt"], one.asked.body["seed"]) for one in found]
    assert told == [(0, 0, "a", 7), (1, 0, "a", 8), (2, 1, "b", 7), (3, 1, "b", 8)]
    assert all(one.asked.body["n"] == one.asked.body["x"] == 1 and one.asked.reason is None for one in found)


def test_a_chat_has_one_prompt_and_as_many_shares_as_choices() -> None:
    bodies = split(CHAT.path, messages=MESSAGES, n=3)
    assert [body["messages"] for body in bodies] == [MESSAGES] * 3
    assert "prompt" not in bodies[0]
    assert "seed" not in bodies[0]


def test_prompts_may_be_token_ids() -> None:
    assert [body["prompt"] for body in split(prompt=[[1, 2], [3]])] == [[1, 2], [3]]
    assert [body["prompt"] for body in split(prompt=[1, 2], n=2)] == [[1, 2], [1, 2]]


def test_a_share_of_a_stream_tells_its_usage_whether_the_client_wants_it_or_not() -> None:
    options = {"continuous_usage_stats": False}
    bodies = split(prompt="x", n=2, stream=True, stream_options=options)
    assert [body["stream_options"] for body in bodies] == [options | {"include_usage": True}] * 2


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x"},
        {"prompt": "x", "n": 1},
        {"prompt": "x", "n": 2, "temperature": 0},  # refused: greedy
        {"prompt": "x", "n": 2, "temperature": "0"},
        {"prompt": "x", "n": 2, "temperature": True, "seed": "1"},
        {"prompt": "x", "n": 2, "seed": 2**63 - 1},
        {"prompt": "x", "n": 0},
        {"prompt": "x", "n": -2},
        {"prompt": "x", "n": "2"},
        {"prompt": "x", "n": 2.0},
        {"prompt": "x", "n": 2, "best_of": 4},
        {"prompt": "x", "n": MOST_SHARES + 1},
        {"prompt": ["x"] * (MOST_SHARES + 1)},
        {"prompt": ["x", 5]},
        {"prompt": ["x", [1, "a"]]},
        {"prompt": ["x", []]},
        {"prompt": []},
        {"prompt": ["x", "y"], "use_beam_search": True},
        {"prompt": ["x", "y"], "prompt_logprobs": 1},
        {"prompt": ["x", "y"], "echo": True, "logprobs": 1},
        {"prompt": ["x", "y"], "max_tokens": 0},
        {"prompt": ["x", "y"], "stream": True, "stream_options": [1]},
    ],
)
def test_what_one_node_must_answer_or_would_refuse_stays_whole(body: dict[str, Any]) -> None:
    assert split(**body) == []


def merged(n: int, *, wants_usage: bool = True) -> tuple[Merged, Any]:
    found = shares(COMPLETIONS.path, asked(COMPLETIONS.path, orjson.dumps({"prompt": "x", "n": n})))
    return Merged(found, wants_usage=wants_usage), found


def chunk(share: int, text: str = "t", **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": None}
    body = {"id": f"cmpl-r-{share}", "object": "text_completion", "created": 100 + share, "model": "m"}
    return b"data: " + orjson.dumps(body | {"choices": [choice]} | more) + b"\n\n"


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion} | more


def told(data: bytes) -> list[Any]:
    events = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]
    return [event.decode() if event == b"[DONE]" else orjson.loads(event) for event in events]


def test_events_of_all_shares_are_events_of_one_answer() -> None:
    one, (first, second) = merged(2)
    stream = one.events(second, chunk(1, "b")) + one.events(first, chunk(0, "a"))
    head = {"id": "cmpl-r", "object": "text_completion", "created": 101, "model": "m"}
    assert told(stream) == [
        head | {"choices": [{"index": 1, "text": "b", "finish_reason": None}]},
        head | {"choices": [{"index": 0, "text": "a", "finish_reason": None}]},
    ]
    last = chunk(0, choices=[], usage=usage(5, 3)) + b"data: [DONE]\n\n"
    assert one.events(first, last) == b""
    assert one.events(second, chunk(1, choices=[], usage=usage(5, 4))) == b""
    assert told(one.ending()) == [head | {"choices": [], "usage": usage(5, 7)}, "[DONE]"]


@pytest.mark.parametrize(
    ("prompt", "n", "split"), [("a" * 70_000, 2, 2), (["a" * 70_000, "b"], 2, 0), (["a" * 70_000, "b"], 1, 0)]
)
def test_large_prompts_that_nobody_looks_into_are_split_only_if_it_is_known_to_be_one(
    prompt: Any, n: int, split: int
) -> None:
    """Two prompts under one hand-off would be KV that is never freed."""
    raw = orjson.dumps({"prompt": prompt, "n": n})
    found = with_fragments(without_large_values(asked(COMPLETIONS.path, raw)))
    parts = shares(COMPLETIONS.path, found)
    assert len(parts) == split
    for part in parts:
        assert orjson.loads(orjson.dumps(part.asked.body)) == {"prompt": prompt, "n": 1}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/v1/embeddings"])
def test_only_completions_and_chats_are_split(path: str) -> None:
    assert shares(path, asked(path, orjson.dumps({"input": "x", "prompt": ["a", "b"], "n": 2}))) == ()


def test_usage_that_is_not_asked_for_is_not_told() -> None:
    one, (first, _) = merged(2, wants_usage=False)
    one.events(first, chunk(0, choices=[], usage=usage(5, 3)))
    assert told(one.ending()) == ["[DONE]"]


def test_of_whole_answers_one_is_made_that_counts_each_prompt_once() -> None:
    body = {"prompt": ["a", "b"], "n": 2}
    found = shares(COMPLETIONS.path, asked(COMPLETIONS.path, orjson.dumps(body)))
    details = {"reasoning_tokens": 2, "audio_tokens": None}
    answers = [
        orjson.dumps(
            {
                "id": f"cmpl-r-{place}",
                "choices": [{"index": 0, "text": str(place)}],
                "usage": usage(
                    10 * (1 + place // 2), 1, completion_tokens_details=details, prompt_tokens_details={"c": place}
                ),
                "metrics": {},
            }
        )
        for place in range(4)
    ]
    answer = orjson.loads(Merged(found, wants_usage=False).whole(answers))
    assert answer["id"] == "cmpl-r"
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(n, str(n)) for n in range(4)]
    assert answer["usage"] == usage(30, 4) | {
        "completion_tokens_details": {"reasoning_tokens": 8, "audio_tokens": None},
        "prompt_tokens_details": {"c": 0},
    }
    assert "metrics" not in answer


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"choices": 5}', b"no json", b'{"choices": [5]}'])
def test_what_is_no_answer_is_said_to_be_none(body: bytes) -> None:
    one, (first, _) = merged(2)
    with pytest.raises(ValueError):
        one.whole([body, body])
    with pytest.raises(ValueError):
        one.events(first, b"data: " + body + b"\n\n")


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats(allow_nan=False) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner, max_size=2),
)
_FIELDS = st.sampled_from(["n", "seed", "temperature", "prompt", "stream_options", "stream"])


@given(st.dictionaries(_FIELDS, _ANY))
def test_whatever_a_client_sends_it_is_split_into_requests_for_one_sequence_or_left_as_it_is(body: Any) -> None:
    found = asked(COMPLETIONS.path, orjson.dumps(body))
    before = orjson.dumps(found.body)
    for share in shares(COMPLETIONS.path, found):
        assert share.asked.reason is None
        assert share.asked.body["n"] == 1
    assert orjson.dumps(found.body) == before
