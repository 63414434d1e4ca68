"""Requests at given times whatever becomes of those before: `python -m tests.bench.openloop PORT`, plan on stdin.

The plan is JSON lines [at, prompt, output tokens, session], times in seconds from the beginning. Prints a JSON line a
request: [at, TTFT, seconds from the first to the last event, events] or [at] for one that failed; and last the CPU
seconds that this process used. A TTFT counts from when the request was due.
"""

import asyncio
import json
import sys
import time

import uvloop

EVENT = b'"text"'


async def ask(port: int, due: float, prompt: str, output: int, session: int) -> list[float]:
    """Raises OSError, ValueError."""
    body = json.dumps(
        {"model": "tiny", "prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0, "stream": True}
    ).encode()
    extra = b"x-session-id: %d\r\n" % session if session >= 0 else b""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(head + extra + b"content-length: %d\r\n\r\n" % len(body) + body)
        if not (await reader.readline()).startswith(b"HTTP/1.1 200"):
            raise ValueError("refused")
        first = last = 0.0
        events, is_whole = 0, False
        while chunk := await reader.read(2**16):
            if found := chunk.count(EVENT):
                last = time.monotonic()
                first = first or last
                events += found
            is_whole = is_whole or b"[DONE]" in chunk
        if not (first and is_whole):
            raise ValueError("broken off")
        return [first - due, last - first, events]
    finally:
        writer.close()


async def main() -> None:
    port = int(sys.argv[1])
    plan = [json.loads(line) for line in sys.stdin]
    began = time.monotonic() + 0.5
    limit_s = 120.0

    async def one(at: float, prompt: str, output: int, session: int) -> list[float]:
        await asyncio.sleep(began + at - time.monotonic())
        try:
            async with asyncio.timeout(limit_s):
                return [at, *await ask(port, began + at, prompt, output, session)]
        except (OSError, ValueError, TimeoutError):
            return [at]

    for result in await asyncio.gather(*(one(*row) for row in plan)):
        print(json.dumps(result))  # noqa: T201
    print(json.dumps(time.process_time()))  # noqa: T201


if __name__ == "__main__":
    uvloop.run(main())
