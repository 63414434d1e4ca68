"""A byte relay: the floor for any proxy on this event loop. `python relay.py PORT NODE_PORT`."""

import asyncio
import sys

import uvloop


class End(asyncio.Protocol):
    """One of the two ends of a connection."""

    def __init__(self) -> None:
        self.other: End | None = None
        self.waiting: list[bytes] = []
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)
        else:
            self.waiting.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Client(End):
    """The end that clients connect to."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.connecting = asyncio.get_running_loop().create_task(self.connect())

    async def connect(self) -> None:
        _, node = await asyncio.get_running_loop().create_connection(End, "127.0.0.1", int(sys.argv[2]))
        node.other, self.other = self, node
        for data in self.waiting:
            node.transport.write(data)  # type: ignore[union-attr]


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Client, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
