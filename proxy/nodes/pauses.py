"""Did this process itself stand still? Whoever judges others by the clock has to know."""

import asyncio
import time
from collections.abc import Callable

_BEAT_S = 0.25
_PAUSE_S = 0.5
"""A beat later than this is a pause: of the machine, of the process, or of its event loop."""


class Pauses:
    """A heartbeat of the event loop. Times are of the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._last_beat = time.monotonic()
        self._last_pause_ended = 0.0

    async def run(self, observe: Callable[[float], object] = lambda _: None) -> None:
        """Beat for ever; `observe` is told how late each beat was."""
        self._last_beat = time.monotonic()
        while True:
            await asyncio.sleep(_BEAT_S)
            now = time.monotonic()
            late = now - self._last_beat - _BEAT_S
            if late > _PAUSE_S:
                self._last_pause_ended = now
            self._last_beat = now
            observe(max(0.0, late))

    def stood_still_since(self, then: float) -> bool:
        """Whether there was a pause that ended after `then`, or is none over yet."""
        late_now = time.monotonic() - self._last_beat - _BEAT_S
        return self._last_pause_ended > then or late_now > _PAUSE_S
