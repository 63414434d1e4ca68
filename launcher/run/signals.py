"""Ctrl-C, SIGTERM and SIGHUP: the first asks for the end of the run, the second ends its children at once."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def heard(on_signal: Callable[[], None]) -> Iterator[None]:
    """Call it at each of them, for as long as this lasts; one that is ignored stays so (`nohup`, `&` in a script)."""
    loop = asyncio.get_running_loop()
    wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in wanted}
    for number in wanted:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
