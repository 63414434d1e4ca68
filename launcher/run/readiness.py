"""When a node can be used: its API answers, and on a prefill node every worker is at the bootstrap server."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import httpx

from engines.base import NodeRole, Role
from engines.connectors import mooncake
from engines.connectors.names import CONNECTORS

from ..errors import NodeDiedError, NotReadyError
from ..events.tail import tail
from ..hosts.host import Running, exit_in_words
from ..plan.plan import NodeProcess, Plan

_ASK_EVERY_S = 0.5
_LINES_SHOWN = 15
_USED_WITHIN_S = 120.0
"""Nodes that are ready, by the proxy that has just been started."""


async def node_ready(child: Running, node: NodeProcess, timeout_s: float, begin: int) -> None:
    """Returns when the node can be used; raises NodeDiedError or NotReadyError. `begin`: of this life, in its log."""
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        await before_it_ends(child, _until_node_answers(client, node), timeout_s, begin)


async def service_ready(child: Running, timeout_s: float) -> None:
    """Returns when it listens on its first port; raises NodeDiedError or NotReadyError."""
    port = child.spec.ports[0]
    await before_it_ends(child, _until_it_listens(port.bind, port.first), timeout_s)


async def proxy_ready(child: Running, plan: Plan, timeout_s: float) -> None:
    """Returns when the proxy says that it can hand requests over, or without a connector answer them; raises
    NodeDiedError or NotReadyError.
    """
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        ready = _until_it_serves(client, f"{plan.proxy_url}/health", moves_kv=CONNECTORS[plan.connector].moves_kv)
        await before_it_ends(child, ready, timeout_s)


async def proxy_listens(child: Running, plan: Plan, timeout_s: float) -> None:
    """Returns when the proxy answers at all, whatever it says of its nodes; raises NodeDiedError or NotReadyError."""
    host, port = plan.proxy.ports[0].bind, plan.proxy.ports[0].first
    await before_it_ends(child, _until_it_listens(host, port), timeout_s)


def died(child: Running, begin: int = 0) -> NodeDiedError:
    """A child that ended by itself: how, its last lines in this life, and where the rest is."""
    code = child.exit_code if child.exit_code is not None else 0
    lines = "\n".join(f"    {line}" for line in tail(child.spec.log, _LINES_SHOWN, begin))
    return NodeDiedError(
        f"{child.spec.name} ended: {exit_in_words(code)}\n{lines}".rstrip(), f"All of it is in {child.spec.log}"
    )


async def before_it_ends(
    child: Running, ready: Coroutine[Any, Any, Any], limit_s: float | None, begin: int = 0
) -> None:
    """`ready`, raced against the child's own end and the clock. Raises NodeDiedError or NotReadyError."""
    waiting, ending = asyncio.create_task(ready), asyncio.create_task(child.ended())
    try:
        done, _ = await asyncio.wait((waiting, ending), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if ending in done:
            raise died(child, begin)
        if waiting not in done:
            news = (tail(child.spec.log, 1, begin) or ["-"])[0]
            raise NotReadyError(
                f"{child.spec.name} was not ready after {limit_s:g} s; its last line: {news}",
                f"Its log is {child.spec.log}; a slow start may need a longer --ready-timeout-s",
            )
        waiting.result()
    finally:
        waiting.cancel()
        ending.cancel()


async def _until_it_listens(address: str, port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(address, port)
        except OSError:
            await asyncio.sleep(_ASK_EVERY_S)
        else:
            writer.close()
            return


async def _until_node_answers(client: httpx.AsyncClient, node: NodeProcess) -> None:
    await _until_ok(client, f"{node.url}/health")
    while node.bootstrap and not await _has_workers(client, node.bootstrap, node.seat.data):
        await asyncio.sleep(_ASK_EVERY_S)


async def _until_ok(client: httpx.AsyncClient, url: str) -> None:
    while True:
        try:
            answer = await client.get(url)
        except httpx.HTTPError:
            pass
        else:
            if answer.status_code == httpx.codes.OK:
                return
        await asyncio.sleep(_ASK_EVERY_S)


async def _until_it_serves(client: httpx.AsyncClient, url: str, *, moves_kv: bool) -> None:
    """A proxy answers without a prefill node, too: nothing could be proven through it.

    Raises NotReadyError when it has looked at the nodes, which are ready, and does not use them.
    """
    loop = asyncio.get_running_loop()
    since: float | None = None
    while True:
        with suppress(httpx.HTTPError):
            nodes = (await client.get(url)).json()["nodes"]
            usable = [NodeRole(node["role"]) for node in nodes if node["usable"]]
            if usable and not moves_kv:
                return
            if len(usable) > 1 and all(any(role.does(part) for role in usable) for part in Role):
                return
            since = since or loop.time()
            if loop.time() - since > _USED_WITHIN_S:
                problems = "; ".join(f"{node['name']}: {node['problem']}" for node in nodes if not node["usable"])
                raise NotReadyError(
                    f"all nodes are ready, but the proxy does not use them: {problems}",
                    "Nodes must be alike where KV moves between them; `pd-launch check` compares their flags",
                )
        await asyncio.sleep(_ASK_EVERY_S)


async def _has_workers(client: httpx.AsyncClient, bootstrap: str, ranks: int) -> bool:
    """Every data-parallel rank is a hand-off target of its own."""
    try:
        answer = await client.get(f"{bootstrap}/query")
        return len(mooncake.engine_ids(answer.raise_for_status().json())) >= ranks
    except (httpx.HTTPError, ValueError):
        return False
