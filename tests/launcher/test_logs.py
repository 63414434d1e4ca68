"""Logs as one time line, followed, and turned over."""

import asyncio
from pathlib import Path

import pytest

from launcher import logs
from launcher.errors import ConfigError


def test_lines_of_several_logs_are_put_in_order_by_time(tmp_path: Path) -> None:
    (tmp_path / "prefill-0.log").write_text("starting\nINFO 11-23 03:00:02 [a.py:1] two\n  its second line\n")
    (tmp_path / "decode-0.log").write_text("I1123 03:00:01.5  1 b.cpp:1] one\nINFO 11-23 03:00:03 [a.py:1] three\n")
    merged = [(line.log, line.text[-5:]) for line in logs.time_line(logs.files_of(tmp_path))]
    assert merged == [
        ("prefill-0", "rting"),
        ("decode-0", "] one"),
        ("prefill-0", "] two"),
        ("prefill-0", " line"),
        ("decode-0", "three"),
    ]


def test_a_log_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "prefill-0.log").touch()
    with pytest.raises(ConfigError, match="no log of decode-7") as error:
        logs.files_of(tmp_path, ["decode-7"])
    assert "prefill-0" in error.value.hint


def test_following_gives_whole_lines_as_they_come_and_survives_turning_over(tmp_path: Path) -> None:
    file = tmp_path / "node.log"
    file.write_text("old\n")

    async def followed() -> list[str]:
        got: list[str] = []

        async def read() -> None:
            async for line in logs.follow([file], logs.ends([file])):
                got.append(line.text)
                if len(got) == 3:
                    return

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
        with file.open("a") as log:
            for piece in ("first ", "line\n", "second\n"):
                log.write(piece)
                log.flush()
                await asyncio.sleep(0.3)
            while len(got) < 2:
                await asyncio.sleep(0.05)
            logs.turn_over(file, most_bytes=1)
            log.write("third\n")
            log.flush()
        await reading
        return got

    assert asyncio.run(asyncio.wait_for(followed(), 60)) == ["first line", "second", "third"]


def test_a_long_log_is_kept_under_another_name_and_the_oldest_goes(tmp_path: Path) -> None:
    file = tmp_path / "node.log"
    with file.open("ab") as writer:
        for turn in range(6):
            writer.write(b"turn %d\n" % turn)
            writer.flush()
            logs.turn_over(file, most_bytes=3)
        writer.write(b"now\n")
        writer.flush()
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"node.log": "now\n", "node.log.1": "turn 5\n", "node.log.2": "turn 4\n", "node.log.3": "turn 3\n"}


def test_a_log_within_its_length_stays(tmp_path: Path) -> None:
    file = tmp_path / "node.log"
    file.write_text("short\n")
    logs.turn_over(file)
    logs.turn_over(tmp_path / "none.log")
    assert [path.name for path in tmp_path.iterdir()] == ["node.log"]
