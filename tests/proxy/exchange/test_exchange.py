"""Moments of an exchange that no client can hit on purpose."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import orjson
import pytest

from engines.base import Rank, Role
from engines.topology import Node, Topology
from proxy.exchange.exchange import DataPlane, Exchange, Request
from proxy.exchange.release import Releaser
from proxy.exchange.retry import RetryBudget
from proxy.nodes.fleet import Pool
from proxy.serving.admission import Admission
from proxy.serving.metrics import Metrics
from proxy.settings import ProxySettings
from proxy.upstream.client import Deadline, Headers, NodeClients

PREFILLED = {"choices": [{"finish_reason": "length"}], "usage": {"prompt_tokens": 3}}


class Prefilled:
    """The answer of a prefill node that holds KV."""

    status = 200
    headers: Headers = []  # noqa: RUF012

    async def load(self) -> bytes:
        return orjson.dumps(PREFILLED)


class Clients:
    """A prefill node that answers, and a decode node that is reached only when `sends` is set."""

    def __init__(self, *, sends: bool) -> None:
        self._sends = sends
        self.at_decode = asyncio.Event()

    def of(self, node: Any) -> "Clients":
        self._role = node.spec.role
        return self

    async def request(self, *_: Any, deadline: Deadline, on_sent: Callable[[], None]) -> Any:
        del deadline
        if self._role is Role.PREFILL:
            return Prefilled()
        if self._sends:
            on_sent()
        self.at_decode.set()
        return await asyncio.Event().wait()


class Client:
    """A client that has not been answered."""

    is_gone = False
    started = False


class Releases(Releaser):
    """Notes what it is told to release."""

    def __init__(self) -> None:
        self.released: list[Any] = []

    def release(self, body: Any, transfer_params: Any) -> None:
        del body
        self.released.append(transfer_params)


async def leave_at_decode(*, sends: bool) -> tuple[list[Any], Pool]:
    """An exchange whose client leaves while its decode leg is being sent; what was released then."""
    nodes = Topology(
        nodes=(
            Node(name="p", role=Role.PREFILL, url="http://h:1", bootstrap="http://h:2"),
            Node(name="d", role=Role.DECODE, url="http://h:3"),
        )
    )
    pool = Pool(nodes)
    for node in pool:
        node.ready((Rank(0, "e"),), ())
    settings = ProxySettings(topology=nodes)
    clients, releases = Clients(sends=sends), Releases()
    plane = DataPlane(
        settings,
        pool,
        cast("NodeClients", clients),
        Metrics(),
        releases,
        Admission(settings, pool.has_room),
        RetryBudget(),
    )
    request = Request("/v1/completions", {"prompt": "x", "stream": True}, "id", [], 60)
    running = asyncio.create_task(Exchange(plane, request, cast("Any", Client())).run())
    await clients.at_decode.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return releases.released, pool


@pytest.mark.parametrize("sends", [False, True])
def test_a_client_that_leaves_between_the_legs_has_its_hand_off_released_if_no_node_has_it(sends: bool) -> None:
    """Once it is sent, the decode node's own abort frees it; a second pull would keep a sender task."""
    released, pool = asyncio.run(leave_at_decode(sends=sends))
    assert len(released) == (0 if sends else 1)
    assert [node.in_flight for node in pool] == [0, 0]
