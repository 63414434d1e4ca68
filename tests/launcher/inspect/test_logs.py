"""Logs as one time line, followed, and turned over."""

import asyncio
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import ConfigError
from launcher.inspect import logs


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


def test_the_last_lines_of_all_logs_are_read_from_their_ends(tmp_path: Path) -> None:
    for log, odd in (("a", 0), ("b", 1)):
        stamped = (f"INFO 11-23 03:{n // 60:02d}:{n % 60:02d} [a.py:1] {n} {'x' * 300}\n" for n in range(odd, 2000, 2))
        (tmp_path / f"{log}.log").write_text("".join(stamped))
    files = logs.files_of(tmp_path)
    assert [line.text.split()[4] for line in logs.last_lines(files, 5)] == ["1995", "1996", "1997", "1998", "1999"]
    assert [line.text for line in logs.last_lines(files, 900)] == [line.text for line in logs.time_line(files)][-900:]
    assert logs.last_lines(files, 0) == []
    (tmp_path / "empty.log").touch()
    assert logs.last_lines([tmp_path / "empty.log"], 5) == []


def test_a_log_is_read_in_parts_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_PART_BYTES", 10)
    (tmp_path / "a.log.1").write_text("older\n")
    (tmp_path / "a.log").write_text("one\ntwo and more\nthree\nfour without an end")
    parts = list(logs.parts(tmp_path / "a.log"))
    assert all(part.endswith(b"\n") or not part for part in parts[:-1])
    assert b"".join(parts).decode() == "older\none\ntwo and more\nthree\nfour without an end"
    assert b"".join(logs.parts(tmp_path / "a.log", 4)).decode() == "two and more\nthree\nfour without an end"


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
            async for line in logs.follow(lambda: sorted(tmp_path.glob("*.log")), logs.ends([file])):
                got.append(line.text)
                if len(got) == 4:
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
        while len(got) < 3:
            await asyncio.sleep(0.05)
        (tmp_path / "late.log").write_text("a node that came later\n")
        await reading
        return got

    assert asyncio.run(asyncio.wait_for(followed(), 60)) == ["first line", "second", "third", "a node that came later"]


def test_a_time_line_and_what_follows_it_have_each_line_once_also_one_that_was_half_written(tmp_path: Path) -> None:
    file = tmp_path / "node.log"
    file.write_text("one\ntwo\nthr")
    places = logs.ends([file])
    with file.open("a") as log:
        log.write("ee\nfour\n")
    before = [line.text for line in logs.time_line([file], places)]
    tail = [line.text for line in logs.last_lines([file], 1, places)]
    after = [line.text for line in logs.added([file], places, {})]
    assert (before, tail, after) == (["one", "two"], ["two"], ["three", "four"])


def test_a_progress_bar_is_one_line(tmp_path: Path) -> None:
    """Its carriage returns end none."""
    file = tmp_path / "node.log"
    file.write_bytes(b"0 %\r50 %\r100 %\ndone\n")
    assert len(logs.last_lines([file], 9)) == 2


def test_the_last_lines_go_on_in_what_was_turned_over(tmp_path: Path) -> None:
    (tmp_path / "node.log.1").write_text("one\ntwo\n")
    (tmp_path / "node.log").write_text("three\n")
    assert [line.text for line in logs.last_lines([tmp_path / "node.log"], 2)] == ["two", "three"]


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


def test_lines_can_be_picked_by_time_and_by_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(
        "2026-11-23 03:00:01 one\n2026-11-23 03:00:02 two\n  more of two\n2026-11-23 03:00:03 three\n"
    )
    lines = list(logs.time_line(logs.files_of(tmp_path)))
    since = logs.moment("2026-11-23 03:00:02")
    assert [line.text[-3:] for line in logs.wanted(lines, since, None)] == ["two", "two", "ree"]
    assert [line.number for line in logs.wanted(lines, since, re.compile("tw|thr"))] == [2, 3, 4]


def test_a_time_is_so_long_ago_or_today_or_a_date() -> None:
    now = time.time()  # noqa: TID251  what is tested reads it too
    assert logs.moment("10m") == pytest.approx(now - 600, abs=30)
    assert logs.moment("1.5h") == pytest.approx(now - 5400, abs=30)
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    assert logs.moment("00:00") == pytest.approx(midnight, abs=3700)  # summer time may begin today
    assert logs.moment("2026-01-31T14:03:22+00:00") == datetime(2026, 1, 31, 14, 3, 22, tzinfo=UTC).timestamp()
    for nonsense in ("soon", "25:00", "10 minutes", ""):
        with pytest.raises(ConfigError, match="no time"):
            logs.moment(nonsense)
