"""The helpers of OpenAI's client: streams as events, parsed answers, tools, prompt lists, stored responses."""

import asyncio
import json
import os
from collections.abc import Callable

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

MODEL = "tiny"
MESSAGES = [{"role": "user", "content": "What is the weather like where you are?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
SETTINGS = {"model": MODEL, "temperature": 0, "max_tokens": 128}
TEXT = SETTINGS | {"stop": ["e"]}
"""Ends by itself: the client's helpers for streams take an end by length for a failure."""
Keep = Callable[[str, object], None]


class Choice(BaseModel):
    yes: bool


@pytest.fixture
def client() -> OpenAI:
    return OpenAI(base_url=os.environ["PD_URL"] + "/v1", api_key="none", max_retries=0)


def test_chat(client: OpenAI, record_property: Keep) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **SETTINGS)
    record_property("text", answer.choices[0].message.content)
    record_property("usage", answer.usage.model_dump_json(exclude={"prompt_tokens_details"}))
    record_property("tokens", [entry.token for entry in answer.choices[0].logprobs.content])


def test_chat_as_a_stream_of_events(client: OpenAI, record_property: Keep) -> None:
    with client.chat.completions.stream(messages=MESSAGES, stream_options={"include_usage": True}, **TEXT) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    record_property("text", final.choices[0].message.content)
    record_property("tokens", final.usage.completion_tokens)


def test_several_choices_as_a_stream_of_events(client: OpenAI, record_property: Keep) -> None:
    with client.chat.completions.stream(messages=MESSAGES, n=3, seed=7, **{**TEXT, "temperature": 1}) as stream:
        final = stream.get_final_completion()
    assert [choice.index for choice in final.choices] == [0, 1, 2]
    record_property("finish", [choice.finish_reason for choice in final.choices])


def test_an_answer_parsed_into_a_model(client: OpenAI, record_property: Keep) -> None:
    answer = client.chat.completions.parse(messages=MESSAGES, response_format=Choice, **SETTINGS)
    record_property("yes", answer.choices[0].message.parsed.yes)


def test_a_stream_parsed_into_a_model(client: OpenAI, record_property: Keep) -> None:
    with client.chat.completions.stream(messages=MESSAGES, response_format=Choice, **SETTINGS) as stream:
        record_property("yes", stream.get_final_completion().choices[0].message.parsed.yes)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}, "auto", "none"])
def test_tools(client: OpenAI, record_property: Keep, choice: object) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, tools=[WEATHER], tool_choice=choice, **SETTINGS)
    calls = answer.choices[0].message.tool_calls or []
    record_property("calls", [(call.function.name, call.function.arguments) for call in calls])
    record_property("finish", answer.choices[0].finish_reason)


def test_tools_as_a_stream_of_events(client: OpenAI, record_property: Keep) -> None:
    with client.chat.completions.stream(
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        **SETTINGS,
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    record_property("arguments", [json.loads(event.arguments) for event in done])


def test_a_tool_s_answer_goes_back(client: OpenAI, record_property: Keep) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    asked = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]
    asked += [{"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    answer = client.chat.completions.create(messages=asked, tools=[WEATHER], **SETTINGS)
    record_property("text", answer.choices[0].message.content)


def test_completions_of_several_prompts(client: OpenAI, record_property: Keep) -> None:
    prompts = ["Once upon a time", "In the beginning", [20, 21, 22, 23]]
    for prompt in (prompts[:2], [prompts[2]]):
        answer = client.completions.create(prompt=prompt, logprobs=2, echo=True, **SETTINGS)
        record_property("texts", [choice.text for choice in answer.choices])


def test_a_response(client: OpenAI, record_property: Keep) -> None:
    answer = client.responses.create(model=MODEL, input="Say something.", temperature=0, max_output_tokens=24)
    record_property("text", answer.output_text)
    record_property("status", answer.status)


def test_a_response_as_a_stream_of_events(client: OpenAI, record_property: Keep) -> None:
    with client.responses.stream(model=MODEL, input="Say something.", temperature=0, max_output_tokens=24) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    record_property("kinds", sorted(set(kinds)))


def test_models(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert MODEL in names
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "no such model"}, openai.NotFoundError),
        ({"max_tokens": 0}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"max_tokens": 10**9}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": "none"}, openai.BadRequestError),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_errors_are_the_client_s_own_classes(
    client: OpenAI, record_property: Keep, body: dict[str, object], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"messages": MESSAGES, **SETTINGS, **body})
    record_property("error", [caught.value.type, caught.value.param, caught.value.code])


async def test_many_at_once(record_property: Keep) -> None:
    async with openai.AsyncOpenAI(base_url=os.environ["PD_URL"] + "/v1", api_key="none", max_retries=0) as client:
        asked = (client.completions.create(prompt=f"{number} and on", **SETTINGS) for number in range(16))
        answers = await asyncio.gather(*asked)
    record_property("tokens", [answer.usage.completion_tokens for answer in answers])
