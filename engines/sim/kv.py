"""The KV cache of one node, and what a prefill node holds for decode nodes to pull."""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

BLOCK_TOKENS = 16
TOTAL_BLOCKS = 4096
SENDER_TASKS = 20
"""vLLM: 2 x num_workers (10). Each pull that waits for a prefill holds one."""


@dataclass(slots=True)
class Held:
    """A finished prefill's KV."""

    prompt: tuple[int, ...]
    expiry: asyncio.TimerHandle


@dataclass
class KVCache:
    """Blocks in use on this node; on a prefill node also the hand-offs it holds, by `transfer_id`."""

    timeout_s: float
    block_tokens: int = BLOCK_TOKENS
    total_blocks: int = TOTAL_BLOCKS
    on_free: Callable[[], None] = lambda: None
    """What was held for a hand-off is free."""
    running_blocks: int = 0
    leaked_blocks: int = 0
    held: dict[str, Held] = field(default_factory=dict)
    expired: int = 0
    _arrivals: dict[str, asyncio.Event] = field(default_factory=dict)
    _senders: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SENDER_TASKS))

    def usage(self) -> float:
        return self._used() / self.total_blocks

    def room(self) -> int:
        """In tokens. What is only cached for the next prompts gives way."""
        return (self.total_blocks - self._used()) * self.block_tokens

    def _used(self) -> int:
        held = sum(self._blocks(len(entry.prompt)) for entry in self.held.values())
        return self.running_blocks + self.leaked_blocks + held

    @contextmanager
    def running(self, tokens: int) -> Iterator[None]:
        self.running_blocks += self._blocks(tokens)
        try:
            yield
        finally:
            self.running_blocks -= self._blocks(tokens)

    def hold(self, transfer_id: str, prompt: tuple[int, ...]) -> None:
        """Keep a prefill's KV until it is pulled or expires. A second one under the same id leaks the first."""
        if transfer_id in self.held:
            self.leak(len(self.held[transfer_id].prompt))
            self.held[transfer_id].expiry.cancel()
        expiry = asyncio.get_running_loop().call_later(self.timeout_s, self._expire, transfer_id)
        self.held[transfer_id] = Held(prompt, expiry)
        self._arrivals.setdefault(transfer_id, asyncio.Event()).set()

    def leak(self, tokens: int) -> None:
        """Blocks that no timeout ever gives back."""
        self.leaked_blocks += self._blocks(tokens)

    async def pull(self, transfer_id: str) -> tuple[int, ...] | None:
        """Hand the KV over and free it; None when it does not come within the timeout.

        A pull may come before the prefill. One for an id that never comes (used, expired, wrong) holds a sender
        task the whole time; when all are held this node can send to nobody.
        """
        async with self._senders:
            arrival = self._arrivals.setdefault(transfer_id, asyncio.Event())
            try:
                await asyncio.wait_for(arrival.wait(), self.timeout_s)
            except TimeoutError:
                return None
            finally:
                self._arrivals.pop(transfer_id, None)
            entry = self.held.pop(transfer_id, None)
        if entry is None:
            return None
        entry.expiry.cancel()
        self.on_free()
        return entry.prompt

    @property
    def waiting_pulls(self) -> int:
        """Pulls for a prefill that has not come (yet)."""
        return sum(not arrival.is_set() for arrival in self._arrivals.values())

    def _expire(self, transfer_id: str) -> None:
        self.held.pop(transfer_id)
        self._arrivals.pop(transfer_id, None)
        self.expired += 1
        self.on_free()

    def _blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.block_tokens)
