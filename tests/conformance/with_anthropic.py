"""The helpers of Anthropic's client, against /v1/messages."""

import os
from collections.abc import Callable

import anthropic
import pytest
from anthropic import Anthropic

MESSAGES = [{"role": "user", "content": "What is the weather like where you are?"}]
SETTINGS = {"model": "tiny", "max_tokens": 24, "extra_body": {"temperature": 0}}
WEATHER = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
        "required": ["city"],
    },
}
Keep = Callable[[str, object], None]


@pytest.fixture
def client() -> Anthropic:
    return Anthropic(base_url=os.environ["PD_URL"], api_key="none", max_retries=0)


def test_a_message(client: Anthropic, record_property: Keep) -> None:
    answer = client.messages.create(messages=MESSAGES, system="Be brief.", **SETTINGS)
    record_property("text", [block.text for block in answer.content])
    record_property("stop", answer.stop_reason)
    record_property("tokens", [answer.usage.input_tokens, answer.usage.output_tokens])


def test_the_text_of_a_stream(client: Anthropic, record_property: Keep) -> None:
    with client.messages.stream(messages=MESSAGES, **SETTINGS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in final.content)
    record_property("text", text)
    record_property("tokens", final.usage.output_tokens)


def test_the_events_of_a_stream(client: Anthropic, record_property: Keep) -> None:
    with client.messages.stream(messages=MESSAGES, **SETTINGS) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    record_property("kinds", sorted(set(kinds)))


@pytest.mark.parametrize("choice", [{"type": "tool", "name": "weather"}, {"type": "any"}, {"type": "auto"}])
def test_tools(client: Anthropic, record_property: Keep, choice: object) -> None:
    answer = client.messages.create(messages=MESSAGES, tools=[WEATHER], tool_choice=choice, **SETTINGS)
    used = [(block.name, block.input) for block in answer.content if block.type == "tool_use"]
    record_property("used", used)
    record_property("stop", answer.stop_reason)


def test_a_tool_s_result_goes_back(client: Anthropic, record_property: Keep) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}
    asked = [*MESSAGES, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=asked, tools=[WEATHER], **SETTINGS)
    record_property("text", [block.text for block in answer.content if block.type == "text"])


def test_tokens_are_counted(client: Anthropic, record_property: Keep) -> None:
    record_property("tokens", client.messages.count_tokens(model="tiny", messages=MESSAGES).input_tokens)


@pytest.mark.parametrize(
    ("body", "error"),
    [({"model": "none"}, anthropic.NotFoundError), ({"max_tokens": 0}, anthropic.BadRequestError)],
    ids=["no such model", "no tokens"],
)
def test_errors_are_the_client_s_own_classes(
    client: Anthropic, record_property: Keep, body: dict[str, object], error: type[anthropic.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        client.messages.create(**{"messages": MESSAGES, **SETTINGS, **body})
    record_property("error", sorted(caught.value.body["error"]))
