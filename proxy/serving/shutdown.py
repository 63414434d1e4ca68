"""SIGTERM: /health says it at once, new requests are served for a while still, and then the listener closes.

A load balancer learns from /health that the proxy goes. What it sends until then would be refused otherwise. Running
answers have the grace time, which is uvicorn's part. Each further SIGTERM ends what is being waited for.
"""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..downstream.service import Service
from ..settings import ProxySettings


class Shutdown:
    """Stands between SIGTERM and uvicorn, which closes its listener as soon as it hears of it."""

    def __init__(self, settings: ProxySettings) -> None:
        self._delay_s = settings.shutdown_delay_s
        self._grace_s = settings.shutdown_grace_s
        self._ends_at: float | None = None
        self.service: Service | None = None
        self.has_begun = False
        self._is_closed = False
        """The listener is, or is about to be."""

    @property
    def grace_left_s(self) -> float:
        """Of the time that running answers have, for what is to be ended after them."""
        return max(0.0, self._ends_at - time.monotonic()) if self._ends_at is not None else self._grace_s

    @contextmanager
    def announced(self) -> Iterator[None]:
        """While this lasts SIGTERM takes effect after the delay; a second one at once, as does SIGINT.

        One more, and running answers end as errors now, and not when the grace time is over.
        """
        stop = signal.getsignal(signal.SIGTERM)
        if not callable(stop):  # no server has asked for it
            yield
            return
        loop = asyncio.get_running_loop()

        def close(number: int, frame: FrameType | None) -> None:
            self._is_closed = True
            self._begin_closing()
            self._ends_at = time.monotonic() + self._grace_s
            stop(number, frame)

        def begin(number: int, frame: FrameType | None) -> None:
            if self._is_closed:
                loop.call_soon_threadsafe(self._end_running_answers)
            elif self.has_begun or not self._delay_s:
                close(number, frame)
            else:
                self.has_begun = True
                self._begin_closing()
                loop.call_soon_threadsafe(loop.call_later, self._delay_s, close, number, None)

        signal.signal(signal.SIGTERM, begin)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, stop)

    def _begin_closing(self) -> None:
        """Every answer is its connection's last, that of a connection which is being made just now too."""
        if self.service is not None:
            self.service.is_closing = True

    def _end_running_answers(self) -> None:
        if self.service is not None:
            for connection in tuple(self.service.connections):
                connection.end_running_answer()
