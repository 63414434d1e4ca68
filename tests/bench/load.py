"""Load on a proxy, from one process: `python load.py URL_PORT MODE CLIENTS REQUESTS TOKENS PROMPT_BYTES`.

MODE: `stream` or `whole`. Each client asks, waits for its answer's end, asks again. Prints one JSON line: requests,
chunks, errors, seconds, TTFT and ITL percentiles in ms (an ITL is how late a chunk came after it was written).
"""

import asyncio
import json
import re
import resource
import sys
import time

import uvloop

_T = re.compile(rb'"t":([0-9.]+)')


class Client(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.buffer = b""
        self.first = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.ask()

    def ask(self) -> None:
        if not self.run.take():
            self.transport.close()
            return
        self.buffer, self.first, self.asked = b"", True, time.monotonic()
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        times = _T.findall(data)
        if times:
            if self.first:
                self.first = False
                self.run.ttft.append(now - self.asked)
            self.run.chunks += len(times)
            self.run.late.append(now - float(times[0]))
        self.buffer = (self.buffer if len(self.buffer) < 4096 else self.buffer[:64] + self.buffer[-64:]) + data
        if self.ended():
            self.run.done(ok=self.buffer.startswith(b"HTTP/1.1 200"))
            self.ask()

    def ended(self) -> bool:
        if self.buffer.endswith(b"0\r\n\r\n"):
            return True
        head = self.buffer.find(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", self.buffer[:head], re.IGNORECASE) if head > 0 else None
        return length is not None and len(self.buffer) >= head + 4 + int(length.group(1))

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.run.lost(self)


class Run:
    """What all clients share."""

    def __init__(self, mode: str, clients: int, requests: int, tokens: int, prompt_bytes: int) -> None:
        body = json.dumps(
            {
                "model": "tiny",
                "stream": mode == "stream",
                "max_tokens": tokens,
                "messages": [{"role": "user", "content": "x" * prompt_bytes}],
            }
        ).encode()
        self.request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.left, self.clients = requests, clients
        self.requests = self.chunks = self.errors = self.closed = 0
        self.ttft: list[float] = []
        self.late: list[float] = []
        self.finished = asyncio.Event()

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def done(self, *, ok: bool) -> None:
        self.requests += 1
        self.errors += not ok

    def lost(self, _: Client) -> None:
        self.closed += 1
        if self.closed == self.clients:
            self.finished.set()


def percentile(values: list[float], share: float) -> float:
    return round(sorted(values)[int(share * (len(values) - 1))] * 1000, 3) if values else 0.0


async def main() -> None:
    port, mode = int(sys.argv[1]), sys.argv[2]
    clients, requests, tokens, prompt_bytes = map(int, sys.argv[3:7])
    run = Run(mode, clients, requests, tokens, prompt_bytes)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    for _ in range(clients):
        await loop.create_connection(lambda: Client(run), "127.0.0.1", port)
    await asyncio.wait_for(run.finished.wait(), 600)
    figures = {
        "requests": run.requests,
        "chunks": run.chunks,
        "errors": run.errors,
        "seconds": round(time.monotonic() - started, 3),
        "ttft_p50": percentile(run.ttft, 0.5),
        "ttft_p99": percentile(run.ttft, 0.99),
        "late_p50": percentile(run.late, 0.5),
        "late_p99": percentile(run.late, 0.99),
    }
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    uvloop.run(main())
