"""The requests that run and the last that ended, for the page and `pd-launch trace`. Bounded; no prompt is in it."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import fields

from engines.base import JSONObject

from ..exchange.record import Record, Stage
from . import logs
from .journal import Journal

KEPT = 1000
"""Of each worker's, and less where requests have many sequences: each of these has stages of its own."""
_MOST_STAGES = 20_000

_OF_A_RECORD = tuple(one.name for one in fields(Record) if one.name not in ("stages", "follower"))
_OF_A_STAGE = tuple(one.name for one in fields(Stage) if one.name != "follower")


class Recent:
    """As one worker knows them: its own, and what the others told when theirs ended."""

    def __init__(self, journal: Journal | None = None) -> None:
        """`journal`: where workers tell each other; None with a single one."""
        self._journal = journal
        self._running: dict[int, Record] = {}
        self._ended: deque[Record] = deque()
        self._stages = 0
        self.number = 0
        """How many have ended, all told."""

    def begun(self, record: Record) -> None:
        """It was let in, or waits to be."""
        self._running[id(record)] = record

    def ended(self, record: Record) -> None:
        self._running.pop(id(record), None)
        self._add(record)
        if self._journal is not None:
            self._journal.write(_raw(record))

    def read_the_others(self) -> None:
        """Now and then, or what they told is written over. Some may be missed."""
        if self._journal is not None:
            for _, found in self._journal.read():
                if found is not None:
                    self._add(_restored(found[0]))

    def _add(self, record: Record) -> None:
        self._ended.append(record)
        self._stages += len(record.stages)
        self.number += 1
        while len(self._ended) > KEPT or self._stages > _MOST_STAGES:
            self._stages -= len(self._ended.popleft().stages)

    def find(self, request_id: str) -> list[JSONObject]:
        """All of this id, the latest first: a client may use one twice."""
        running = [record for record in self._running.values() if record.request_id == request_id]
        ended = [record for record in self._ended if record.request_id == request_id]
        return [told(record) for record in reversed([*ended, *running])]

    def last(self, most: int, after: int = 0) -> list[JSONObject]:
        """Those that ended last, oldest first, of those that came after the first `after`."""
        wanted = min(most, self.number - after, len(self._ended))
        return [told(self._ended[place]) for place in range(len(self._ended) - max(wanted, 0), len(self._ended))]

    def since(self, seconds: float) -> Iterator[Record]:
        """Those that ended in the last seconds, the latest first."""
        oldest = time.perf_counter() - seconds
        for record in reversed(self._ended):
            if record.ended < oldest:
                return
            yield record

    @property
    def is_full(self) -> bool:
        """Older ones were dropped."""
        return self.number > len(self._ended)


def told(record: Record) -> JSONObject:
    """For people and programs: when, which way, how long each stage was, what went wrong and what was done."""
    now = time.perf_counter()
    return {
        **logs.fields_of(record),
        "seconds": round((record.ended or now) - record.started, 4),
        "at": round(time.time() - now + record.started, 3),  # noqa: TID251  for people, and beside nodes' logs
        "running": not record.ended,
        "model": record.model,
        "attempts": record.attempts,
        "stages": [_stage(stage, record, now) for stage in record.stages],
    }


def _stage(stage: Stage, record: Record, now: float) -> JSONObject:
    found: JSONObject = {
        "name": stage.name, "node": stage.node, "attempt": stage.attempt, "part": stage.part,
        "began": round(stage.began - record.started, 4), "seconds": round((stage.ended or now) - stage.began, 4),
        "running": not stage.ended, "problem": stage.problem, "bytes": stage.size or None,
        "tokens": stage.tokens or None, "predicted": stage.predicted,
        "cached": stage.cached, "kv": stage.kv,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value != "" and value is not None and value is not False}


def _raw(record: Record) -> JSONObject:
    """For another process of this machine: the clock is the same."""
    found = {name: getattr(record, name) for name in _OF_A_RECORD}
    return found | {"stages": [[getattr(stage, name) for name in _OF_A_STAGE] for stage in record.stages]}


def _restored(raw: JSONObject) -> Record:
    stages = [Stage(**dict(zip(_OF_A_STAGE, values, strict=True))) for values in raw["stages"]]
    return Record(**(raw | {"stages": stages}))
