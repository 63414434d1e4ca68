"""A decode node dies in the middle of a stream, and the client does not notice."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import httpx
import openai
import pytest

from tests.processes import MODEL, Proxy, Sim, events, http, openai_client, proxy_in_front_of, sim_node

PROMPT = "the quick brown fox jumps over the lazy dog"
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
}
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@dataclass
class Trio:
    """A prefill node, two decode nodes, a proxy."""

    prefill: Sim
    decode: list[Sim]
    proxy: Proxy

    def break_whoever_answers_first(self, **fault: Any) -> None:
        """Exactly one of the next two decode legs meets the fault."""
        for node in self.decode:
            node.control()
        self.decode[0].control(times=1, **fault)

    def stream(self, path: str, **fields: Any) -> httpx.Response:
        return http.post(f"{self.proxy.url}{path}", json=ROUTES[path] | {"stream": True} | fields, timeout=60)


@pytest.fixture(scope="module")
def _trio() -> Iterator[Trio]:
    with ExitStack() as stack:
        prefill = stack.enter_context(sim_node("prefill"))
        decode = [stack.enter_context(sim_node("decode")) for _ in range(2)]
        flags = ["--decode-silence-timeout-s", "1"]
        yield Trio(prefill, decode, stack.enter_context(proxy_in_front_of(prefill, *decode, flags=flags)))


@pytest.fixture
def trio(_trio: Trio) -> Iterator[Trio]:
    _trio.proxy.until_all_take_turns(3)
    yield _trio
    _trio.proxy.must_leave_nothing([_trio.prefill, *_trio.decode])


def said(answer: httpx.Response) -> str:
    choices = [event["choices"][0] for event in events(answer) if event != "[DONE]" and event["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def shape(event: Any) -> Any:
    """An event without what a token's text makes different."""
    if event == "[DONE]" or not event["choices"]:
        return event
    return [
        sorted(event.keys() & {"id", "object", "created", "model", "choices"}),
        event["choices"][0]["finish_reason"],
    ]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("chunks", [1, 4, 11])
@pytest.mark.parametrize("fault", ["drop-after", "hang-after"])
def test_the_client_gets_the_same_stream_as_if_nothing_had_happened(
    trio: Trio, path: str, chunks: int, fault: str
) -> None:
    trio.stream(path)  # so that the prefill node has the prompt cached for all that is compared
    whole = trio.stream(path, stream_options={"include_usage": True})
    resumed = trio.proxy.metric("pd_resumed_total", outcome="done")
    for _ in range(2):
        trio.break_whoever_answers_first(fault=fault, chunks=chunks)
        broken = trio.stream(path, stream_options={"include_usage": True})
        assert said(broken) == said(whole)
        assert len({event["id"] for event in events(broken) if event != "[DONE]"}) == 1
        assert [shape(event) for event in events(broken)][-3:-2] == [shape(event) for event in events(whole)][-3:-2]
        assert events(broken)[-1] == "[DONE]"
        assert events(broken)[-2]["usage"] == events(whole)[-2]["usage"]
        assert "token_ids" not in broken.text or not any(
            (event["choices"] or [{}])[0].get("token_ids") for event in events(broken) if event != "[DONE]"
        )
    assert trio.proxy.metric("pd_resumed_total", outcome="done") > resumed


def test_a_client_that_asked_for_token_ids_gets_all_of_them(trio: Trio) -> None:
    def ids(answer: httpx.Response) -> list[int]:
        choices = [event["choices"][0] for event in events(answer) if event != "[DONE]"]
        return [token for choice in choices for token in choice["token_ids"] or ()]

    whole = trio.stream("/v1/completions", return_token_ids=True)
    for _ in range(2):
        trio.break_whoever_answers_first(fault="drop-after", chunks=5)
        broken = trio.stream("/v1/completions", return_token_ids=True)
        assert ids(broken) == ids(whole)
        assert len(ids(whole)) == 12
        assert sum(bool(event["choices"][0].get("prompt_token_ids")) for event in events(broken)[:-1]) == 1


def test_a_stream_that_loses_two_nodes_goes_on_all_the_same(trio: Trio) -> None:
    whole = trio.stream("/v1/chat/completions")
    for node in trio.decode:
        node.control(fault="drop-after", chunks=4, times=1)
    assert said(trio.stream("/v1/chat/completions")) == said(whole)


def test_it_goes_on_without_a_prefill_node_too(trio: Trio) -> None:
    whole = trio.stream("/v1/chat/completions")
    for node in trio.decode:
        node.control(fault="drop-after", chunks=6, itl_s=0.1, times=1)
    body = CHAT | {"stream": True}
    with http.stream("POST", f"{trio.proxy.url}/v1/chat/completions", json=body, timeout=60) as broken:
        pieces = broken.iter_bytes()
        first = next(pieces)
        trio.prefill.control(fault="drop")
        text = (first + b"".join(pieces)).decode()
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == said(whole)
    assert text.endswith("data: [DONE]\n\n")


def test_the_openai_client_does_not_notice(trio: Trio) -> None:
    texts = []
    asked: Any = {"model": MODEL, "messages": CHAT["messages"], "max_tokens": 12, "temperature": 0, "stream": True}
    with openai_client(trio.proxy.url) as client:
        for fault in ({}, {"fault": "drop-after", "chunks": 3}, {"fault": "drop-after", "chunks": 3}):
            trio.break_whoever_answers_first(**fault)
            stream: Any = client.chat.completions.create(**asked)
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    "fields",
    [{"logprobs": 1}, {"stop": ["zebra"]}, {"presence_penalty": 0.5}, {"response_format": {"type": "json_object"}}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_cannot_be_continued_rightly_ends_as_an_error_and_never_as_if_it_were_whole(
    trio: Trio, fields: dict[str, Any]
) -> None:
    for node in trio.decode:
        node.control(fault="drop-after", chunks=3)
    with openai_client(trio.proxy.url) as client:
        stream = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, max_tokens=12, extra_body=fields)
        with pytest.raises(openai.APIError, match="decode-"):
            list(stream)


def test_a_chat_about_an_image_is_not_continued_without_its_image(trio: Trio) -> None:
    """The continuation has only token ids, and the ids of an image are placeholders."""
    for node in trio.decode:
        node.control(fault="drop-after", chunks=5)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    message = {"role": "user", "content": [{"type": "text", "text": PROMPT}, picture]}
    with openai_client(trio.proxy.url) as client:
        extra = {"return_token_ids": True}
        stream = client.chat.completions.create(
            model=MODEL, messages=cast("Any", [message]), stream=True, max_tokens=12, extra_body=extra
        )
        with pytest.raises(openai.APIError, match="decode-"):
            list(stream)


def test_when_nobody_can_resume_the_stream_ends_as_an_error(trio: Trio) -> None:
    for node in trio.decode:
        node.control(fault="drop-after", chunks=3)
    fields = {"ignore_eos": True}
    with openai_client(trio.proxy.url) as client:
        stream = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, max_tokens=200, extra_body=fields)
        with pytest.raises(openai.APIError):
            list(stream)


def test_resuming_can_be_switched_off() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        sim_node("decode") as other,
        proxy_in_front_of(prefill, decode, other, flags=["--no-resume"]) as proxy,
    ):
        for node in (decode, other):
            node.control(fault="drop-after", chunks=3)
        with pytest.raises(httpx.RemoteProtocolError):
            http.post(f"{proxy.url}/v1/completions", json=COMPLETION | {"stream": True})
        assert "return_token_ids" not in str(
            [node.received()[-1]["body"] for node in (decode, other) if node.received()]
        )


def test_a_node_that_dies_altogether_is_left_behind() -> None:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as dying,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, dying, decode) as proxy,
    ):
        whole = http.post(f"{prefill.url}/v1/completions", json=COMPLETION).json()["choices"][0]["text"]
        dying.control(fault="exit-after", chunks=5)
        for _ in range(2):
            answer = http.post(f"{proxy.url}/v1/completions", json=COMPLETION | {"stream": True}, timeout=60)
            assert said(answer) == whole
