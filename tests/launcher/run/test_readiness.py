"""When the proxy is ready, and what is said of one that does not use its nodes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from launcher.errors import NotReadyError
from launcher.run import readiness


@asynccontextmanager
async def health(*tellings: dict[str, Any]) -> AsyncIterator[str]:
    """A server that says these one after the other, and the last one for ever."""
    left = list(tellings)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps(left.pop(0) if len(left) > 1 else left[0]).encode()
        writer.write(b"HTTP/1.1 503 x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/health"
    finally:
        server.close()


def told(prefill: str | None, decode: str | None) -> dict[str, Any]:
    """What is wrong with each node."""
    return {
        "nodes": [
            {"name": f"{role}-0", "role": role, "usable": problem is None, "problem": problem}
            for role, problem in (("prefill", prefill), ("decode", decode))
        ]
    }


def waited(*tellings: dict[str, Any], moves_kv: bool = True) -> None:
    async def story() -> None:
        async with health(*tellings) as url, httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(30):
            await readiness._until_it_serves(client, url, moves_kv=moves_kv)

    asyncio.run(story())


def test_without_a_connector_it_is_ready_when_it_uses_any_node() -> None:
    waited(told("not probed yet", "not probed yet"), told("not probed yet", None), moves_kv=False)


def test_it_is_ready_when_it_uses_a_node_of_each_role_whatever_else_is_wrong() -> None:
    waited(
        told("not probed yet", "not probed yet"),
        told(None, "not probed yet"),
        {"status": "degraded"} | told(None, None),
    )


def test_nodes_that_are_ready_and_that_it_does_not_use_are_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readiness, "_USED_WITHIN_S", 0.1)
    with pytest.raises(NotReadyError, match="does not use them: decode-0: its KV cache has block_size 32"):
        waited(told(None, "its KV cache has block_size 32, while 16 is expected"))
