"""Background tasks: one that fails is restarted, later and later, and is seen."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from proxy.metrics import Metrics
from proxy.serving import supervision
from proxy.serving.supervision import GIVEN_UP, Supervisor


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(supervision, "_LONGEST_WAIT_S", 0.002)


async def played(work: Callable[[int], Coroutine[Any, Any, None]], until: Callable[[Supervisor], bool]) -> Supervisor:
    """A supervisor of one task, whose `work` is told how often it has been started, run until something holds."""
    supervisor = Supervisor(Metrics())
    starts = 0

    async def counted() -> None:
        nonlocal starts
        starts += 1
        await work(starts)

    supervisor.add("task", counted)
    async with supervisor.running():
        while not until(supervisor):
            await asyncio.sleep(0.001)
    return supervisor


async def for_ever() -> None:
    await asyncio.Event().wait()


def test_a_task_that_fails_runs_again_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    running = asyncio.Event()

    async def work(start: int) -> None:
        if start < 3:
            raise KeyError("odd")
        running.set()
        await for_ever()

    supervisor = asyncio.run(asyncio.wait_for(played(work, lambda _: running.is_set()), 30))
    assert supervisor.down == {}
    assert supervisor._metrics.task_restarts.values == {"task": 2}
    assert caplog.text.count("background task task failed") == 2


def test_while_it_is_down_that_can_be_seen_and_a_task_that_ends_is_down_too() -> None:
    seen: list[str] = []

    async def work(start: int) -> None:
        if start % 2:
            raise KeyError("odd")

    def enough(supervisor: Supervisor) -> bool:
        seen.extend(supervisor.down.values())
        return {"KeyError('odd')", "it ended"} <= set(seen)

    asyncio.run(asyncio.wait_for(played(work, enough), 30))


def test_what_fails_again_and_again_is_hopeless() -> None:
    async def work(start: int) -> None:
        raise KeyError(start)

    supervisor = asyncio.run(asyncio.wait_for(played(work, lambda each: each.is_hopeless), 30))
    assert supervisor._in_a_row["task"] == GIVEN_UP


def test_a_task_that_runs_again_after_many_failures_is_not_hopeless() -> None:
    running = asyncio.Event()
    hopeless: list[bool] = []

    async def work(start: int) -> None:
        if start <= GIVEN_UP:
            raise KeyError("odd")
        running.set()
        await for_ever()

    def until(supervisor: Supervisor) -> bool:
        hopeless.append(supervisor.is_hopeless)
        return running.is_set()

    supervisor = asyncio.run(asyncio.wait_for(played(work, until), 30))
    assert not supervisor.is_hopeless
    assert any(hopeless)
