"""How long an engine takes: a loop of steps, as vLLM's scheduler makes them, in time that may run faster.

A step computes one token of every sequence that decodes and a share of the prompts that wait, in their order. So a
prompt waits for those before it, and a long one slows down the sequences that decode beside it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class Speeds(BaseModel):
    """All in seconds: `prefill_s + prefill_token_s * uncached tokens` for a prompt, `decode_s + decode_sequence_s *
    sequences` for a step that decodes, `hand_off_s + hand_off_token_s * tokens` for a transfer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill_s: float = Field(0, ge=0)
    prefill_token_s: float = Field(0, ge=0)
    decode_s: float = Field(0, ge=0)
    decode_sequence_s: float = Field(0, ge=0)
    hand_off_s: float = Field(0, ge=0)
    hand_off_token_s: float = Field(0, ge=0)
    step_tokens: int = Field(8192, ge=1)
    """Of prompts, computed in one step at most (vLLM's max_num_batched_tokens)."""
    sequences: int = Field(256, ge=1)
    """That run at once at most (max_num_seqs); the others wait."""
    compress: float = Field(1, gt=0)
    """So many of these seconds pass in one."""


@dataclass(slots=True)
class _Prefill:
    begin: Callable[[], int]
    done: "asyncio.Future[None]"
    left: int = -1
    """Tokens; -1 before it begins."""


class Sequence:
    """One that decodes. Its tokens are made whether or not somebody is there to take them, as a real engine does."""

    def __init__(self, loop: "EngineLoop") -> None:
        self._loop = loop
        self._left = 0
        """Tokens that are still to be made."""
        self._made = 0
        """... and were not taken."""
        self._taker: asyncio.Future[None] | None = None

    async def token(self, left: int) -> None:
        """Until the next one is there. `left`: how many it will have from here on, this one included."""
        if not self._made:
            if not self._left:
                self._left = left
                self._loop.decode(self)
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        self._made -= 1

    def make(self) -> bool:
        """One token; whether it goes on."""
        self._left -= 1
        self._made += 1
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)
        return self._left > 0


class EngineLoop:
    """Of one data-parallel rank. Its task lives as long as there is work."""

    def __init__(self, speeds: Speeds, room: Callable[[], int], most: int) -> None:
        """`room`: how many tokens of KV there is room for now; `most`: when there is nothing else."""
        self._speeds = speeds
        self._room = room
        self._most = most
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        """Who waits for room: tokens."""
        self._running = 0
        self._prefills: deque[_Prefill] = deque()
        self._decoding: dict[Sequence, None] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def place(self, tokens: int) -> AsyncIterator[None]:
        """Among the running sequences, with room for so many tokens, in order of arrival."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((min(tokens, self._most), place))
        self.let_in()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled():
                self._running -= 1
            self.let_in()

    def let_in(self) -> None:
        """Those there is room for, now that something has become free."""
        room = self._room()
        while self._queue and self._running < self._speeds.sequences:
            tokens, place = self._queue[0]
            if not place.done():
                if tokens > room:
                    return
                place.set_result(None)
                self._running += 1
                room -= tokens
            self._queue.popleft()

    async def prefill(self, begin: Callable[[], int]) -> None:
        """Until a prompt is computed. `begin` is called when its turn comes: how many tokens are to be computed."""
        work = _Prefill(begin, asyncio.get_running_loop().create_future())
        self._prefills.append(work)
        self._wake()
        await work.done

    @contextmanager
    def sequence(self) -> Iterator[Sequence]:
        """One that may decode, as long as this is entered."""
        sequence = Sequence(self)
        try:
            yield sequence
        finally:
            self._decoding.pop(sequence, None)

    def decode(self, sequence: Sequence) -> None:
        """It is in every step from the next one on, until all its tokens are made."""
        self._decoding[sequence] = None
        self._wake()

    async def hand_off(self, tokens: int) -> None:
        """A transfer takes its time beside the steps."""
        speeds = self._speeds
        await asyncio.sleep((speeds.hand_off_s + speeds.hand_off_token_s * tokens) / speeds.compress)

    def _wake(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Steps end on a schedule of their own, so that late timers do not add up."""
        loop = asyncio.get_running_loop()
        end = loop.time()
        while self._prefills or self._decoding:
            decoding = tuple(self._decoding)
            seconds, computed = self._compute(len(decoding))
            end = max(end + seconds / self._speeds.compress, loop.time())
            await asyncio.sleep(end - loop.time())
            for sequence in decoding:
                if sequence in self._decoding and not sequence.make():
                    self._decoding.pop(sequence)
            for ended in computed:
                if not ended.done():
                    ended.set_result(None)
            await asyncio.sleep(0)  # one whose prompt is computed decodes in the next step

    def _compute(self, decoding: int) -> tuple[float, "list[asyncio.Future[None]]"]:
        """How long a step takes, and the prompts that are computed with it."""
        speeds = self._speeds
        seconds = speeds.decode_s + speeds.decode_sequence_s * decoding if decoding else 0.0
        budget, computed = speeds.step_tokens, []
        while self._prefills and budget > 0:
            first = self._prefills[0]
            if first.done.cancelled():
                self._prefills.popleft()
                continue
            if first.left < 0:
                first.left = first.begin()
                seconds += speeds.prefill_s
            now = min(first.left, budget)
            first.left -= now
            budget -= now
            seconds += speeds.prefill_token_s * now
            if first.left == 0:
                computed.append(self._prefills.popleft().done)
        return seconds, computed
