"""Latency and failures of a simulated node, set while it runs: `POST /sim` with any of these fields.

    {"ttft_s": 0.1, "itl_s": 0.02}                      how slow it is
    {"fault": "status", "status": 503, "times": 3}      answers with an error; "headers" may be given
    {"fault": "drop"}                                   closes the connection before a byte
    {"fault": "drop-after", "chunks": 4}                ... after so many chunks of a stream
    {"fault": "exit-after", "chunks": 4}                the whole node dies there
    {"fault": "hang"}                                   accepts and never answers
    {"fault": "hang-after", "chunks": 4}                falls silent in mid-stream
    {"fault": "error-first"}                            200, then an error as a stream's first event
    {"fault": "error-after", "chunks": 4}               ... after so many chunks of a stream
    {"fault": "finish-error"}                           200 with finish_reason "error"
    {"refuse_s": 2}                                     stops listening for a while
    {"lose_transfers": true}                            no KV arrives, at a decode node
    {"garble_transfers": true}                          other KV arrives there than was sent
    {"fault": null}                                     well again

A fault meets generation requests only, `times` of them (all, when not given).
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MESSAGE = "simulated failure\nTraceback (most recent call last):\n  File /opt/engine/worker.py"
"""Of all errors made here: what a client should not be told."""

Kind = Literal[
    "status", "drop", "drop-after", "exit-after", "hang", "hang-after", "error-first", "error-after", "finish-error"
]


class Faults(BaseModel):
    """The settings in force."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    ttft_s: float = Field(0, ge=0)
    itl_s: float = Field(0, ge=0)
    fault: Kind | None = None
    status: int = Field(500, ge=100, le=599)
    headers: dict[str, str] = {}
    chunks: int = Field(1, ge=0)
    times: int | None = Field(None, ge=1)
    refuse_s: float = Field(0, ge=0)
    lose_transfers: bool = False
    garble_transfers: bool = False

    def take(self) -> Kind | None:
        """The fault the next request meets; counts it."""
        if self.fault is None:
            return None
        kind = self.fault
        if self.times is not None:
            if self.times == 1:
                self.fault, self.times = None, None
            else:
                self.times -= 1
        return kind
