"""Where commands write: people's text to the screen, errors to the other."""

import sys

from rich.console import Console

from ..events.screen import Screen

_WIDE = 240
"""Columns of a screen that is none: a table in a pipe or a file is never cut."""

out = Screen(width=None if sys.stdout.isatty() else _WIDE)
err = Console(stderr=True)


def say(text: str) -> None:
    """A line, or several, as they are."""
    out.print(text, highlight=False, soft_wrap=True, markup=False)
