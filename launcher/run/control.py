"""A run's control socket: `pd-launch restart` and `scale` ask the launcher that owns the run.

One JSON object a line. The asker sends one command; the launcher answers with lines to show, and at last with
{"done": true} or {"error": …, "hint": …, "exit_code": …}. An asker that leaves before that breaks its command off.
"""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LauncherError
from ..events.events import Say

Handler = Callable[[dict[str, Any], Say], Awaitable[None]]
_MOST_BYTES = 64 * 1024

logger = logging.getLogger("pd_launch")


@asynccontextmanager
async def listening(path: Path, handle: Handler) -> AsyncIterator[None]:
    """Answer commands, one after the other, for as long as this lasts; one that is not done by then is broken off."""
    busy = asyncio.Lock()
    asked: set[asyncio.Task[None]] = set()

    async def in_turn(command: dict[str, Any], say: Say) -> None:
        async with busy:
            await handle(command, say)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(message: dict[str, Any]) -> None:
            with suppress(OSError, RuntimeError):  # whoever asked has left
                writer.write(json.dumps(message).encode() + b"\n")

        def say(text: str) -> None:
            tell({"say": text})

        try:
            command = await _command(reader)
            if busy.locked():
                say("Waiting for another command to be done.")
            await _unless_it_leaves(in_turn(command, say), reader)
            tell({"done": True})
        except LauncherError as exc:
            tell({"error": str(exc), "hint": exc.hint, "exit_code": exc.exit_code})
        except asyncio.CancelledError:
            tell(
                {"error": "broken off: the run is being stopped, or whoever asked has left", "hint": "", "exit_code": 1}
            )
        except Exception as exc:
            logger.exception("a command failed in the launcher itself")
            tell({"error": f"the launcher itself failed: {exc!r}", "hint": "See launcher.log", "exit_code": 1})
        finally:
            writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        asked.add(task)
        task.add_done_callback(asked.discard)

    server = await asyncio.start_unix_server(begin, path, limit=_MOST_BYTES)
    try:
        yield
    finally:
        server.close()
        for task in tuple(asked):
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _command(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        command = json.loads(await reader.readline())
    except ValueError:  # no JSON, or a line that is too long
        command = None
    if not isinstance(command, dict):
        raise ConfigError("not a command")
    return command


async def _unless_it_leaves(work: Awaitable[None], reader: asyncio.StreamReader) -> None:
    """`work`, cancelled when whoever asked for it closes its connection (Ctrl-C). It puts things right itself then."""
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(reader.read(1))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
        await working
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


def ask(path: Path, command: dict[str, Any], say: Say) -> None:
    """Have a command done. Raises LauncherError with the launcher's own words and exit code."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(json.dumps(command).encode() + b"\n")
            with client.makefile() as answers:
                for line in answers:
                    answer = json.loads(line)
                    if "say" in answer:
                        say(answer["say"])
                    elif "error" in answer:
                        raise _RefusedError(answer)
                    else:
                        return
    except OSError as exc:
        raise LauncherError(f"the launcher of this run does not answer: {exc.strerror}") from exc
    raise LauncherError("the launcher ended before it was done")


class _RefusedError(LauncherError):
    """What the launcher said instead of doing it."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["error"], answer["hint"])
        self.exit_code = answer["exit_code"]
