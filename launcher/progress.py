"""What the user sees while something slow goes on: elapsed time, and the last line the child itself wrote.

On a terminal the running steps are redrawn in place; on a pipe each change is a plain line, and a long step says
every 15 seconds that it is still at it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

_REDRAW_S = 0.25
_SAY_AGAIN_S = 15.0
_TAIL_BYTES = 8192
_DETAIL_WIDTH = 120


@dataclass(eq=False, slots=True)
class _Step:
    name: str
    detail: Callable[[], str]
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started


class Screen(Console):
    """A console whose end, a closed terminal or pipe, is not the end of what it shows."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Steps that run now; finished ones are printed and stay."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._running: list[_Step] = []

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Show the running steps for as long as this lasts."""
        ticker = asyncio.create_task(self._redraw() if self.console.is_terminal else self._say_again())
        try:
            yield
        finally:
            ticker.cancel()
            with suppress(asyncio.CancelledError):
                await ticker

    @contextmanager
    def step(self, name: str, detail: Callable[[], str] = lambda: "") -> Iterator[None]:
        """A step of the work. `detail` gives its last news, one line."""
        step = _Step(name, detail)
        self._running.append(step)
        if not self.console.is_terminal:
            self._print(f"  {escape(name)} ...")
        mark = "[red]✗[/]"
        try:
            yield
            mark = "[green]✓[/]"
        finally:
            self._running.remove(step)
            self._print(f"{mark} {escape(name)}  [dim]{step.seconds():.0f} s[/]")

    def say(self, text: str) -> None:
        """A line for the user, as it is (no markup)."""
        self._print(escape(text))

    def _print(self, markup: str) -> None:
        with suppress(OSError):  # the terminal has gone, or the disk is full: that ends nothing
            self.console.print(markup, highlight=False, soft_wrap=True)

    async def _redraw(self) -> None:
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self._table(), refresh=True)
                await asyncio.sleep(_REDRAW_S)

    async def _say_again(self) -> None:
        while True:
            await asyncio.sleep(_SAY_AGAIN_S)
            for step in self._running:
                self._print(escape(f"  {step.name}  {step.seconds():.0f} s  {step.detail()[:_DETAIL_WIDTH]}"))

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        for step in self._running:
            table.add_row(f"  {escape(step.name)}", f"{step.seconds():.0f} s", f"[dim]{escape(step.detail())}[/]")
        return table


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a log; empty ones are left out, and so is what a progress bar has overwritten."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _TAIL_BYTES * max(1, lines // 20)))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [kept for line in text.split("\n") if (kept := line.rstrip("\r").rsplit("\r", 1)[-1].rstrip())][-lines:]


def last_line(file: Path) -> Callable[[], str]:
    """A `detail` for a step that writes this log."""
    return lambda: (tail(file, 1) or [""])[0]
