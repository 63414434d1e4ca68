"""Bodies that take long to parse are parsed in another process."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
import psutil
import pytest

from engines.openai.request import InvalidBodyError
from proxy.errors import BodyTooLargeError
from proxy.exchange.parsing import Parser

PATH = "/v1/completions"


def played(story: Callable[[Parser], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        parser = Parser()
        try:
            await asyncio.wait_for(story(parser), 120)
        finally:
            parser.close()

    asyncio.run(main())
    children = psutil.process_iter(["ppid", "cmdline"])  # one that ends meanwhile is passed over
    own = [child for child in children if child.info["ppid"] == os.getpid()]
    psutil.wait_procs([child for child in own if "spawn_main" in " ".join(child.info["cmdline"] or ())], timeout=30)


@pytest.mark.parametrize(
    ("raw", "quick"),
    [
        (b'{"prompt": "x"}', True),
        (b'{"prompt": "' + b"words, and more words of the kind that people write. " * 90_000 + b'"}', True),
        (b"[" + b"[]," * 400_000 + b"[]]", False),
        (b'{"prompt": [' + b"1," * 600_000 + b"1]}", False),
        (b'{"prompt": "' + b"x" * 17 * 2**20 + b'"}', False),
    ],
    ids=["short", "long text", "many lists", "many ids", "very long text"],
)
def test_what_takes_long_is_known_by_its_length_and_its_number_of_values(raw: bytes, quick: bool) -> None:
    assert Parser.is_quick(raw) is quick


def test_it_is_the_same_request_and_its_large_values_are_not_looked_into() -> None:
    ids = list(range(300_000))
    raw = orjson.dumps({"prompt": ids, "stop": ["a"], "kv_transfer_params": {"transfer_id": "mine"}, "max_tokens": 5})

    async def story(parser: Parser) -> None:
        found = await parser.parse(PATH, raw)
        assert isinstance(found.body["prompt"], orjson.Fragment)
        assert orjson.loads(orjson.dumps(found.body)) == {"prompt": ids, "stop": ["a"], "max_tokens": 5}
        assert (found.reason, found.tokens) == (None, 300_000)
        with pytest.raises(InvalidBodyError, match="not valid JSON"):
            await parser.parse(PATH, raw[:-1])

    played(story)


def test_media_that_a_node_would_fetch_are_refused_in_a_body_that_large() -> None:
    named = {"messages": [{"content": [{"image_url": "http://169.254.169.254/x"}]}], "pad": [0] * 300_000}

    async def story(parser: Parser) -> None:
        with pytest.raises(InvalidBodyError, match="send them as data: URLs"):
            await parser.parse("/v1/chat/completions", orjson.dumps(named))

    played(story)


def test_when_the_other_process_dies_a_new_one_is_started() -> None:
    raw = orjson.dumps({"prompt": [1] * 300_000})

    async def story(parser: Parser) -> None:
        for _ in range(3):
            assert (await parser.parse(PATH, raw)).tokens == 300_000
            assert parser._pool is not None
            for pid in tuple(parser._pool._processes):
                os.kill(pid, signal.SIGKILL)

    played(story)


def test_a_body_that_grows_too_much_is_refused_and_takes_nothing_down() -> None:
    """Twenty million empty objects, as many as the usual limit lets in, would take gigabytes when parsed."""
    raw = b'{"x": [' + b"{}," * 22_000_000 + b"{}]}"

    async def story(parser: Parser) -> None:
        with pytest.raises(BodyTooLargeError, match="too many values"):
            await parser.parse(PATH, raw)
        assert (await parser.parse(PATH, b'{"prompt": "x"}')).reason is None

    played(story)
