"""Workloads from files and generators. What cannot be used is named with its line, and nothing is run."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError
from .workload import Request, Workload

PIECE_TOKENS = 512
"""Of Mooncake's published traces."""
_CHARACTERS_A_TOKEN = 4
_OWN_PIECES = 1 << 40
"""From here on, pieces that no other request has."""


class _Row(BaseModel):
    """A line of a trace in Mooncake's form."""

    model_config = ConfigDict(extra="ignore", strict=True)

    timestamp: float = Field(ge=0)
    """Milliseconds."""
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=1)
    hash_ids: list[int] | None = None
    session_id: int | str | None = None


def from_file(path: Path, piece_tokens: int = PIECE_TOKENS) -> Workload:
    """A trace in Mooncake's form (one JSON a line), or conversations in ShareGPT's (one JSON list).

    Raises ConfigError.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the trace {path}: {exc}") from exc
    if text.lstrip().startswith("["):
        return Workload(path.name, PIECE_TOKENS, tuple(_conversations(path, text)))
    rows = [_row(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path} has no requests in it")
    own = count(_OWN_PIECES)
    rows.sort(key=lambda row: row.timestamp)
    began = rows[0].timestamp
    return Workload(path.name, piece_tokens, tuple(_request(row, began, piece_tokens, own) for row in rows))


def _row(path: Path, number: int, line: str) -> _Row:
    try:
        return _Row.model_validate_json(line)
    except ValidationError as exc:
        problem = exc.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"{path}:{number}: {place + ': ' if place else ''}{problem['msg']}",
            'A line is like {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}',
        ) from exc


def _request(row: _Row, began: float, piece_tokens: int, own: Iterator[int]) -> Request:
    """What a prompt has beyond its pieces, or all of one that has none, is its own."""
    needed = -(-row.input_length // piece_tokens)
    pieces = (row.hash_ids or [])[:needed]
    pieces += [next(own) for _ in range(needed - len(pieces))]
    session = row.session_id if isinstance(row.session_id, int) else None
    return Request((row.timestamp - began) / 1000, row.input_length, row.output_length, tuple(pieces), session)


def _conversations(path: Path, text: str) -> Iterator[Request]:
    """Lengths only: each turn of a conversation begins with all before it. They have no times: `--rate` gives them."""
    try:
        told = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ConfigError(f"{path}:{exc.lineno}: {exc.msg}") from exc
    own = count(1)
    for session, conversation in enumerate(told):
        turns = conversation.get("conversations") if isinstance(conversation, dict) else None
        if not isinstance(turns, list):
            raise ConfigError(
                f"{path}: entry {session + 1} has no list of conversations",
                'An entry is like {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
            )
        tokens, pieces = 0, list[int]()
        for turn in turns:
            said = turn.get("value") if isinstance(turn, dict) else None
            if not isinstance(said, str):
                raise ConfigError(f"{path}: a turn of entry {session + 1} says nothing")
            length = max(1, len(said) // _CHARACTERS_A_TOKEN)
            if turn.get("from") in ("gpt", "assistant", "model") and tokens:
                yield Request(0.0, tokens, length, tuple(pieces), session)
            tokens += length
            pieces += [next(own) for _ in range(-(-tokens // PIECE_TOKENS) - len(pieces))]


class _Made(BaseModel):
    """`--workload input=2000,output=200,rate=2`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: int = Field(ge=1)
    output: int = Field(ge=1)
    rate: float = Field(1.0, gt=0)
    """Of new conversations a second; of requests, where each has one turn."""
    shared: int = Field(0, ge=0)
    """Tokens that all prompts begin with."""
    turns: int = Field(1, ge=1)
    """Requests of a conversation, each of which begins with all before it."""
    pause: float = Field(10.0, ge=0)
    """Seconds between an arrival and the next of its conversation, in the mean."""


def made(text: str, requests: int, seed: int) -> Workload:
    """`conversations`, or lengths and a rate. Raises ConfigError."""
    if text in GENERATORS:
        return Workload(text, PIECE_TOKENS, tuple(GENERATORS[text](requests, random.Random(seed))))  # noqa: S311
    try:
        given = _Made.model_validate(dict(part.strip().split("=", 1) for part in text.split(",")))
    except ValueError as exc:
        problem = exc.errors()[0] if isinstance(exc, ValidationError) else {"loc": (), "msg": "write name=number"}
        place = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"--workload {text}: {place + ': ' if place else ''}{problem['msg']}",
            f"{', '.join(GENERATORS)}, or like input=2000,output=200,rate=2[,shared=500][,turns=4,pause=10]",
        ) from exc
    return _from_lengths(text, given, requests, random.Random(seed))  # noqa: S311


def _from_lengths(text: str, given: _Made, requests: int, chance: random.Random) -> Workload:
    """Poisson arrivals."""
    piece = min(PIECE_TOKENS, max(16, given.input // 8))
    common = tuple(range(given.shared // piece))
    own = count(_OWN_PIECES)
    starts = accumulate(chance.expovariate(given.rate) for _ in range(requests))
    found = list[Request]()
    for session, start in enumerate(starts):
        at, tokens, pieces = start, given.input, list(common)
        for _ in range(given.turns):
            pieces += [next(own) for _ in range(-(-tokens // piece) - len(pieces))]
            found.append(Request(at, tokens, given.output, tuple(pieces), session if given.turns > 1 else None))
            at += chance.expovariate(1 / given.pause) if given.pause else 0.0
            tokens += given.output + given.input
    return Workload(text, piece, _in_order(found, requests))


def _conversation(requests: int, chance: random.Random) -> Iterator[Request]:
    """Like Mooncake's published conversation trace, from its marginals: some ten arrivals in each three seconds;
    prompts of 12 000 tokens in the mean, log-normal; answers of 340; half of the prompts begin as a recent one.
    """
    numbers = count(1)
    known: list[tuple[int, ...]] = []
    found, at = list[Request](), 0.0
    while len(found) < requests:
        for _ in range(max(1, round(chance.gauss(10.2, 3.4)))):
            length = min(240, max(1, int(chance.lognormvariate(2.54, 0.95))))
            shared: tuple[int, ...] = ()
            if known and chance.random() < 0.5:
                before = known[-1 - min(len(known) - 1, int(chance.expovariate(1 / 200)))]
                shared = before[: max(1, int(len(before) * chance.betavariate(4, 1)))]
            pieces = (*shared, *(next(numbers) for _ in range(max(1, length - len(shared)))))
            known.append(pieces)
            tokens = len(pieces) * PIECE_TOKENS - chance.randrange(PIECE_TOKENS)
            is_short = chance.random() < 0.25
            output = chance.randrange(1, 60) if is_short else min(2000, max(60, int(chance.gauss(430, 150))))
            found.append(Request(at + 3 * chance.random(), tokens, output, pieces))
        at += 3
    yield from _in_order(found, requests)


GENERATORS: Mapping[str, Callable[[int, random.Random], Iterator[Request]]] = {"conversations": _conversation}


def _in_order(found: list[Request], requests: int) -> tuple[Request, ...]:
    return tuple(sorted(found, key=lambda request: request.at)[:requests])


def in_words(workload: Workload) -> dict[str, Any]:
    """What is held constant."""
    prompts = sorted(request.tokens for request in workload.requests)
    outputs = sorted(request.output for request in workload.requests)
    return {
        "name": workload.name,
        "digest": workload.digest,
        "piece_tokens": workload.piece_tokens,
        "requests": len(workload.requests),
        "rate": workload.rate,
        "prompt_tokens": sum(prompts) / len(prompts),
        "output_tokens": sum(outputs) / len(outputs),
        "shared": workload.shared,
    }
