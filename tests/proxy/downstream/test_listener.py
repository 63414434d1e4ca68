"""How new connections are taken."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager

import trustme

from proxy.downstream.listener import Loop

CROWD = 64
Address = tuple[str, int]


class Hall:
    """A server, and who has come in at which turn of the loop."""

    def __init__(self) -> None:
        self.turn = 0
        self.came: list[int] = []
        self.left = 0

    @asynccontextmanager
    async def open(self, context: ssl.SSLContext | None = None) -> AsyncIterator[asyncio.AbstractServer]:
        hall = self

        class Guest(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                hall.came.append(hall.turn)
                transport.write(b"hello")  # type: ignore[attr-defined]

            def connection_lost(self, exc: Exception | None) -> None:
                del exc
                hall.left += 1

        async with await asyncio.get_running_loop().create_server(Guest, "127.0.0.1", 0, ssl=context) as server:
            yield server

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.turn += 1
            await asyncio.sleep(0)


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(bounded())


def address(server: asyncio.AbstractServer) -> Address:
    found: Address = server.sockets[0].getsockname()  # type: ignore[attr-defined]
    return found


def test_a_crowd_that_comes_at_once_is_let_in_at_once() -> None:
    async def main() -> None:
        hall = Hall()
        async with hall.open() as server:
            with ExitStack() as crowd:
                guests = [crowd.enter_context(socket.create_connection(address(server))) for _ in range(CROWD)]
                await hall.until(lambda: len(hall.came) == CROWD)
                assert hall.came[-1] - hall.came[0] <= 6
                assert {guest.recv(5) for guest in guests} == {b"hello"}
            await hall.until(lambda: hall.left == CROWD)

    run(main())


def test_whoever_comes_just_when_it_closes_is_not_forgotten_inside() -> None:
    async def main() -> None:
        hall = Hall()
        async with hall.open() as server:
            with ExitStack() as crowd:
                for _ in range(CROWD):
                    crowd.enter_context(socket.create_connection(address(server)))
                await hall.until(lambda: len(hall.came) == 1)
                server.close()
                for _ in range(20):
                    await asyncio.sleep(0)
                assert len(hall.came) - hall.left <= 2  # those that libuv itself had taken before

    run(main())


def test_a_crowd_over_tls_is_let_in_and_whoever_does_not_speak_it_is_sent_away() -> None:
    authority = trustme.CA()
    at_the_door, outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(at_the_door)
    authority.configure_trust(outside)

    def greeted(where: Address) -> bytes:
        with socket.create_connection(where) as plain, outside.wrap_socket(plain, server_hostname=where[0]) as guest:
            return guest.recv(5)

    def sent_away(where: Address) -> bytes:
        with socket.create_connection(where) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            try:
                return stranger.recv(5)
            except ConnectionResetError:
                return b""

    async def main() -> None:
        async with Hall().open(at_the_door) as server:
            where = address(server)
            told = await asyncio.gather(
                *(asyncio.to_thread(ask, where) for _ in range(8) for ask in (greeted, sent_away))
            )
            assert told[::2] == [b"hello"] * 8
            assert not any(word.startswith(b"hello") for word in told[1::2])

    run(main())
