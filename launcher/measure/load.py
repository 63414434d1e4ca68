"""One round of requests, by the load generator; its rows, and whether it was fast enough itself."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from urllib.parse import urlsplit

from ..errors import LauncherError
from .loadgen import Planned, Row, Target
from .workload import Workload, token_ids

_TIMEOUT_S = 900.0
_LONGEST_LINE = 2**20
MOST_CPU = 0.8
"""Of one core: beyond it the load generator is late by itself, and measures that."""


class TooSlowError(LauncherError):
    """The load generator could not keep up."""


def planned(workload: Workload, model: str, vocabulary: Sequence[int], draw: int) -> Iterator[Planned]:
    """Each request: greedy, as long as the workload says, streamed; those of a session say so."""
    for number, request in enumerate(workload.requests):
        session = {} if request.session is None else {"x-session-id": str(request.session)}
        yield (
            number,
            request.at,
            {
                "model": model, "prompt": token_ids(request, workload.piece_tokens, vocabulary, draw),
                "max_tokens": request.output, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True},
            },
            session,
        )  # fmt: skip


async def run(
    url: str,
    headers: Mapping[str, str],
    plan: Iterator[Planned],
    told: Callable[[Row], object] = lambda _: None,
    *,
    wants_times: bool = False,
) -> list[Row]:
    """All of it, in the order in which they were due. `told`: each as it ends. Raises TooSlowError, LauncherError."""
    parts = urlsplit(url)
    target = Target(
        str(parts.hostname), parts.port or 80, "/v1/completions",
        {"content-type": "application/json", **headers}, _TIMEOUT_S, wants_times,
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "launcher.measure.loadgen",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LONGEST_LINE,
        start_new_session=True,  # Ctrl-C on a terminal is for the launcher, which ends it
    )  # fmt: skip
    assert process.stdin is not None  # noqa: S101  asked for
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(json.dumps(asdict(target)).encode() + b"\n")
        for line in plan:
            process.stdin.write(json.dumps(line).encode() + b"\n")
            await process.stdin.drain()
        process.stdin.write(b"go\n")
        await process.stdin.drain()
        return await _rows(process.stdout, told)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
        await process.wait()


async def _rows(output: asyncio.StreamReader, told: Callable[[Row], object]) -> list[Row]:
    rows = list[Row]()
    async for line in output:
        found = json.loads(line)
        if "cpu" in found:
            busy = found["cpu"] / max(found["wall"], 1e-9)
            if busy > MOST_CPU:
                raise TooSlowError(
                    f"the load generator was the bottleneck: it used {busy:.0%} of a core",
                    "Fewer requests a second (--rate), or a machine with a faster core",
                )
            return sorted(rows, key=lambda row: (row.due, row.number))
        rows.append(Row(**found))
        told(rows[-1])
    raise LauncherError("the load generator ended before its requests did")
