"""What is told of an exchange: its stages while they last, and the rest when it is over.

For the metrics, the log line, the answer's own headers, traces, the page and `pd-launch trace`: all read this, and
nothing of it is a client's text but the request id, the model's name and the key's.
"""

import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..errors import NodeError

Path = Literal["none", "disaggregated", "aggregated"]
StageName = Literal["queue", "read", "prefill", "hand-off", "aggregated", "decode", "resume", "release"]
"""queue: until it is let in. read: its body, and media of its. prefill: that leg. hand-off: decode leg to its first
event. aggregated: the same where one node does both phases. decode: from there to the end. resume: all that follows
the loss of a stream's node. release: a hand-off given back.
"""
_LEGS: frozenset[StageName] = frozenset({"prefill", "hand-off", "aggregated"})
"""Which begin with a request to a node."""
REFUSED = "refused"
"""The problem of a leg that its node refused."""
CUT_SHORT = "cut short"
"""The problem of a stage that nobody waited for any more: the client left, or another part of the request failed."""


class Follower(Protocol):
    """Hears of the stages as they begin and end: a trace."""

    def begun(self, stage: "Stage") -> None:
        """It has begun just now."""

    def ended(self, stage: "Stage") -> None:
        """It has ended just now."""

    def headers(self, stage: "Stage") -> list[tuple[bytes, bytes]]:
        """What a leg tells its node of the trace."""


@dataclass(eq=False, slots=True)
class Stage:
    """A part of an exchange's time. Times are seconds on the machine's monotonic clock."""

    name: StageName
    node: str = ""
    """Where it was."""
    attempt: int = 0
    part: str = ""
    """Of a request for several sequences: which."""
    began: float = 0.0
    ended: float = 0.0
    """0 while it lasts."""
    problem: str = ""
    """How it failed, in a word; empty when it did not."""
    size: int = 0
    """Of a body that was read, in bytes."""
    tokens: int = 0
    """Of a prefill: the prompt's."""
    predicted: int | None = None
    """... of which so many were expected in the node's prefix cache,"""
    cached: int | None = None
    """... and so many were, as the node says."""
    kv: str = ""
    """... and what became of the KV that it left (`handoff.py`)."""
    follower: Follower | None = None

    def end(self, problem: str = "") -> None:
        """Once; what comes later is not told."""
        if not self.ended:
            self.ended, self.problem = time.perf_counter(), problem
            if self.follower is not None:
                self.follower.ended(self)


@dataclass(slots=True)
class Record:
    """One exchange, filled in on its way. Times are seconds on the machine's monotonic clock, 0 when not reached."""

    request_id: str
    route: str
    key_name: str = ""
    model: str = ""
    """As the client asked for it."""
    path: Path = "none"
    reason: str | None = None
    """Why one node did both phases."""
    status: int = 0
    error: str = ""
    """What the log says of its failure."""
    failures: list[str] = field(default_factory=list)
    """`node:kind` of every leg that failed."""
    attempts: int = 0
    retries: int = 0
    resumed: int = 0
    transfer_id: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first_event: float = 0.0
    """When decode's answer began, or all of it came."""
    ended: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    """In the order in which they began; those of several sequences in one list."""
    part: str = ""
    follower: Follower | None = None

    def begin(self, name: StageName, node: str = "", *, since: float = 0.0) -> Stage:
        """A stage that begins now, or did then."""
        stage = Stage(name, node, self.attempts, self.part, since or time.perf_counter(), follower=self.follower)
        self.stages.append(stage)
        if self.follower is not None:
            self.follower.begun(stage)
        return stage

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that were asked, in order."""
        return [stage.node for stage in self.stages if stage.name in _LEGS]

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def first_event_s(self) -> float:
        return self.first_event - self.started if self.first_event else 0.0

    def spent(self) -> dict[StageName, float]:
        """Seconds of the longest stage of each name that ended well."""
        longest: dict[StageName, float] = {}
        for stage in self.stages:
            if stage.ended and not stage.problem:
                seconds = stage.ended - stage.began
                if seconds > longest.get(stage.name, 0.0):
                    longest[stage.name] = seconds
        return longest

    def failed(self, node: str, error: NodeError) -> None:
        self.failures.append(f"{node}:{error.reason}")

    def path_header(self) -> bytes:
        """Which way the request took, for `x-pd-path`."""
        return self.path.encode() if self.reason is None else f"{self.path}; reason={self.reason}".encode()
