"""A sink in a thread of its own: a terminal that is stopped (Ctrl-S), or a reader that takes no more, stops nothing."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .events import Event, Sink

_MOST_WAITING = 10_000
_SHOWN_WITHIN_S = 2.0


@contextmanager
def apart(sink: Sink) -> Iterator[Sink]:
    """What is more than the sink can take is dropped. In the end it gets a moment to show what is left."""
    waiting: queue.Queue[Event | None] = queue.Queue(_MOST_WAITING)

    def show() -> None:
        while (event := waiting.get()) is not None:
            with suppress(Exception):  # a closed terminal ends nothing
                sink(event)

    def put(event: Event | None) -> None:
        with suppress(queue.Full):
            waiting.put_nowait(event)

    thread = threading.Thread(target=show, name="screen", daemon=True)
    thread.start()
    try:
        yield put
    finally:
        put(None)
        thread.join(_SHOWN_WITHIN_S)
