"""Sends requests at given times, whatever becomes of those before: `python -m launcher.measure.loadgen`.

A process of its own, so that its CPU is known: a load generator that is late measures itself. Reads a line of JSON
(`Target`) and then one for each request (`Planned`); when all came, and a line `go` after them, it begins. Writes a
line for each (`Row`) as it ends, and last `{"cpu": seconds, "wall": seconds}`.
"""

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import httptools
import uvloop

_TAIL = 4096
"""The last bytes of a stream, in which its usage is."""
_TOLD = re.compile(rb'"completion_tokens":(\d+)')
_BLOCK = 2**16
_TOKEN = b'"choices":[{'
"""In every event that has a token, and in no other: neither in usage nor in comments."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    timeout_s: float
    wants_times: bool = False
    """Of the tokens, too."""


Planned = tuple[int, float, dict[str, Any], dict[str, str]]
"""(number, seconds after the beginning, body, headers of its own)."""


@dataclass(slots=True)
class Row:
    """What became of one request; times in seconds after the beginning, 0 when not reached."""

    number: int
    due: float
    sent: float = 0.0
    first: float = 0.0
    """Its first token."""
    last: float = 0.0
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    path: str = ""
    """As the proxy says: whether it was handed over, or why not."""
    problem: str = ""
    times: list[tuple[float, int]] = field(default_factory=list)
    """(when, tokens so far) of each piece that came, where they are wanted. An engine that is ahead of its client puts
    several tokens into one event: where the body asks for usage in each, that counts them.
    """


class _Answer:
    """Taken apart by httptools."""

    def __init__(self, row: Row, began: float, *, wants_times: bool) -> None:
        self._row = row
        self._wants_times = wants_times
        self._began = began
        self._parser = httptools.HttpResponseParser(self)
        self._tail = b""
        self.is_done = False

    def feed(self, data: bytes) -> None:
        """Raises HttpParserError."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-pd-path":
            self._row.path = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        tokens = body.count(_TOKEN)
        if tokens:
            now = time.monotonic() - self._began
            self._row.first = self._row.first or now
            self._row.last = now
            if self._wants_times:
                before = self._row.times[-1][1] if self._row.times else 0
                told = _TOLD.findall(body)
                self._row.times.append((now, int(told[-1]) if told else before + tokens))
        self._tail = (self._tail + body)[-_TAIL:]

    def on_message_complete(self) -> None:
        self.is_done = True
        status = self._parser.get_status_code()
        if status != 200:
            self._row.problem = f"{status}: {self._tail[:200].decode('utf-8', 'replace')}"
            return
        self._read_usage()

    def _read_usage(self) -> None:
        lines = [line for line in self._tail.decode("utf-8", "replace").splitlines() if line.startswith("data: ")]
        if not lines or lines[-1] != "data: [DONE]":
            self._row.problem = "the stream ended without its end"
            return
        for line in reversed(lines[:-1]):
            try:
                usage = json.loads(line.removeprefix("data: ")).get("usage")
            except ValueError:
                continue
            if usage:
                self._row.prompt_tokens = usage["prompt_tokens"]
                self._row.output_tokens = usage["completion_tokens"]
                return
        self._row.problem = "the stream says no usage"


async def _ask(target: Target, row: Row, body: bytes, headers: dict[str, str], began: float) -> None:
    """Raises OSError, HttpParserError."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        head = {"host": f"{target.host}:{target.port}", "content-length": str(len(body)), "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in (head | target.headers | headers).items())
        row.sent = time.monotonic() - began
        writer.write(f"POST {target.path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        answer = _Answer(row, began, wants_times=target.wants_times)
        while not answer.is_done:
            data = await reader.read(_BLOCK)
            if not data:
                raise ConnectionResetError("the connection broke")
            answer.feed(data)
    finally:
        writer.close()


async def _one(target: Target, row: Row, body: bytes, headers: dict[str, str], began: float) -> None:
    await asyncio.sleep(began + row.due - time.monotonic())
    try:
        async with asyncio.timeout(target.timeout_s):
            await _ask(target, row, body, headers, began)
    except TimeoutError:
        row.problem = f"no end after {target.timeout_s:g} s"
    except (OSError, httptools.HttpParserError) as exc:
        row.problem = str(exc) or type(exc).__name__
    row.ended = time.monotonic() - began
    _tell(asdict(row))


def _tell(line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def _main() -> None:
    target = Target(**json.loads(sys.stdin.readline()))
    plan = []
    for line in iter(sys.stdin.readline, "go\n"):
        if not line:
            return  # whoever gave the plan has gone
        number, due, body, headers = json.loads(line)
        plan.append((Row(number, due), json.dumps(body).encode(), headers))
    cpu, began = time.process_time(), time.monotonic()
    await asyncio.gather(*(_one(target, row, body, headers, began) for row, body, headers in plan))
    _tell({"cpu": time.process_time() - cpu, "wall": time.monotonic() - began})


if __name__ == "__main__":
    uvloop.run(_main())
