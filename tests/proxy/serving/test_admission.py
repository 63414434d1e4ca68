"""The door: who is let in, who waits, in what order, and who is sent away."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import OverloadedError
from proxy.serving.admission import Admission
from proxy.settings import ProxySettings


class Room:
    """A decode node that has room, or has not."""

    is_there = True

    def __call__(self) -> bool:
        return self.is_there


def door(room: Room | None = None, *, most: int = 1, queue: int = 100, timeout_s: float = 30) -> Admission:
    settings = ProxySettings(max_in_flight=most, max_queue=queue, queue_timeout_s=timeout_s)
    return Admission(settings, room or Room())


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 30))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_no_more_than_the_limit_are_inside() -> None:
    async def story() -> None:
        admission = door(most=2)
        waiting = [asyncio.create_task(admission.enter("a", 0, 30)) for _ in range(5)]
        await settle()
        assert (admission.inside, admission.waiting) == (2, 3)
        for left in (2, 1, 0):
            admission.leave()
            await settle()
            assert (admission.inside, admission.waiting) == (2, left)
        await asyncio.gather(*waiting)

    run(story)


def test_clients_take_turns_and_a_busy_one_does_not_stand_before_the_others() -> None:
    async def story() -> None:
        admission, order = door(), list[str]()

        async def ask(name: str) -> None:
            await admission.enter(name, 0, 30)
            order.append(name)

        await admission.enter("first", 0, 30)
        names = ["busy", "busy", "busy", "calm", "other"]
        waiting = []
        for name in names:
            waiting.append(asyncio.create_task(ask(name)))
            await settle()
        for _ in names:
            admission.leave()
            await settle()
        assert order == ["busy", "calm", "other", "busy", "busy"]
        await asyncio.gather(*waiting)

    run(story)


def test_a_lower_priority_number_goes_first() -> None:
    async def story() -> None:
        admission, order = door(), list[int]()

        async def ask(priority: int) -> None:
            await admission.enter("a", priority, 30)
            order.append(priority)

        await admission.enter("a", 0, 30)
        waiting = [asyncio.create_task(ask(priority)) for priority in (5, 0, -1)]
        await settle()
        for _ in waiting:
            admission.leave()
            await settle()
        assert order == [-1, 0, 5]
        await asyncio.gather(*waiting)

    run(story)


def test_a_full_queue_sends_away_at_once_and_a_long_wait_later() -> None:
    async def story() -> None:
        admission = door(queue=1, timeout_s=0.05)
        await admission.enter("a", 0, 30)
        waiting = asyncio.create_task(admission.enter("a", 0, 30))
        await settle()
        with pytest.raises(OverloadedError, match="too many requests are waiting"):
            await admission.enter("a", 0, 30)
        with pytest.raises(OverloadedError, match=r"no room for the request in 0\.05 s"):
            await waiting
        assert (admission.inside, admission.waiting) == (1, 0)

    run(story)


def test_nobody_is_let_in_while_no_decode_node_has_room() -> None:
    async def story() -> None:
        room = Room()
        room.is_there = False
        admission = door(room, most=10)
        waiting = asyncio.create_task(admission.enter("a", 0, 30))
        await settle()
        assert admission.waiting == 1
        room.is_there = True
        admission.let_in()
        await waiting
        assert (admission.inside, admission.waiting) == (1, 0)

    run(story)


@given(st.lists(st.sampled_from(["come", "leave", "give up", "shut", "open"]), max_size=60))
def test_whatever_happens_the_counts_are_right_in_the_end(steps: list[str]) -> None:
    async def story() -> None:
        room = Room()
        admission = door(room, most=3)
        inside, waiting = 0, list[asyncio.Task[None]]()
        for number, step in enumerate(steps):
            if step == "come":
                waiting.append(asyncio.create_task(admission.enter(str(number % 3), number % 2, 30)))
            elif step == "give up" and waiting:
                waiting.pop(number % len(waiting)).cancel()
            elif step == "leave" and inside:
                admission.leave()
                inside -= 1
            elif step in ("shut", "open"):
                room.is_there = step == "open"
                admission.let_in()
            await settle()
            inside += sum(task.done() for task in waiting)
            waiting = [task for task in waiting if not task.done()]
            assert (admission.inside, admission.waiting) == (inside, len(waiting))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (admission.inside, admission.waiting) == (inside, 0)

    run(story)


def test_a_place_that_is_free_is_given_at_once_though_one_who_was_let_in_has_not_come_yet() -> None:
    async def story() -> None:
        admission = door(most=2)
        assert admission.try_enter()
        assert admission.try_enter()
        waiting = asyncio.create_task(admission.enter("a", 0, 30))
        await settle()
        admission.leave()
        admission.leave()
        assert admission.try_enter()
        await waiting
        assert (admission.inside, admission.waiting) == (2, 0)

    run(story)
