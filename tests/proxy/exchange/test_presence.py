"""Nobody waits any more: an event, and what becomes of the leg is a policy."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from proxy.errors import ClientGoneError, LateError
from proxy.exchange.presence import SEE_OFF_S, Presence, let_end, see_off
from proxy.upstream.deadline import Deadline


def played(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 30))


async def cancelled(act: Callable[[Presence], object]) -> bool:
    """Whether a task in which this happens is cancelled."""

    async def work() -> None:
        act(Presence(60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    task = asyncio.create_task(work())
    await asyncio.wait([task])
    return task.cancelled()


@pytest.mark.parametrize("why", ["client-left", "late"])
def test_without_a_policy_the_task_is_cancelled(why: Any) -> None:
    async def story() -> None:
        assert await cancelled(lambda presence: presence.end(why))

    played(story)


@pytest.mark.parametrize("why", ["client-left", "late"])
def test_a_leg_that_is_let_end_goes_on_and_afterwards_the_usual_policy_holds(why: Any) -> None:
    async def story() -> None:
        def act(presence: Presence) -> None:
            with presence.on_leave(let_end):
                presence.end(why)
            with pytest.raises((ClientGoneError, LateError)):
                presence.check()

        assert not await cancelled(act)

    played(story)


def test_a_client_that_leaves_brings_a_legs_deadline_forward_and_a_deadline_of_its_own_does_not() -> None:
    async def story() -> None:
        for why, forward in (("client-left", True), ("late", False)):
            deadline = Deadline(1000, "answer")
            presence = Presence(60)
            with presence.on_leave(see_off(deadline)):
                presence.end(why)  # type: ignore[arg-type]
            assert (deadline.left_s <= SEE_OFF_S) is forward

    played(story)


def test_only_the_first_event_counts() -> None:
    async def story() -> None:
        presence = Presence(7)
        with presence.on_leave(let_end):
            presence.end("late")
            presence.end("client-left")
        assert str(presence.error()) == "the request was not answered in 7 s"

    played(story)


def test_a_cancellation_from_outside_is_told_apart() -> None:
    async def story() -> None:
        presence = Presence(60)
        assert not presence.is_cause_of_cancellation()
        presence.end("client-left")
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(1)
        assert presence.is_cause_of_cancellation()
        await asyncio.sleep(0)  # taken back

    played(story)
