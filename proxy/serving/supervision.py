"""Background tasks: each runs as long as the proxy does. One that fails is restarted, later and later, and is seen."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from ..metrics import Metrics

logger = logging.getLogger("pd_proxy")

Work = Callable[[], Coroutine[Any, Any, None]]

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_HEALTHY_S = 60.0
"""A task that ran so long starts again at once the next time."""
GIVEN_UP = 10
"""Restarts in a row after which a restart of the whole process may help more (`/livez`)."""


class Supervisor:
    """All of them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._works: dict[str, Work] = {}
        self.down: dict[str, str] = {}
        """The tasks that are not running now, and how they failed."""
        self._in_a_row: dict[str, int] = {}

    def add(self, name: str, work: Work) -> None:
        """`work` makes the coroutine, anew for each start; it is not meant to end."""
        self._works[name] = work

    @property
    def is_hopeless(self) -> bool:
        return any(self._in_a_row[name] >= GIVEN_UP for name in self.down)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this lasts all of them run."""
        tasks = [asyncio.create_task(self._keep(name, work), name=name) for name, work in self._works.items()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, name: str, work: Work) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            began = time.monotonic()
            try:
                await work()
                problem = "it ended"
                logger.error("background task %s ended; it starts again in %.1f s", name, wait_s)
            except Exception as exc:
                problem = repr(exc)
                logger.exception("background task %s failed; it starts again in %.1f s", name, wait_s)
            if time.monotonic() - began > _HEALTHY_S:
                wait_s = _FIRST_WAIT_S
                self._in_a_row[name] = 0
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
            self.down[name] = problem
            self._metrics.task_restarts.count(name)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            del self.down[name]
