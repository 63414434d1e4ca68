"""What is asked in `make bench-routing`: arrivals with prompts that share their beginnings, from a seed.

Lengths are in tokens of the model that a workload stands for, times in its seconds. A prompt is made of pieces of text,
one for each 512 tokens; equal pieces are equal text. So half a byte stands for a token, and a simulated node, to which
each byte is a token, computes half as many.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise
from pathlib import Path

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
        return look_alike(requests, seed)
    lines = TRACE.read_text().splitlines()
    spread = random.Random(seed)
    first = spread.randrange(len(lines) - requests)
    rows = [json.loads(line) for line in lines[first : first + requests]]
    began = rows[0]["timestamp"]
    found = []
    for row in rows:
        blocks = tuple(row["hash_ids"][: row["input_length"] // BLOCK_TOKENS])
        at = (row["timestamp"] - began) / 1000 + spread.random() * 3
        tail = row["input_length"] - len(blocks) * BLOCK_TOKENS
        found.append(Arrival(at, blocks, tail, max(1, row["output_length"] // _OUTPUT_SHARE)))
    return sorted(found, key=lambda arrival: arrival.at)


def look_alike(requests: int, seed: int) -> list[Arrival]:
    """Like the trace: prompts of 12 000 tokens in the mean, log-normal, of which a third begins as an earlier one."""
    chance, numbers = random.Random(seed), count(1)
    known: list[tuple[int, ...]] = []
    found, at = [], 0.0
    for _ in range(requests):
        at += chance.expovariate(3.3)
        length = min(240, max(1, int(chance.lognormvariate(2.7, 0.95))))
        shared: tuple[int, ...] = ()
        if known and chance.random() < 0.5:
            before = known[-1 - min(len(known) - 1, int(chance.expovariate(1 / 200)))]
            shared = before[: max(1, int(len(before) * chance.betavariate(4, 1)))]
        blocks = (*shared, *(next(numbers) for _ in range(max(1, length - len(shared)))))
        known.append(blocks)
        found.append(Arrival(at, blocks, chance.randrange(BLOCK_TOKENS), chance.randrange(1, 30)))
    return found


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
