"""A person's screen. On a terminal the running steps are redrawn in place; on a pipe each change is a plain line, and a
long step says every 15 seconds how it goes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .events import Event, Step

_REDRAWS_A_SECOND = 4
_COLOURS = {"done": "green", "failed": "red", "stopped": "dim", "warning": "yellow", "error": "red"}


class Screen(Console):
    """A console whose end, a closed terminal or pipe, is not the end of what it shows."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class OnScreen:
    """A sink, and what shows the steps that run."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        if self._console.is_terminal and event.kind in ("begun", "news"):
            return  # the live table has it
        text = escape(event.in_words())
        if not event.of_a_step and event.kind not in ("text", "ready"):
            text = f"[dim]{time.strftime('%H:%M:%S', time.localtime(event.at))}[/] {text}"
        elif (colour := _COLOURS.get(event.kind)) is not None:
            text = f"[{colour}]{text[0]}[/]{text[1:]}"
        is_prose = event.kind == "text" and self._console.is_terminal  # commands and paths are copied: never broken
        self._console.print(text, highlight=False, soft_wrap=not is_prose)

    @asynccontextmanager
    async def live(self, running: Sequence[Step]) -> AsyncIterator[None]:
        """Drawn by a thread of rich's own; a terminal that is stopped keeps only that waiting."""
        if not self._console.is_terminal:
            yield
            return
        drawn = Live(
            console=self._console,
            get_renderable=lambda: _table(tuple(running)),
            refresh_per_second=_REDRAWS_A_SECOND,
            transient=True,
        )
        await asyncio.to_thread(drawn.start, refresh=True)
        try:
            yield
        finally:
            with suppress(OSError):
                await asyncio.to_thread(drawn.stop)


def _table(running: Sequence[Step]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column()  # the one that gives way on a narrow screen
    for step in running:
        detail = Text(step.detail(), style="dim", no_wrap=True, overflow="ellipsis")
        table.add_row(f"  {escape(step.name)}", f"{step.seconds():.0f} s", detail)
    return table
