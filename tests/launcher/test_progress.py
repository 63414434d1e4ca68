"""What the user sees while something slow goes on."""

import asyncio
import io
from pathlib import Path

import pytest
from rich.console import Console

from launcher import progress
from launcher.progress import Progress, last_line, tail


def test_the_tail_of_a_log_skips_empty_lines_and_overwritten_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n\nloading 1%\rloading 100%\r\nlast \xff\n\n")
    assert tail(log, 2) == ["loading 100%", "last \ufffd"]
    assert tail(log, 9)[0] == "first"


def test_the_tail_of_a_long_log_is_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {n}" for n in range(100_000)))
    assert tail(log, 1) == ["line 99999"]
    assert len(tail(log, 50)) == 50


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert tail(tmp_path / "none", 3) == []
    assert last_line(tmp_path / "none")() == ""


def shown(*, terminal: bool, fail: bool = False) -> str:
    output = io.StringIO()
    steps = Progress(Console(file=output, force_terminal=terminal, width=100))

    async def main() -> None:
        async with steps.shown():
            with steps.step("node [a]", lambda: "its last line"):
                await asyncio.sleep(0.1)
                if fail:
                    raise RuntimeError("no")

    if fail:
        with pytest.raises(RuntimeError):
            asyncio.run(main())
    else:
        asyncio.run(main())
    return output.getvalue()


def test_on_a_pipe_a_step_is_a_line_at_its_start_and_one_at_its_end() -> None:
    assert shown(terminal=False).splitlines() == ["  node [a] ...", "✓ node [a]  0 s"]


def test_a_step_that_fails_is_marked() -> None:
    assert shown(terminal=False, fail=True).splitlines()[-1] == "✗ node [a]  0 s"


def test_a_long_step_says_that_it_is_still_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SAY_AGAIN_S", 0.01)
    assert "  node [a]  0 s  its last line" in shown(terminal=False).splitlines()


def test_on_a_terminal_a_running_step_shows_its_last_line() -> None:
    assert "its last line" in shown(terminal=True)
