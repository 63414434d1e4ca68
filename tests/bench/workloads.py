"""What is asked in `make bench-routing`: arrivals with prompts that share their beginnings, from a seed.

Lengths are in tokens of the model that a workload stands for, times in its seconds. A prompt is made of pieces of text,
one for each 512 tokens; equal pieces are equal text. So half a byte stands for a token, and a simulated node, to which
each byte is a token, computes half as many.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, pairwise
from pathlib import Path

from launcher.measure import traces
from launcher.measure.workload import Request

BLOCK_TOKENS = 512
BLOCK_BYTES = 256
TRACE = Path(__file__).parents[3] / "shared" / "data" / "mooncake_conversation_trace.jsonl"
_LETTERS = "abcdefghijklmnopqrstuvwxyz      "
_OUTPUT_SHARE = 20
"""Of so many tokens that were answered one is: decoding costs CPU here, and is not what is compared."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    at: float
    blocks: tuple[int, ...]
    """Which pieces its prompt is made of."""
    tail: int
    """Tokens beyond them, unlike any others."""
    output: int
    session: int = -1

    @property
    def tokens(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS + self.tail

    def prompt(self, number: int) -> str:
        tail = random.Random(f"tail {number}").choices(_LETTERS, k=max(1, self.tail // 2))
        return "".join(map(_text, self.blocks)) + "".join(tail)


@cache
def _text(block: int) -> str:
    return "".join(random.Random(block).choices(_LETTERS, k=BLOCK_BYTES))


def trace(requests: int, seed: int) -> list[Arrival]:
    """A part of Mooncake's published conversation trace (arrivals in batches of 3 s, spread here), at its own place for
    each seed; of the generator's look-alike where the trace is not there.
    """
    if not TRACE.exists():
        return _arrivals(traces.made("conversations", requests, seed).requests)
    rows, spread = traces.from_file(TRACE).requests, random.Random(seed)
    first = spread.randrange(len(rows) - requests)
    some = rows[first : first + requests]
    return _arrivals(replace(row, at=row.at - some[0].at + spread.random() * 3) for row in some)


def _arrivals(requests: Iterable[Request]) -> list[Arrival]:
    found = []
    for row in requests:
        blocks = row.pieces[: row.tokens // BLOCK_TOKENS]
        tail = row.tokens - len(blocks) * BLOCK_TOKENS
        found.append(Arrival(row.at, blocks, tail, max(1, row.output // _OUTPUT_SHARE)))
    return sorted(found, key=lambda arrival: arrival.at)


def chats(requests: int, seed: int) -> list[Arrival]:
    """Conversations of three to twelve turns with pauses; each turn begins with all that was said before."""
    chance, numbers = random.Random(seed), count(1)
    found: list[Arrival] = []
    began = 0.0
    for session in count():
        if len(found) >= 1.3 * requests:
            break
        began += chance.expovariate(0.35)
        at, said = began, tuple(next(numbers) for _ in range(chance.randrange(2, 8)))
        for _ in range(chance.randrange(3, 13)):
            found.append(Arrival(at, said, chance.randrange(BLOCK_TOKENS), chance.randrange(1, 30), session))
            said = (*said, *(next(numbers) for _ in range(chance.randrange(1, 5))))
            at += 3 + chance.expovariate(1 / 20)
    return sorted(found, key=lambda arrival: arrival.at)[:requests]


def hot(requests: int, seed: int) -> list[Arrival]:
    """One system prompt of 8 000 tokens before everything, in bursts of a dozen."""
    chance = random.Random(seed)
    at = 0.0
    found: list[Arrival] = []
    system = tuple(range(1, 17))
    while len(found) < requests:
        at += chance.expovariate(0.3)
        burst = range(chance.randrange(6, 18))
        tails = [(chance.random() * 0.2, chance.randrange(50, 1500), chance.randrange(1, 30)) for _ in burst]
        found += [Arrival(at + later, system, tail, output) for later, tail, output in tails]
    return sorted(found, key=lambda arrival: arrival.at)[:requests]


def unshared(requests: int, seed: int) -> list[Arrival]:
    """No two prompts begin alike; lengths as in the trace."""
    chance, numbers = random.Random(seed), count(1)
    return [
        Arrival(one.at, tuple(next(numbers) for _ in one.blocks), one.tail, chance.randrange(1, 30))
        for one in trace(requests, seed)
    ]


WORKLOADS: dict[str, Callable[[int, int], list[Arrival]]] = {
    "chats": chats, "trace": trace, "hot": hot, "unshared": unshared,
}  # fmt: skip


def uncached(arrivals: list[Arrival]) -> Iterator[int]:
    """Tokens of each that nobody can have had before: what one cache without end would have to compute."""
    known: set[tuple[int, int]] = set()
    for one in arrivals:
        chain, hit = 0, 0
        for number, block in enumerate(one.blocks):
            chain = hash((chain, block))
            if (number, chain) in known and hit == number:
                hit += 1
            known.add((number, chain))
        yield one.tokens - hit * BLOCK_TOKENS


def mean_gap(arrivals: list[Arrival]) -> float:
    gaps = [after.at - before.at for before, after in pairwise(arrivals)]
    return sum(gaps) / len(gaps)
