"""What the logs of all nodes say of a failure: read beside the event loop, since logs are long, and others wait."""

import asyncio
from collections.abc import Iterable

from ..errors import LauncherError
from ..inspect import doctor
from .life import Life


async def explained(error: LauncherError, lives: Iterable[Life]) -> LauncherError:
    """The error, with the first cause in its hint when there is one known."""
    words = await cause(lives)
    if words:
        error.hint = f"{words}\n{error.hint}"
    return error


async def cause(lives: Iterable[Life]) -> str:
    """What failed first in the children's present lives, in words; empty when nothing is known."""
    lives = [life for life in lives if life.spec.log.exists()]
    offsets = {life.spec.name: life.log_begins for life in lives}
    try:
        diagnosis = await asyncio.to_thread(doctor.examine, [life.spec.log for life in lives], offsets)
    except OSError as exc:  # a log that was turned over, or a disk that fails: what is explained matters more
        return f"the logs cannot be read: {exc.strerror}"
    return doctor.in_words(diagnosis) if diagnosis.first is not None else ""
