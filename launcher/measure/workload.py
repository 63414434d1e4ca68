"""Which requests are sent, and when: arrivals with prompts that share their beginnings.

A prompt is made of pieces; equal pieces are equal tokens. So a trace that only says which pieces prompts have in common
(Mooncake's do) can be replayed with a model it was not made with.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Request:
    """One of them."""

    at: float
    """Seconds after the first."""
    tokens: int
    """Of its prompt."""
    output: int
    """Tokens that are generated."""
    pieces: tuple[int, ...]
    """What its prompt is made of, the last one cut off where the prompt ends."""
    session: int | None = None


@dataclass(frozen=True)
class Workload:
    """All requests, in the order in which they are due."""

    name: str
    piece_tokens: int
    requests: tuple[Request, ...]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].at - self.requests[0].at if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return (len(self.requests) - 1) / self.seconds if self.seconds else math.inf

    @property
    def longest(self) -> int:
        """Tokens, prompt and answer."""
        return max(request.tokens + request.output for request in self.requests)

    @property
    def digest(self) -> str:
        """Of what is sent and when."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:16]

    @property
    def shared(self) -> float:
        """The share of prompt tokens that an earlier prompt began with, too."""
        known: set[tuple[int, int]] = set()
        found = total = 0
        for request in self.requests:
            chain, is_known = 0, True
            for number, piece in enumerate(request.pieces):
                chain = hash((chain, piece))
                is_known = is_known and (number, chain) in known
                found += is_known * min(self.piece_tokens, request.tokens - number * self.piece_tokens)
                known.add((number, chain))
            total += request.tokens
        return found / max(total, 1)

    def lines(self) -> Iterable[str]:
        """As a trace in Mooncake's form, which `vllm bench serve --dataset-name timed_trace` and AIPerf read, too."""
        for request in self.requests:
            row = {
                "timestamp": round(1000 * request.at),
                "input_length": request.tokens,
                "output_length": request.output,
                "hash_ids": list(request.pieces),
            }
            yield json.dumps(row if request.session is None else row | {"session_id": request.session})

    def first(self, number: int) -> "Workload":
        return replace(self, requests=self.requests[:number])

    def scaled(self, factor: float) -> "Workload":
        """Prompts and answers so many times as long, sharing what they share."""
        piece = max(1, round(self.piece_tokens * factor))

        def one(request: Request) -> Request:
            tokens = max(1, round(request.tokens * piece / self.piece_tokens))
            pieces = request.pieces[: -(-tokens // piece)]
            return replace(request, tokens=tokens, output=max(1, round(request.output * factor)), pieces=pieces)

        return replace(self, piece_tokens=piece, requests=tuple(map(one, self.requests)))

    def at_rate(self, rate: float, seed: int) -> "Workload":
        """So many requests a second in the mean, their gaps in the same proportions; where they have no times, at
        random ones.
        """
        if self.seconds:
            return self.stretched(self.rate / rate)
        chance = random.Random(seed)  # noqa: S311
        times = accumulate(chance.expovariate(rate) for _ in self.requests)
        dated = (replace(request, at=at) for request, at in zip(self.requests, times, strict=True))
        return replace(self, requests=tuple(dated)).stretched(1)

    def stretched(self, factor: float) -> "Workload":
        began = self.requests[0].at
        return replace(
            self, requests=tuple(replace(request, at=(request.at - began) * factor) for request in self.requests)
        )


def token_ids(request: Request, piece_tokens: int, vocabulary: Sequence[int], draw: int) -> list[int]:
    """A prompt. `draw`: other tokens for each, so that no cache has them from an earlier round."""
    ids: list[int] = []
    for piece in request.pieces:
        ids += random.Random(f"{draw} {piece}").choices(vocabulary, k=min(piece_tokens, request.tokens - len(ids)))  # noqa: S311
    return ids
