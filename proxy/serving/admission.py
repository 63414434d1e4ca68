"""Admission: how many requests are inside, who waits, and who is told to come back later.

A request is let in when the proxy has a place and some decode node has room for it *now*: prefill is not spent on a
prompt whose answer would then wait. Who must wait does so for a bounded time in a bounded queue, in the order of
priority, and among equals each client in turn, so that one busy client does not stand before all others. All this is
before a byte of a body is read.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

from ..errors import OverloadedError
from ..settings import ProxySettings

_COME_BACK_S = 2


class Admission:
    """One process's. `has_room` tells whether some decode node could begin one more request."""

    def __init__(self, settings: ProxySettings, has_room: Callable[[], bool]) -> None:
        self._most = settings.max_in_flight
        self._most_waiting = settings.max_queue
        self._timeout_s = settings.queue_timeout_s
        self._has_room = has_room
        self.inside = 0
        self.waiting = 0
        self._queues: dict[int, OrderedDict[Hashable, deque[asyncio.Future[None]]]] = {}

    def try_enter(self) -> bool:
        """Take a place, to be given back by `leave`, if there is one and nobody waits for it.

        Raises OverloadedError when the queue is full, too.
        """
        if not self._queues and self._may_enter():
            self.inside += 1
            return True
        if self.waiting >= self._most_waiting:
            raise OverloadedError("too many requests are waiting", retry_after_s=_COME_BACK_S)
        return False

    async def enter(self, key: Hashable, priority: int, timeout_s: float) -> None:
        """Wait for a place, to be given back by `leave`. A lower `priority` goes first (as in vLLM).

        Raises OverloadedError when the queue is full, or no place comes free in time.
        """
        if self.try_enter():
            return
        place = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(priority, OrderedDict()).setdefault(key, deque())
        queue.append(place)
        self.waiting += 1
        limit_s = min(self._timeout_s, timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                await place
        except TimeoutError as exc:
            if not place.done() or place.cancelled():
                message = f"no room for the request in {limit_s:g} s"
                raise OverloadedError(message, retry_after_s=_COME_BACK_S) from exc
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()  # it was let in just as its client left
            raise
        finally:
            self._forget(priority, key, place)

    def leave(self) -> None:
        """Give a place back: to the next in the queue, if a node has room."""
        self.inside -= 1
        self.let_in()

    def let_in(self) -> None:
        """Let in who can be; called when a place comes free, and when nodes have been looked at."""
        while self._queues and self._may_enter():
            place = self._next()
            if not place.done():
                self.inside += 1
                place.set_result(None)

    def _may_enter(self) -> bool:
        return self.inside < self._most and self._has_room()

    def _next(self) -> "asyncio.Future[None]":
        priority = min(self._queues)
        keys = self._queues[priority]
        key, queue = keys.popitem(last=False)
        place = queue.popleft()
        if queue:
            keys[key] = queue  # at the end: the other keys come first
        elif not keys:
            del self._queues[priority]
        return place

    def _forget(self, priority: int, key: Hashable, place: "asyncio.Future[None]") -> None:
        self.waiting -= 1
        keys = self._queues.get(priority)
        if keys is None or key not in keys or place not in keys[key]:
            return
        keys[key].remove(place)
        if not keys[key]:
            del keys[key]
        if not keys:
            del self._queues[priority]
