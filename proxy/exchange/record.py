"""What is told of an exchange when it is over: for the log, the metrics and the answer's own headers."""

import time
from dataclasses import dataclass, field
from typing import Literal

from ..errors import NodeError

Path = Literal["none", "disaggregated", "aggregated"]


@dataclass(slots=True)
class Record:
    """One exchange, filled in on its way. Times are seconds on the machine's monotonic clock, 0 when not reached."""

    request_id: str
    route: str
    key_name: str = ""
    path: Path = "none"
    reason: str | None = None
    """Why one node did both phases."""
    status: int = 0
    nodes: list[str] = field(default_factory=list)
    """Names of the nodes that were asked, in order."""
    failures: list[str] = field(default_factory=list)
    """`node:kind` of every leg that failed."""
    retries: int = 0
    resumed: int = 0
    transfer_id: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    prefill_s: float = 0.0
    """Of the last attempt: request to answer."""
    hand_off_s: float = 0.0
    """Of the last attempt: decode leg to its first event."""
    first_event: float = 0.0
    """When decode's answer began, or all of it came."""
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def queue_s(self) -> float:
        return self.admitted - self.started if self.admitted else 0.0

    @property
    def first_event_s(self) -> float:
        return self.first_event - self.started if self.first_event else 0.0

    def failed(self, node: str, error: NodeError) -> None:
        self.failures.append(f"{node}:{error.reason}")

    def path_header(self) -> bytes:
        """Which way the request took, for `x-pd-path`."""
        return self.path.encode() if self.reason is None else f"{self.path}; reason={self.reason}".encode()
