"""The control socket: commands, one after the other, and every kind of nonsense."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError, LauncherError
from launcher.run import control
from launcher.run.control import ask, listening

Handle = Callable[[dict[str, Any], Callable[[str], None]], Awaitable[None]]


def asked(path: Path, handle: Handle, command: dict[str, Any]) -> list[str]:
    """What the asker hears. Raises LauncherError."""
    heard: list[str] = []

    async def story() -> None:
        async with listening(path, handle):
            await asyncio.to_thread(ask, path, command, heard.append)

    asyncio.run(story())
    return heard


def test_a_command_is_carried_out_and_what_comes_of_it_is_told(tmp_path: Path) -> None:
    async def handle(command: dict[str, Any], say: Callable[[str], None]) -> None:
        say(f"doing {command['do']}")
        await asyncio.sleep(0)
        say("nearly done")

    assert asked(tmp_path / "c", handle, {"do": "it"}) == ["doing it", "nearly done"]


def test_a_refusal_keeps_its_words_and_its_exit_code(tmp_path: Path) -> None:
    async def handle(command: dict[str, Any], say: Callable[[str], None]) -> None:
        del command, say
        raise ConfigError("no such node", "There are: none")

    with pytest.raises(LauncherError, match="no such node") as error:
        asked(tmp_path / "c", handle, {})
    assert (error.value.hint, error.value.exit_code) == ("There are: none", 2)


def test_a_fault_of_the_launchers_own_is_said_to_be_one(tmp_path: Path) -> None:
    async def handle(command: dict[str, Any], say: Callable[[str], None]) -> None:
        del say
        raise KeyError(command["do"])

    with pytest.raises(LauncherError, match="the launcher itself failed: KeyError"):
        asked(tmp_path / "c", handle, {"do": "it"})


@pytest.mark.parametrize("line", [b"no json\n", b"[]\n", b"\n", b"x" * 200_000 + b"\n", b"\xff\xfe\n"])
def test_what_is_no_command_is_refused(tmp_path: Path, line: bytes) -> None:
    async def handle(command: dict[str, Any], say: Callable[[str], None]) -> None:
        raise AssertionError((command, say))

    def told() -> Any:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "c"))
            client.sendall(line)
            with client.makefile() as answers:
                return json.loads(answers.readline())

    async def story() -> Any:
        async with listening(tmp_path / "c", handle):
            return await asyncio.to_thread(told)

    assert asyncio.run(story()) == {"error": "not a command", "hint": "", "exit_code": 2}


def test_an_asker_that_leaves_breaks_its_command_off(tmp_path: Path) -> None:
    async def story() -> str:
        ended = asyncio.get_running_loop().create_future()

        async def handle(command: dict[str, Any], say: Callable[[str], None]) -> None:
            del command
            say("begun")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.set_result("put right")
                raise

        async with listening(tmp_path / "c", handle):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c"))
            writer.write(b"{}\n")
            assert json.loads(await reader.readline()) == {"say": "begun"}
            writer.close()
            return str(await ended)

    assert asyncio.run(story()) == "put right"


def test_commands_wait_for_each_other_and_end_with_the_run(tmp_path: Path) -> None:
    async def story() -> list[dict[str, Any]]:
        async def handle(command: dict[str, Any], say: Callable[[str], None]) -> None:
            say(f"{command['do']} begun")
            await asyncio.Event().wait()

        async with listening(tmp_path / "c", handle):
            first_reader, first = await asyncio.open_unix_connection(str(tmp_path / "c"))
            first.write(b'{"do": "one"}\n')
            heard = [json.loads(await first_reader.readline())]
            second_reader, second = await asyncio.open_unix_connection(str(tmp_path / "c"))
            second.write(b'{"do": "two"}\n')
            heard.append(json.loads(await second_reader.readline()))
        heard.append(json.loads(await first_reader.readline()))
        for writer in (first, second):
            writer.close()
        return heard

    one, waits, broken_off = asyncio.run(story())
    assert (one, waits["say"]) == ({"say": "one begun"}, "Waiting for another command to be done.")
    assert "broken off" in broken_off["error"]


def test_a_command_whose_asker_has_left_while_it_waited_is_never_begun(tmp_path: Path) -> None:
    async def story() -> list[str]:
        begun: list[str] = []
        go_on = asyncio.Event()

        async def handle(command: dict[str, Any], say: Callable[[str], None]) -> None:
            begun.append(command["do"])
            say("begun")
            await go_on.wait()

        async with listening(tmp_path / "c", handle):
            writers = []
            for name in ("one", "two", "three"):
                reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c"))
                writer.write(json.dumps({"do": name}).encode() + b"\n")
                await reader.readline()
                writers.append(writer)
                if name == "two":
                    writer.close()  # Ctrl-C
                    assert await reader.read() == b""
            go_on.set()
            last = await reader.readline()
            assert json.loads(last) == {"say": "begun"}
            for writer in writers:
                writer.close()
            return begun

    assert asyncio.run(story()) == ["one", "three"]


def test_a_launcher_that_is_not_there_is_said_not_to_answer(tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match="does not answer: No such file"):
        control.ask(tmp_path / "none", {}, print)
