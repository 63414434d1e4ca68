"""An engine's time, in virtual time: every figure is exact."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from engines.sim.timing import EngineLoop, Speeds

SPEEDS = Speeds(prefill_s=1, prefill_token_s=0.01, decode_s=2, decode_sequence_s=0.5, hand_off_s=3,
                hand_off_token_s=0.1, step_tokens=100, sequences=2)  # fmt: skip
ROOM = 1000


class VirtualTime(asyncio.SelectorEventLoop):
    """Its clock goes straight to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._at = 0.0

    def time(self) -> float:
        return self._at

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._at = max(self._at, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run(*work: Coroutine[Any, Any, None]) -> list[float]:
    """When each has ended."""

    async def timed(one: Coroutine[Any, Any, None]) -> float:
        await one
        return round(asyncio.get_running_loop().time(), 6)

    async def all_of_it() -> list[float]:
        return await asyncio.gather(*map(timed, work))

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(all_of_it())


def engine(speeds: Speeds = SPEEDS, room: int = ROOM) -> EngineLoop:
    return EngineLoop(speeds, lambda: room, ROOM)


async def tokens(one: EngineLoop, number: int, pause_s: float = 0) -> None:
    """Decode so many, looking away for a while after each."""
    with one.sequence() as sequence:
        for left in range(number, 0, -1):
            await sequence.token(left)
            await asyncio.sleep(pause_s)


def test_a_prefill_takes_its_own_time_and_that_of_its_uncached_tokens() -> None:
    assert run(engine().prefill(lambda: 50)) == [1.5]


def test_prompts_wait_for_those_before_them_and_share_a_step_when_they_are_short() -> None:
    one = engine()
    assert run(one.prefill(lambda: 250), one.prefill(lambda: 10), one.prefill(lambda: 100)) == [6.0, 6.0, 6.6]


def test_what_is_cached_is_looked_up_when_its_turn_comes() -> None:
    one, cached = engine(), [0]

    async def first() -> None:
        await one.prefill(lambda: 100)
        cached[0] = 90

    assert run(first(), one.prefill(lambda: 100 - cached[0])) == [2.0, 3.1]


def test_a_step_takes_longer_with_more_sequences_and_with_a_prompt_beside_them() -> None:
    one = engine()
    assert run(tokens(one, 1), tokens(one, 1), tokens(one, 1)) == [3.5, 3.5, 3.5]
    assert run(tokens(one, 1), one.prefill(lambda: 100)) == [4.5, 4.5]


def test_all_that_decode_are_in_every_step_however_late_their_tokens_are_taken() -> None:
    one = engine()
    assert run(tokens(one, 4), tokens(one, 4, pause_s=0.1), tokens(one, 2, pause_s=20)) == [13.0, 13.1, 43.5]


def test_one_that_ends_early_is_in_no_step_any_more() -> None:
    one = engine()

    async def stopped() -> None:
        with one.sequence() as sequence:
            await sequence.token(100)

    assert run(stopped(), tokens(one, 3)) == [3.0, 8.0]


def test_a_transfer_goes_on_beside_the_steps() -> None:
    one = engine()
    assert run(one.hand_off(20), tokens(one, 1)) == [5.0, 2.5]


def test_those_for_whom_there_is_no_place_wait_in_order() -> None:
    one = engine()

    async def hold(seconds: float, tokens: int = 10) -> None:
        async with one.place(tokens):
            await asyncio.sleep(seconds)

    assert run(hold(4), hold(6), hold(1), hold(1)) == [4.0, 6.0, 5.0, 6.0]


def test_those_for_whose_kv_there_is_no_room_wait_until_some_is_free() -> None:
    free = [100]
    one = EngineLoop(SPEEDS, lambda: free[0], ROOM)

    async def hold(tokens: int) -> None:
        async with one.place(tokens):
            await asyncio.sleep(1)

    async def pulled() -> None:
        await asyncio.sleep(5)
        free[0] = ROOM
        one.let_in()

    assert run(hold(200), hold(50), pulled()) == [6.0, 6.0, 5.0]
    assert run(hold(50 * ROOM)) == [1.0], "it would wait for ever"


def test_one_that_gives_up_waiting_keeps_nobody_waiting() -> None:
    one = engine(SPEEDS.model_copy(update={"sequences": 1}))

    async def hold(seconds: float) -> None:
        async with one.place(1):
            await asyncio.sleep(seconds)

    async def give_up() -> None:
        waiting = asyncio.create_task(hold(9))
        await asyncio.sleep(1)
        waiting.cancel()

    assert run(hold(2), give_up(), hold(1)) == [2.0, 1.0, 3.0]


def test_time_can_run_faster() -> None:
    assert run(engine(SPEEDS.model_copy(update={"compress": 10})).prefill(lambda: 50)) == [0.15]
