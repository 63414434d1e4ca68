"""SIGTERM: /health says it at once, new requests are served for a while still, and then the listener closes.

A load balancer learns from /health that the proxy goes. What it sends until then would be refused otherwise. Running
answers have the grace time, which is uvicorn's part. Each further SIGTERM ends what is being waited for.
"""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..downstream.protocol import ClientProtocol


class Shutdown:
    """Stands between SIGTERM and uvicorn, which closes its listener as soon as it hears of it."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self.has_begun = False
        self._is_closed = False
        """The listener is, or is about to be."""

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
            stop(number, frame)

        def begin(number: int, frame: FrameType | None) -> None:
            if self._is_closed:
                loop.call_soon_threadsafe(_end_running_answers)
            elif self.has_begun or not self._delay_s:
                close(number, frame)
            else:
                self.has_begun = ClientProtocol.closing = True
                loop.call_soon_threadsafe(loop.call_later, self._delay_s, close, number, None)

        signal.signal(signal.SIGTERM, begin)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, stop)


def _end_running_answers() -> None:
    for task in {task for connection in ClientProtocol.all for task in connection.tasks}:
        task.cancel()
