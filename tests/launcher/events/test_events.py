"""One stream of what happens, and what shows or keeps it."""

import asyncio
import io
import json
import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console

from launcher.events import events as stream
from launcher.events.apart import apart
from launcher.events.events import Event, Events
from launcher.events.files import AsJson, InLog
from launcher.events.screen import OnScreen
from launcher.events.systemd import ToSystemd
from launcher.events.tail import last_line, tail


def test_the_tail_of_a_log_skips_empty_lines_and_overwritten_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n\nloading 1%\rloading 100%\r\nlast \xff\n\n")
    assert tail(log, 2) == ["loading 100%", "last \ufffd"]
    assert tail(log, 9)[0] == "first"
    assert tail(log, 9, begin=7)[0] == "loading 100%"


def test_the_tail_of_a_long_log_is_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {n}" for n in range(100_000)))
    assert tail(log, 1) == ["line 99999"]
    assert len(tail(log, 50)) == 50


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert tail(tmp_path / "none", 3) == []
    assert last_line(tmp_path / "none")() == ""


def told(error: type[BaseException] | None = None) -> list[str]:
    """The events of a step that ends well, or with an error."""
    seen: list[Event] = []
    events = Events(seen.append)

    def work() -> None:
        with events.step("node [a]", node="a"):
            events.say("meanwhile", "warning")
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert events.running == []
    return [f"{event.kind} {event.text}" for event in seen]


@pytest.mark.parametrize(
    ("error", "end"),
    [(None, "done"), (RuntimeError, "failed"), (asyncio.CancelledError, "stopped"), (KeyboardInterrupt, "stopped")],
)
def test_a_step_begins_and_ends_well_or_fails_or_is_stopped_by_what_happened_to_another(
    error: type[BaseException] | None, end: str
) -> None:
    assert told(error) == ["begun node [a]", "warning meanwhile", f"{end} node [a]"]


def test_a_sink_that_fails_ends_nothing_and_the_others_hear_it() -> None:
    def broken(_: Event) -> None:
        raise OSError("the terminal has gone")

    seen: list[str] = []
    events = Events(broken, lambda event: seen.append(event.text))
    events.say("one")
    with events.also(broken), events.also(lambda event: seen.append(f"asker: {event.text}")):
        events.say("two")
    events.say("three")
    assert seen == ["one", "two", "asker: two", "three"]


def test_a_long_step_says_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_NEWS_EVERY_S", 0.01)
    seen: list[Event] = []
    events = Events(seen.append)

    async def main() -> None:
        async with events.shown():
            with events.step("node", lambda: "its last line"):
                while not any(event.kind == "news" for event in seen):
                    await asyncio.sleep(0.01)

    asyncio.run(main())
    assert next(event for event in seen if event.kind == "news").in_words() == "  node  0 s  its last line"


def shown(*, terminal: bool) -> str:
    output = io.StringIO()
    screen = OnScreen(Console(file=output, force_terminal=terminal, width=100))
    events = Events(screen, live=screen.live)

    async def main() -> None:
        async with events.shown():
            with events.step("node [a]", lambda: "its last line"):
                while terminal and "its last line" not in output.getvalue():
                    await asyncio.sleep(0.01)
            events.say("a note\nand more of it")
            events.say("\nReady: x", "ready")

    asyncio.run(main())
    return output.getvalue()


def test_on_a_pipe_a_step_is_a_line_at_its_start_and_one_at_its_end_and_a_note_has_its_time() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[:2] == ["  node [a] ...", "✓ node [a]  0 s"]
    assert lines[2][2] == lines[2][5] == ":"
    assert lines[2].endswith(" a note")
    assert lines[3:] == ["and more of it", "", "Ready: x"]


def test_on_a_terminal_a_running_step_shows_its_last_line() -> None:
    assert "its last line" in shown(terminal=True)


def test_a_screen_that_takes_no_more_stops_nothing_and_costs_no_line_of_the_log(tmp_path: Path) -> None:
    """Ctrl-S, or a pager that nobody turns."""
    goes_on = threading.Event()
    seen: list[str] = []

    def stalled(event: Event) -> None:
        goes_on.wait()
        seen.append(event.text)

    with apart(stalled) as sink:
        events = Events(InLog(tmp_path / "launcher.log"), sink)
        for number in range(100):
            events.say(f"event {number}")
        assert len((tmp_path / "launcher.log").read_text().splitlines()) == 100
        assert seen == []
        goes_on.set()
    assert seen == [f"event {number}" for number in range(100)]


def test_the_launchers_log_has_every_event_with_its_time_and_is_its_users_only(tmp_path: Path) -> None:
    log = tmp_path / "launcher.log"
    events = Events(InLog(log))
    with events.step("node"):
        events.say("a note\nand more of it", "error")
    lines = log.read_text().splitlines()
    assert [line[20:] for line in (lines[0], lines[1], lines[3])] == ["  node ...", "a note", "✓ node  0 s"]
    assert lines[2] == "    and more of it"
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "launcher.log").symlink_to(tmp_path / "victim")
    Events(InLog(tmp_path / "launcher.log")).say("x")
    assert not (tmp_path / "victim").exists()


def test_programs_read_an_object_a_line() -> None:
    output = io.StringIO()
    events = Events(AsJson(output))
    with events.step("decode-0 on x", node="decode-0"):
        pass
    events.say("\nReady", "ready", url="http://x/v1")
    begun, done, ready = map(json.loads, output.getvalue().splitlines())
    assert (begun["kind"], begun["node"], begun["seconds"]) == ("begun", "decode-0", None)
    assert done["seconds"] >= 0
    assert (ready["text"], ready["url"], ready["time"][:2]) == ("Ready", "http://x/v1", "20")


def test_systemd_is_told_where_it_wants_to_be(tmp_path: Path) -> None:
    assert ToSystemd.wanted({}) is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        sink = ToSystemd.wanted({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert sink is not None
        events = Events(sink)
        events.say("\nReady: http://x\nLogs: y", "ready")
        events.say("Stopping: proxy, decode nodes, prefill nodes.")
        assert systemd.recv(999) == b"STATUS=Ready: http://x\nREADY=1"
        assert systemd.recv(999).endswith(b"STOPPING=1")


def test_on_a_narrow_terminal_the_last_line_gives_way_and_never_the_time() -> None:
    output = io.StringIO()
    screen = OnScreen(Console(file=output, force_terminal=True, width=60))
    events = Events(screen, live=screen.live)

    async def main() -> None:
        async with events.shown():
            with events.step("prefill-0 on http://127.0.0.1:8100", lambda: "a long line of its log " * 9):
                while "a long line" not in output.getvalue():
                    await asyncio.sleep(0.01)

    asyncio.run(main())
    assert "  prefill-0 on http://127.0.0.1:8100  0 s" in output.getvalue()
    assert "a long line of i…" in output.getvalue()
